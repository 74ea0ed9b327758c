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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.ahead import Ahead, ScheduleConfig
from rl.algorithm import Algorithm
from rl.contracts import Learner, Metrics, RolloutPool, Run, Scorer, Update
from rl.drawing import RolloutSet, draw, proof, set_metrics, update_metrics
from rl.evaluate import Evaluation
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
    restarts: int = field(default=0, init=False)

    def train(self) -> None:
        """Train to the last step, or to the end of the one in which the user interrupts."""
        if self.step == 0:
            self._evaluate()
        self.publish()
        sets = self.sets()
        try:
            while self.step < self.schedule.steps and not self.run.interrupted():
                metrics = self.advance(sets)
                self.run.log(self.step, metrics)
                self._evaluate_and_save()
        finally:
            self.pool.cancel()
            self.scorer.cancel()
            sets.close()

    def sets(self) -> Ahead[RolloutSet]:
        """What draws the sets, or parts of sets, that are left."""
        overlap = self.schedule.overlap
        first, last = self.step * overlap.parts, self.schedule.steps * overlap.parts
        sets = Ahead(self._draw, overlap.threads, first, last)
        if overlap.pinned and self.before is not None:
            sets.start(first, self.before)
        return sets

    def publish(self) -> None:
        """The learner's weights are those that draw from now on."""
        self.weights = self.learner.publish(self.step)
        self.pool.load(self.weights)

    def advance(self, sets: Ahead[RolloutSet]) -> Metrics:
        """One step: a set, what it teaches, the new weights."""
        started = time.perf_counter()
        metrics = self._train_set(sets)
        self.step += 1
        synced = time.perf_counter()
        self.before = self.weights
        self.publish()
        done = time.perf_counter()
        lost, self.restarts = self.pool.restarts - self.restarts, self.pool.restarts
        metrics |= {"time/sync": done - synced, "time/step": done - started}
        return metrics | {"rollout/restarts": float(lost)}

    def _train_set(self, sets: Ahead[RolloutSet]) -> Metrics:
        """One rollout set, each part when it is there; the last part ends the optimiser step."""
        parts = self.schedule.overlap.parts
        drawn: list[RolloutSet] = []
        updates: list[Update] = []
        waited = learned = 0.0
        metrics: Metrics = {}
        for number in range(self.step * parts, (self.step + 1) * parts):
            started = time.perf_counter()
            drawn.append(sets.take(number, self.schedule.overlap.until(number), self.weights))
            scored, taken = drawn[-1].scored, time.perf_counter()
            steps, found = optimiser_steps(
                scored, self.schedule.weights, self.algorithm, self.step, 1 / parts
            )
            if steps and not self.proved:
                self.proved = True
                metrics |= proof(
                    self.learner, self.algorithm, scored, steps[0], self.step, self.schedule.dtype
                )
            began = time.perf_counter()
            if len(drawn) < parts and steps:
                updates.append(self.learner.accumulate(steps[0]))
            elif len(drawn) == parts and (steps or updates):
                updates.append(self.learner.update(steps or [[]]))
            waited, learned = waited + taken - started, learned + time.perf_counter() - began
            metrics = found | metrics
        metrics |= set_metrics(drawn, self.schedule.weights, self.algorithm, self.step)
        metrics |= update_metrics(updates, self.algorithm)
        metrics |= {"time/wait": waited, "time/learn": learned}
        return metrics | {"busy/reward": self.scorer.take_seconds()}

    def _draw(self, number: int, weights: Any) -> RolloutSet:
        """A set, or a part of one: a function of (seed, step) and the weights."""
        s = self.schedule
        step, part = divmod(number, s.overlap.parts)
        groups = groups_for(
            self.prompts, seed=s.seed, step=step, count=s.prompts_per_step, size=s.group_size
        )
        plans = self.algorithm.plans(step, groups)
        size = s.prompts_per_step // s.overlap.parts
        span = slice(part * size, (part + 1) * size)
        pinned = weights if s.overlap.pinned else None
        return draw(self.pool, self.scorer, groups[span], plans[span], pinned)

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
