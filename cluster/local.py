"""The whole platform in one process: the same workers, rank and loop, without Ray.

This is how most tests run, and what the Ray pools must agree with number for number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.distill_rank import build_rank
from cluster.jobs import (
    AnyItem,
    chunk_columns,
    chunked,
    collect,
    partition,
    place_replays,
    reward_name,
    sampled,
)
from cluster.weights import Weights
from cluster.workers import Failed, RewardWorker, RolloutWorker
from recipes.schema import AnyRecipe
from rewards.calling import Scores
from rewards.catalogue import RewardConfig
from rewards.serving import EnvironmentProcess
from rl.contracts import Metrics, Plan, Sampled, Scored, Update
from rl.items import micro_steps
from rollout.draws import Group


class LocalRolloutPool:
    """One rollout worker in this process."""

    restarts = 0

    def __init__(self, recipe: AnyRecipe) -> None:
        threads = torch.get_num_threads()
        self._hold(RolloutWorker(recipe.model_dump_json(), "cpu", threads), recipe.rollout)

    def _hold(self, worker: RolloutWorker, sampler: Any) -> None:
        self.worker, self.batch_size = worker, sampler.batch_size
        self.latest: Weights | None = None
        self._lock = threading.Lock()

    def load(self, weights: Weights) -> None:
        """See ``rl.contracts.RolloutPool``."""
        self.latest = weights

    def cancel(self) -> None:
        """See ``rl.contracts.RolloutPool``. Nothing is drawn before it is asked for."""

    def generate(
        self, groups: Sequence[Group], plans: Sequence[Plan], weights: Weights | None = None
    ) -> Iterator[Sampled]:
        """See ``rl.contracts.RolloutPool``."""
        for number, job in enumerate(partition(groups, self.batch_size)):
            with self._lock:
                wanted = weights or self.latest
                if wanted is not None and wanted.checksum != self.worker.checksum:
                    self.worker.load(wanted.data, wanted.version, wanted.checksum)
                records, *parts = self.worker.generate(groups[job], plans[job])
            if isinstance(records, Failed):
                raise RuntimeError(records.message)
            yield from sampled(number, groups[job], records, parts)


class LocalScorer:
    """Every reward in this process, or in a child of it where it has an environment."""

    def __init__(self, recipe: AnyRecipe) -> None:
        """Raises RewardFailed: see ``rewards.serving.EnvironmentProcess``."""
        self.seconds = 0.0
        self._lock = threading.Lock()  # a reward need not be written for threads
        self.training = [_serve(config) for config in recipe.rewards]
        self.held_out = [_serve(config) for config in recipe.evaluation.rewards]

    def score(self, samples: Iterable[Sampled], held_out: bool = False) -> list[Scored]:
        """See ``rl.contracts.Scorer``."""
        workers = [*self.training, *(self.held_out if held_out else [])]
        chunks = list(chunked(samples))
        scores: dict[str, list[Scores]] = {}
        for worker in workers:
            parts = scores.setdefault(reward_name(worker.config), [])
            for chunk in chunks:
                prompts, columns = chunk_columns(chunk)
                with self._lock:
                    answer, seconds = worker.score(prompts, columns, *[s.media for s in chunk])
                    self.seconds += seconds
                parts.append(answer)
        return collect(chunks, scores, [w.config for w in workers])

    def cancel(self) -> None:
        """See ``rl.contracts.Scorer``. Whoever asks does the scoring."""

    def take_seconds(self) -> float:
        """See ``rl.contracts.Scorer``."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def describe(self, samples: Sequence[Sampled]) -> Metrics:
        """See ``rl.contracts.Scorer``."""
        prompts, columns = chunk_columns(samples)
        media = [s.media for s in samples]
        return {
            f"{reward_name(worker.config)}/{key}": value
            for worker in [*self.training, *self.held_out]
            for key, value in worker.describe(prompts, columns, *media).items()
        }


def _serve(config: RewardConfig) -> RewardWorker | EnvironmentProcess:
    kind = RewardWorker if config.served_in is None else EnvironmentProcess
    return kind(config, torch.get_num_threads())


class LocalLearner:
    """One learner rank in this process, on the plain PyTorch engine."""

    def __init__(self, recipe: AnyRecipe) -> None:
        threads = torch.get_num_threads()
        self.rank: Any = build_rank(recipe.model_dump_json(), 0, "cpu", threads, "torch")
        self.micro_batch = recipe.learner.micro_batch

    def update(self, steps: Sequence[Sequence[AnyItem]]) -> Update:
        """See ``rl.contracts.Learner``."""
        placed, replays = place_replays(steps)
        counts = [max(micro_steps([items], self.micro_batch), 1) for items in steps]
        return self.rank.update(placed, counts, *replays)

    def accumulate(self, items: Sequence[AnyItem]) -> Update:
        """See ``rl.contracts.Learner``."""
        placed, replays = place_replays([items])
        return self.rank.accumulate(placed, [micro_steps([items], self.micro_batch)], *replays)

    def replay(self, items: Sequence[AnyItem]) -> dict[str, Any]:
        """See ``rl.contracts.Learner``."""
        (placed,), replays = place_replays([items])
        return self.rank.replay(placed, micro_steps([items], self.micro_batch), *replays)

    def publish(self, version: int, averaged: bool = False) -> Weights:
        """See ``rl.contracts.Learner``."""
        head, data = self.rank.publish(version, averaged)
        assert head is not None
        return Weights(head.version, head.checksum, data)

    def save(self, directory: Path) -> None:
        """Write the rank's state."""
        self.rank.save(directory)

    def restore(self, directory: Path) -> None:
        """Continue from a saved state."""
        self.rank.restore(directory)
