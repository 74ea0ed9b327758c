"""A checkpoint that is loaded already, as a pool of one worker in this process."""

from __future__ import annotations

from cluster.local import LocalRolloutPool
from cluster.sample import Source
from cluster.workers import RolloutWorker


class _Opened(RolloutWorker):
    """A rollout worker around an opened checkpoint."""

    def __init__(self, source: Source) -> None:
        self.policy, self.sampler, self.version = source.policy, source.sampler, source.step
        self.checksum = None


class OpenedPool(LocalRolloutPool):
    """That worker, cut into the jobs that a run cuts its evaluation into."""

    def __init__(self, source: Source) -> None:
        self._hold(_Opened(source), source.sampler.config)
