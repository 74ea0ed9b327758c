"""Rollout workers as Ray actors: dispatch, quarantine, restart, re-dispatch.

A job is a pure function of its draws and the weights' version, so a lost job is simply run again.
A worker whose process is gone comes back empty: it is kept in quarantine until a *new* process
answers and has taken the current weights.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from cluster.jobs import partition, sampled
from cluster.ray_cluster import LOST, TIMEOUT, ClusterError, Placement, actor_options, share_of
from cluster.weights import Weights
from cluster.workers import Failed, Health, Record, RolloutWorker
from recipes.schema import AnyRecipe
from rl.contracts import Plan, Sampled
from rl.tilt import Score
from rollout.draws import Group

logger = logging.getLogger(__name__)

# Two jobs are with a worker at a time, so that it never waits for the driver.
QUEUE = 2
MAX_ATTEMPTS = 4
MAX_DROPPED = 0.1
POLL = 0.5
# A lost connection to a living process: after this long the same process is believed again.
SAME_BOOT_GRACE = 10.0


@dataclass
class _Worker:
    """A rollout actor as the driver sees it."""

    index: int
    handle: Any
    boot: str = ""
    ready: bool = False
    lost_at: float = 0.0
    probe: Any = None
    loading: Any = None
    loading_version: int = -1
    jobs: set[int] = field(default_factory=set[int])


@dataclass
class _Running:
    worker: _Worker
    job: int
    parts: list[Any]
    deadline: float


class RayRolloutPool:
    """See ``rl.contracts.RolloutPool``."""

    def __init__(
        self,
        recipe: AnyRecipe,
        placement: Placement,
        log_dir: str,
        served: Mapping[str, Score] | None = None,
    ) -> None:
        """``served``: see ``RolloutWorker``."""
        self.recipe = recipe
        self.weights: Weights | None = None
        self.restarts = 0
        workers, colocated = recipe.workers, recipe.cluster.colocated
        remote: Any = ray.remote  # its stubs know no concurrency_groups
        actor = remote(concurrency_groups={"health": 1})(RolloutWorker)
        self.workers = [
            _Worker(
                index,
                actor.options(
                    **actor_options(
                        placement,
                        bundle,
                        share_of(workers.cpus, colocated),
                        share_of(workers.gpus, colocated),
                    ),
                    name=f"{recipe.name}-rollout-{index}",
                    max_restarts=recipe.cluster.max_restarts,
                    max_task_retries=0,
                ).remote(
                    recipe.model_dump_json(),
                    "cuda" if workers.gpus else "cpu",
                    max(int(workers.cpus), 1),
                    f"{log_dir}/rollout-{index}.log",
                    served,
                ),
            )
            for index, bundle in enumerate(placement.workers)
        ]

    def start(self) -> list[Health]:
        """Wait until every worker answers.

        Raises:
            ClusterError: one did not within ``cluster.start_timeout``.
        """
        deadline = time.monotonic() + self.recipe.cluster.start_timeout
        answers: list[Health] = []
        for worker in self.workers:
            try:
                health: Any = ray.get(
                    self._health(worker), timeout=max(deadline - time.monotonic(), 0.1)
                )
            except (TIMEOUT, *LOST) as error:
                raise ClusterError(
                    f"rollout actor {worker.index} did not start: {error}"
                ) from error
            worker.boot, worker.ready = health.boot, True
            answers.append(health)
        return answers

    def load(self, weights: Weights) -> None:
        """All ready workers take ``weights``; one that fails to is quarantined."""
        self.weights = weights
        calls = [(worker, self._load(worker)) for worker in self.workers if worker.ready]
        for worker, call in calls:
            try:
                ray.get(call, timeout=self.recipe.cluster.job_timeout)
            except LOST as error:
                self._quarantine(worker, error)
            except TIMEOUT as error:
                self._kill(worker, error)

    def generate(self, groups: Sequence[Group], plans: Sequence[Plan]) -> Iterator[Sampled]:
        """Groups as their jobs complete, the groups of a job together."""
        jobs = partition(groups, self.recipe.rollout.batch_size)
        todo = deque(range(len(jobs)))
        attempts = [0] * len(jobs)
        running: dict[Any, _Running] = {}
        dropped: list[str] = []
        while todo or running:
            self._readmit()
            for worker in self._idle(todo):
                job = todo.popleft()
                attempts[job] += 1
                span = jobs[job]
                self._submit(running, worker, job, groups[span], plans[span])
            for records, entry in self._finished(running, todo, attempts):
                dropped += [r.problem for r in records if r.problem is not None]
                yield from sampled(entry.job, groups[jobs[entry.job]], records, entry.parts)
        if len(dropped) > MAX_DROPPED * len(groups):
            raise ClusterError(f"{len(dropped)} of {len(groups)} groups failed: {dropped[0]}")
        for problem in dropped:
            logger.warning("group dropped: %s", problem)

    def _idle(self, todo: deque[int]) -> Iterator[_Worker]:
        """A worker for each job that can be submitted now, the least busy first."""
        while todo:
            free = [w for w in self.workers if w.ready and len(w.jobs) < QUEUE]
            if not free:
                return
            yield min(free, key=lambda w: len(w.jobs))

    def _submit(
        self,
        running: dict[Any, _Running],
        worker: _Worker,
        job: int,
        groups: Sequence[Group],
        plans: Sequence[Plan],
    ) -> None:
        call = worker.handle.generate.options(num_returns=1 + 2 * len(groups))
        records, *parts = call.remote(groups, plans)
        deadline = time.monotonic() + self.recipe.cluster.job_timeout * (1 + len(worker.jobs))
        running[records] = _Running(worker, job, parts, deadline)
        worker.jobs.add(job)

    def _finished(
        self, running: dict[Any, _Running], todo: deque[int], attempts: list[int]
    ) -> Iterator[tuple[list[Record], _Running]]:
        """Wait for a result; what was lost or overdue goes back to ``todo``."""
        if not running:
            time.sleep(POLL / 10)
            return
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL)
        for reference in ready:
            entry = running.pop(reference)
            entry.worker.jobs.discard(entry.job)
            try:
                answer = ray.get(reference)
            except LOST as error:
                self._again(entry, todo, attempts, str(error))
                self._quarantine(entry.worker, error)
                continue
            if isinstance(answer, Failed):
                self._again(entry, todo, attempts, answer.message)
                continue
            yield answer, entry
        # A driver that was busy elsewhere finds answers that came long before their deadline.
        late = [r for r, entry in running.items() if time.monotonic() > entry.deadline]
        done = set(ray.wait(late, num_returns=len(late), timeout=0)[0]) if late else set[Any]()
        for reference, entry in list(running.items()):
            if reference in late and reference not in done:
                del running[reference]
                entry.worker.jobs.discard(entry.job)
                message = f"no answer within {self.recipe.cluster.job_timeout:g} s"
                self._again(entry, todo, attempts, message)
                self._kill(entry.worker, ClusterError(message))

    def _again(self, entry: _Running, todo: deque[int], attempts: list[int], message: str) -> None:
        if attempts[entry.job] >= MAX_ATTEMPTS:
            raise ClusterError(
                f"rollout job {entry.job} failed {MAX_ATTEMPTS} times, last on actor "
                f"{entry.worker.index}: {message}"
            )
        logger.warning("rollout job %d runs again: %s", entry.job, message.splitlines()[-1])
        todo.appendleft(entry.job)

    def _quarantine(self, worker: _Worker, error: Exception) -> None:
        if worker.ready:
            logger.warning("rollout actor %d quarantined: %s", worker.index, type(error).__name__)
            self.restarts += 1
            worker.ready, worker.lost_at, worker.probe = False, time.monotonic(), None

    def _kill(self, worker: _Worker, error: Exception) -> None:
        self._quarantine(worker, error)
        ray.kill(worker.handle, no_restart=False)

    def _readmit(self) -> None:
        """Advance every quarantined worker: answer with a new boot id, then the current weights."""
        for worker in [w for w in self.workers if not w.ready]:
            if worker.loading is not None:
                self._finish_loading(worker)
                continue
            worker.probe = worker.probe or self._health(worker)
            if not ray.wait([worker.probe], timeout=0)[0]:
                continue
            health = self._answer(worker)
            if health is None:
                continue
            patient = time.monotonic() - worker.lost_at > SAME_BOOT_GRACE
            if health.boot != worker.boot or patient:
                worker.boot = health.boot
                self._admit(worker)
        overdue = time.monotonic() - max((w.lost_at for w in self.workers), default=0.0)
        none_ready = not any(worker.ready for worker in self.workers)
        if not self.workers or (none_ready and overdue > self.recipe.cluster.start_timeout):
            raise ClusterError(
                f"no rollout actor is left: each may restart {self.recipe.cluster.max_restarts} "
                "times (cluster.max_restarts) and has cluster.start_timeout to come back"
            )

    def _answer(self, worker: _Worker) -> Health | None:
        probe, worker.probe = worker.probe, None
        try:
            health: Any = ray.get(probe)
            return health
        except ActorUnavailableError:
            return None
        except LOST as error:
            logger.error("rollout actor %d does not come back: %s", worker.index, error)
            self.workers.remove(worker)
            return None

    def _admit(self, worker: _Worker) -> None:
        """Load the current weights first, if there are any: a teacher needs none."""
        if self.weights is not None:
            worker.loading = self._load(worker)
            return
        worker.ready = True
        logger.warning("rollout actor %d re-admitted", worker.index)

    def _finish_loading(self, worker: _Worker) -> None:
        if not ray.wait([worker.loading], timeout=0)[0]:
            return
        call, worker.loading = worker.loading, None
        try:
            ray.get(call)
        except LOST:
            worker.lost_at = time.monotonic()
            return
        if self.weights is not None and worker.loading_version != self.weights.version:
            worker.loading = self._load(worker)
            return
        worker.ready = True
        logger.warning("rollout actor %d re-admitted", worker.index)

    def _health(self, worker: _Worker) -> Any:
        return worker.handle.health.options(concurrency_group="health").remote()

    def _load(self, worker: _Worker) -> Any:
        weights = self.weights
        assert weights is not None
        worker.loading_version = weights.version
        return worker.handle.load.remote(weights.data, weights.version, weights.checksum)
