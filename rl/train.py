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
from rl.contracts import Learner, Metrics, RolloutPool, Run, Sampled, Scored, Scorer, Update
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
    """All groups of a step or of a part of it, scored; ``asked`` were drawn, in this wall time."""

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
        return metrics | {"time/sync": done - synced, "time/step": done - started}

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
            taken = time.perf_counter()
            scored = drawn[-1].scored
            steps, found = optimiser_steps(
                scored, self.schedule.weights, self.algorithm, self.step, 1 / parts
            )
            metrics |= self._prove(scored, steps)
            began = time.perf_counter()
            if len(drawn) < parts and steps:
                updates.append(self.learner.accumulate(steps[0]))
            elif len(drawn) == parts and (steps or updates):
                updates.append(self.learner.update(steps or [[]]))
            waited, learned = waited + taken - started, learned + time.perf_counter() - began
            metrics = found | metrics
        metrics |= self._describe(drawn, updates)
        return metrics | {"time/wait": waited, "time/learn": learned}

    def _draw(self, number: int, weights: Any) -> RolloutSet:
        """A set, or a part of one: a function of (seed, step) and the weights."""
        s, started = self.schedule, time.perf_counter()
        step, part = divmod(number, s.overlap.parts)
        groups = groups_for(
            self.prompts, seed=s.seed, step=step, count=s.prompts_per_step, size=s.group_size
        )
        size = s.prompts_per_step // s.overlap.parts
        span = slice(part * size, (part + 1) * size)
        plans = self.algorithm.plans(step, groups)[span]
        pinned = weights if s.overlap.pinned else None
        sampling = _Timed(self.pool.generate(groups[span], plans, pinned))
        scored = self.scorer.score(sampling)
        done = time.perf_counter()
        return RolloutSet(scored, len(plans), sampling.finished - started, done - sampling.finished)

    def _prove(self, scored: Sequence[Scored], steps: list[list[Item]]) -> Metrics:
        """Before the first step the learner scores what the sampler drew as the sampler did."""
        # Weights that lag behind the trained ones agree with them before the first step only, and
        # older weights never do.
        fresh = all(group.sample.version == self.step for group in scored)
        lags = self.algorithm.lags and self.step > 0
        proved, self.proved = self.proved, self.proved or bool(steps)
        if proved or not steps or not fresh or lags:
            return {}
        return self.algorithm.check_drift(self.learner.replay(steps[0]), self.schedule.dtype)

    def _describe(self, drawn: Sequence[RolloutSet], updates: Sequence[Update]) -> Metrics:
        """What a set was and what training on it took."""
        scored = [group for part in drawn for group in part.scored]
        samples = [group.sample for group in scored]
        lost, self.restarts = self.pool.restarts - self.restarts, self.pool.restarts
        metrics = length_metrics("rollout", samples) | {
            "time/rollout": sum(part.rollout_seconds for part in drawn) / len(drawn),
            "time/reward": sum(part.reward_seconds for part in drawn) / len(drawn),
            "work/rollout_forwards": float(sum(sample.forwards for sample in samples)),
            "busy/rollout": sum(sample.seconds for sample in samples),
            "busy/reward": self.scorer.take_seconds(),
            "rollout/dropped_groups": float(sum(part.asked for part in drawn) - len(scored)),
            "rollout/restarts": float(lost),
            "optimizer_steps": float(sum(len(update.grad_norms) for update in updates)),
        }
        if self.schedule.overlap.stale:
            metrics |= staleness_metrics(samples, self.step)
        if len(drawn) > 1:
            metrics |= optimiser_steps(
                scored, self.schedule.weights, self.algorithm, self.step
            )[1]  # fmt: skip
        if updates:
            whole = Update.joined(updates)
            metrics |= self.algorithm.metrics(whole.table)
            metrics["grad_norm"] = sum(whole.grad_norms) / len(whole.grad_norms)
            metrics["work/learner_forwards"] = float(whole.forwards)
            metrics["work/backwards"] = float(whole.backwards)
            metrics["busy/learner"] = sum(whole.seconds)
        return metrics

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
