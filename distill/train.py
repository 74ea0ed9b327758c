"""The loop of a distillation.

    evaluate the teacher at its own number of steps and at two, and the student
    for step in 0, 1, ...
        teacher samples of the step (drawn ahead by the workers, or stored)
        critics, then the student, on the learner ranks
        evaluate the student, checkpoint when due

Everything is a function of (seed, step) and the weights, which is all that a resume needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distill.contracts import TeacherItem
from distill.diagnostics import mismatch, statistics_drift
from distill.metrics import distill_metrics
from distill.teacher import Source
from rl.contracts import Metrics, RolloutPool, Run, Sampled, Scored, Scorer, Update
from rl.evaluate import Evaluation
from rl.train import Schedule
from rollout.draws import EVALUATION_STEP, groups_for
from rollout.flow import FlowPlan

# Samples that statistics of media, and the check of training against inference, are made on.
COMPARED = 64
CHECKED = 4


class MismatchError(RuntimeError):
    """The training forward and the sampler make different samples of one draw."""


class Learner(Protocol):
    """The ranks that train."""

    def update(self, steps: Sequence[Sequence[Any]]) -> Update:
        """The updates of each training step."""
        ...

    def replay(self, items: Sequence[TeacherItem]) -> Mapping[str, Any]:
        """``sample``: what the training forward makes of the items' draws."""
        ...

    def publish(self, version: int, averaged: bool = False) -> Any:
        """The student's weights (or their average) as one versioned, checksummed blob."""
        ...


@dataclass
class Distiller:
    """A run in progress; ``learner`` holds the state after ``step`` steps.

    Attributes:
        student: how the student is drawn. ``teachers``: evaluated at the start, by name.
        checked: the training forward draws samples, which are compared with the sampler's first.
        fetch: opens a reference to media or samples.
    """

    schedule: Schedule
    student: FlowPlan
    teachers: Mapping[str, FlowPlan]
    teacher: Source
    pool: RolloutPool
    scorer: Scorer
    learner: Learner
    evaluation: Evaluation
    run: Run
    step: int
    checked: bool
    fetch: Callable[[Any], Any]

    def train(self) -> None:
        """Train to the last step, or to the end of the one in which the user interrupts."""
        self.pool.load(self.learner.publish(self.step))
        metrics = self._check_forward() if self.checked else {}
        if self.step == 0:
            for name, plan in self.teachers.items():
                metrics |= self.evaluation.measure(self.pool, self.scorer, plan, name)[0]
            self._evaluate(metrics)
        try:
            self._steps()
        finally:
            self.pool.cancel()

    def _steps(self) -> None:
        while self.step < self.schedule.steps and not self.run.interrupted():
            started = time.perf_counter()
            items, (forwards, seconds) = self.teacher.take(self.step)
            waited = time.perf_counter()
            metrics = {
                "time/wait": waited - started,
                "time/rollout": waited - started,
                "work/rollout_forwards": float(forwards),
                "busy/rollout": seconds,
            }
            metrics |= self._update(items)
            self.step += 1
            metrics |= {
                "time/learn": time.perf_counter() - waited,
                "time/step": time.perf_counter() - started,
            }
            self.run.log(self.step, metrics)
            if self.schedule.due(self.step, self.schedule.evaluate_every):
                self._evaluate({})
            if self.schedule.due(self.step, self.schedule.checkpoint_every) or (
                self.run.interrupted()
            ):
                self.run.checkpoint(self.step)

    def _update(self, items: list[Any]) -> Metrics:
        update = self.learner.update([items])
        return {
            **distill_metrics(update.table),
            **self.teacher.observe(update.table),
            "grad_norm": sum(update.grad_norms) / len(update.grad_norms),
            "work/learner_forwards": float(update.forwards),
            "work/backwards": float(update.backwards),
            "busy/learner": sum(update.seconds),
        }

    def _evaluate(self, metrics: Metrics) -> None:
        """The averaged student on the pinned draws, beside the teacher's media of the same draws."""
        started = time.perf_counter()
        self.pool.load(self.learner.publish(self.step, averaged=True))
        found, scored = self.evaluation.measure(self.pool, self.scorer, self.student, "evaluation")
        metrics |= found | self._drift(scored)
        metrics["time/evaluate"] = time.perf_counter() - started
        self.run.evaluated(self.step, metrics, scored)

    def _drift(self, scored: Sequence[Scored]) -> Metrics:
        groups = [group.sample.group for group in scored[:COMPARED]]
        plan = next(iter(self.teachers.values()))
        drawn = self.pool.generate(groups, [plan] * len(groups))
        teacher = sorted(drawn, key=lambda sample: sample.group.group)
        student = [group.sample for group in scored[:COMPARED]]
        drift = statistics_drift(self._media(student), self._media(teacher))
        return {f"drift/{name}": value for name, value in drift.items()}

    def _media(self, samples: Sequence[Sampled]) -> np.ndarray:
        return np.concatenate([self.fetch(sample.media) for sample in samples])

    def _check_forward(self) -> Metrics:
        """Refuse to train when the learner's forward is not what the sampler draws.

        Raises:
            MismatchError: with the difference.
        """
        s = self.schedule
        groups = groups_for(
            self.evaluation.prompts, seed=s.seed, step=EVALUATION_STEP, count=CHECKED, size=1
        )
        samples = sorted(
            self.pool.generate(groups, [self.student] * len(groups)),
            key=lambda sample: sample.group.group,
        )
        items = [
            TeacherItem(sample.replay, 1, 1 / CHECKED, sample.group.prompt, sample.group.columns)
            for sample in samples
        ]
        table = self.learner.replay(items)
        order = np.argsort(table["seed"])
        drawn = [self.fetch(sample.replay) for sample in samples]
        inference = np.concatenate([replay.final for replay in drawn])
        seeds = np.concatenate([replay.seeds for replay in drawn])
        found = mismatch(table["sample"][order], inference[np.argsort(seeds)], s.dtype)
        if not found["mismatch/agrees"]:
            raise MismatchError(
                f"the learner's forward and the sampler differ by {found['mismatch/max']:.3g} on the "
                f"same draws (tolerance {found['mismatch/tolerance']:.3g}): grid, time convention or "
                "weights are not the same on both sides"
            )
        return {name: value for name, value in found.items() if name != "mismatch/agrees"}
