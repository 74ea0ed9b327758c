"""Drawing a rollout set, or a part of one, and the numbers of a set and of what was trained on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.algorithm import Algorithm
from rl.contracts import Learner, Metrics, Plan, RolloutPool, Sampled, Scored, Scorer, Update
from rl.items import Item
from rl.metrics import length_metrics, staleness_metrics
from rl.rollout_set import optimiser_steps
from rollout.draws import Group


@dataclass(frozen=True)
class RolloutSet:
    """All groups of a step or of a part of it, scored; ``asked`` were drawn, in this wall time."""

    scored: list[Scored]
    asked: int
    rollout_seconds: float
    reward_seconds: float


def draw(
    pool: RolloutPool, scorer: Scorer, groups: Sequence[Group], plans: Sequence[Plan], weights: Any
) -> RolloutSet:
    """Sample and score; scores are asked for as samples come. ``weights``: as a pool takes them."""
    started = time.perf_counter()
    sampling = _Timed(pool.generate(groups, plans, weights))
    scored = scorer.score(sampling)
    done = time.perf_counter()
    return RolloutSet(scored, len(groups), sampling.finished - started, done - sampling.finished)


def proof(
    learner: Learner,
    algorithm: Algorithm[Any],
    scored: Sequence[Scored],
    items: Sequence[Item],
    step: int,
    dtype: str,
) -> Metrics:
    """Before the first update the learner scores what the sampler drew as the sampler did.

    Weights that lag behind the trained ones agree with them before the first step only, and older
    weights never do: then there is nothing to compare.

    Raises:
        DriftError: naming the likely cause.
    """
    fresh = all(group.sample.version == step for group in scored)
    if not fresh or (algorithm.lags and step > 0):
        return {}
    return algorithm.check_drift(learner.replay(items), dtype)


def set_metrics(
    drawn: Sequence[RolloutSet],
    weights: Mapping[str, float],
    algorithm: Algorithm[Any],
    step: int,
) -> Metrics:
    """What a set was, of one part or several; ``step``: of the weights that train on it."""
    scored = [group for part in drawn for group in part.scored]
    samples = [group.sample for group in scored]
    metrics = length_metrics("rollout", samples) | {
        "time/rollout": sum(part.rollout_seconds for part in drawn) / len(drawn),
        "time/reward": sum(part.reward_seconds for part in drawn) / len(drawn),
        "work/rollout_forwards": float(sum(sample.forwards for sample in samples)),
        "busy/rollout": sum(sample.seconds for sample in samples),
        "rollout/dropped_groups": float(sum(part.asked for part in drawn) - len(scored)),
    }
    if algorithm.stale:
        metrics |= staleness_metrics(samples, step)
    if len(drawn) > 1:
        metrics |= optimiser_steps(scored, weights, algorithm, step)[1]
    return metrics


def update_metrics(updates: Sequence[Update], algorithm: Algorithm[Any]) -> Metrics:
    """What the learner did in the calls of one set."""
    steps = sum(len(update.grad_norms) for update in updates)
    metrics: Metrics = {"optimizer_steps": float(steps)}
    if updates:
        whole = Update.joined(updates)
        metrics |= algorithm.metrics(whole.table)
        metrics["grad_norm"] = sum(whole.grad_norms) / len(whole.grad_norms)
        metrics["work/learner_forwards"] = float(whole.forwards)
        metrics["work/backwards"] = float(whole.backwards)
        metrics["busy/learner"] = sum(whole.seconds)
    return metrics


class _Timed(Iterator[Sampled]):
    """An iterator that notes when it was exhausted."""

    def __init__(self, samples: Iterator[Sampled]) -> None:
        self._samples = samples
        self.finished = time.perf_counter()

    def __next__(self) -> Sampled:
        try:
            return next(self._samples)
        finally:
            self.finished = time.perf_counter()
