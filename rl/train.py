"""The loop, as the algorithm boxes of the papers have it.

    evaluate the start
    for step in 0, 1, ...
        draw groups; sample them by the algorithm's plans; score them as they complete
        advantages; optimiser steps
        publish the weights to the rollout workers
        evaluate, checkpoint when due

Everything is a function of (seed, step) and the weights, which is all that a resume needs. What is
drawn while earlier sets train, and by which weights, is ``rl/ahead.py``'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.ahead import Ahead, ScheduleConfig
from rl.algorithm import Algorithm
from rl.contracts import Learner, Metrics, RolloutPool, Run, Sampled, Scored, Scorer
from rl.evaluate import Evaluation
from rl.items import Item
from rl.metrics import length_metrics, staleness_metrics
from rl.rollout_set import optimiser_steps
from rollout.draws import Prompt, groups_for


@dataclass(frozen=True)
class Schedule:
    """The numbers of a recipe that the loop needs: all in steps, the last step does everything."""

    seed: int
    steps: int
    prompts_per_step: int
    group_size: int
    evaluate_every: int
    checkpoint_every: int
    weights: dict[str, float]
    dtype: str
    overlap: ScheduleConfig = field(default_factory=ScheduleConfig)

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens ``every`` so many steps happens after ``step``."""
        return step % every == 0 or step == self.steps


@dataclass(frozen=True)
class RolloutSet:
    """All groups of a step, scored; ``asked`` of them were drawn, in this wall time."""

    scored: list[Scored]
    asked: int
    rollout_seconds: float
    reward_seconds: float


@dataclass
class Trainer:
    """A run in progress; ``learner`` holds the state after ``step`` steps.

    Attributes:
        weights: the published ones. ``before``: those of the step before, which draw the set at hand
            where sets are drawn one step ahead.
    """

    schedule: Schedule
    algorithm: Algorithm[Any]
    prompts: Sequence[Prompt]
    pool: RolloutPool
    scorer: Scorer
    learner: Learner
    evaluation: Evaluation
    run: Run
    step: int
    before: Any = None
    weights: Any = field(default=None, init=False)
    proved: bool = field(default=False, init=False)

    def train(self) -> None:
        """Train to the last step, or to the end of the one in which the user interrupts."""
        if self.step == 0:
            self._evaluate()
        self._publish()
        overlap = self.schedule.overlap
        sets = Ahead(self._draw, overlap.ahead, self.step, self.schedule.steps)
        try:
            if overlap.pinned and self.before is not None:
                sets.start(self.step, self.before)
            while self.step < self.schedule.steps and not self.run.interrupted():
                started = time.perf_counter()
                drawn = sets.take(self.step, self.weights)
                taken = time.perf_counter()
                steps, metrics = self._optimiser_steps(drawn)
                metrics |= self._update(steps)
                self.step += 1
                synced = time.perf_counter()
                self.before = self.weights
                self._publish()
                done = time.perf_counter()
                metrics |= {
                    "time/wait": taken - started,
                    "time/sync": done - synced,
                    "time/step": done - started,
                }
                self.run.log(self.step, metrics)
                self._evaluate_and_save()
        finally:
            self.pool.cancel()
            sets.close()

    def _publish(self) -> None:
        self.weights = self.learner.publish(self.step)
        self.pool.load(self.weights)

    def _draw(self, step: int, weights: Any) -> RolloutSet:
        """The set of ``step``: a function of (seed, step) and the weights."""
        s, started = self.schedule, time.perf_counter()
        groups = groups_for(
            self.prompts, seed=s.seed, step=step, count=s.prompts_per_step, size=s.group_size
        )
        plans = self.algorithm.plans(step, groups)
        sampling = _Timed(self.pool.generate(groups, plans, weights if s.overlap.pinned else None))
        scored = self.scorer.score(sampling)
        done = time.perf_counter()
        return RolloutSet(
            scored, len(groups), sampling.finished - started, done - sampling.finished
        )

    def _optimiser_steps(self, drawn: RolloutSet) -> tuple[list[list[Item]], Metrics]:
        s, scored = self.schedule, drawn.scored
        steps, metrics = optimiser_steps(scored, s.weights, self.algorithm, self.step)
        metrics |= length_metrics("rollout", [group.sample for group in scored])
        metrics |= {
            "time/rollout": drawn.rollout_seconds,
            "time/reward": drawn.reward_seconds,
            "work/rollout_forwards": float(sum(group.sample.forwards for group in scored)),
            "busy/rollout": sum(group.sample.seconds for group in scored),
            "busy/reward": self.scorer.take_seconds(),
            "rollout/dropped_groups": float(drawn.asked - len(scored)),
            "rollout/restarts": float(self.pool.restarts),
        }
        if s.overlap.stale:
            metrics |= staleness_metrics([group.sample for group in scored], self.step)
        if not self.proved and steps:
            self.proved = True
            # Weights that lag behind the trained ones agree with them before the first step only,
            # and older weights never do.
            fresh = all(group.sample.version == self.step for group in scored)
            if fresh and (self.step == 0 or not self.algorithm.lags):
                table = self.learner.replay(steps[0])
                metrics |= self.algorithm.check_drift(table, s.dtype)
        return steps, metrics

    def _update(self, steps: list[list[Item]]) -> Metrics:
        started = time.perf_counter()
        metrics: Metrics = {"optimizer_steps": float(len(steps))}
        if steps:
            update = self.learner.update(steps)
            metrics |= self.algorithm.metrics(update.table)
            metrics["grad_norm"] = sum(update.grad_norms) / len(update.grad_norms)
            metrics["work/learner_forwards"] = float(update.forwards)
            metrics["work/backwards"] = float(update.backwards)
            metrics["busy/learner"] = sum(update.seconds)
        return metrics | {"time/learn": time.perf_counter() - started}

    def _evaluate_and_save(self) -> None:
        s, step = self.schedule, self.step
        if s.due(step, s.evaluate_every):
            self._evaluate()
        if s.due(step, s.checkpoint_every) or self.run.interrupted():
            self.run.checkpoint(step)

    def _evaluate(self) -> None:
        started = time.perf_counter()
        metrics, scored = self.evaluation.run(self.learner, self.pool, self.scorer, self.step)
        metrics["time/evaluate"] = time.perf_counter() - started
        self.run.evaluated(self.step, metrics, scored)


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
