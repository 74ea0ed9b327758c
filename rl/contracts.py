"""What the loop needs from the processes around it. ``cluster`` implements these, with and without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rewards.calling import Scores
from rl.items import Item
from rollout.draws import Group
from rollout.flow import FlowPlan
from rollout.flow_sampler import FlowSummary
from rollout.guidance.sampler import Method
from rollout.guidance.text import TextBestOfN, TextSMC
from rollout.masked import DecodePlan, TextSummary

Metrics = dict[str, float]
AnyMethod = Method | TextBestOfN | TextSMC


@dataclass(frozen=True)
class GuidancePlan:
    """A group is drawn by an inference-time method; all groups of a call by the same."""

    method: AnyMethod


PlainPlan = FlowPlan | DecodePlan
Plan = PlainPlan | GuidancePlan


@dataclass(frozen=True)
class Sampled:
    """One group after sampling: small facts, and references to the large parts.

    Attributes:
        group: its draws.
        job: which call sampled it; the groups of a call come together.
        replay: what an objective replays (``Transitions``, ``Completions``), or a reference to it.
        media: uint8 (size, F, H, W, C) or texts, or a reference to it.
        summary: small facts of the sampler's kind.
        facts: further numbers that the plan asked for, one a sample of the group.
        forwards: network evaluations that sampling took.
        seconds: the worker's time for it.
        version: the weights that made it.
    """

    group: Group
    job: int
    replay: Any
    media: Any
    summary: FlowSummary | TextSummary
    facts: Mapping[str, tuple[float, ...]]
    forwards: int
    seconds: float
    version: int


@dataclass(frozen=True)
class Scored:
    """A sampled group with the scores of every reward, by name."""

    sample: Sampled
    scores: Mapping[str, Scores]


@dataclass(frozen=True)
class Update:
    """What a learner did in one call.

    Attributes:
        table: the algorithm's columns, a row per branch or completion, all ranks together.
        grad_norms: one per optimiser step, before clipping.
        forwards: network evaluations, ``backwards`` likewise, padding included.
        seconds: per rank, time inside the call.
    """

    table: Mapping[str, Any]
    grad_norms: tuple[float, ...]
    forwards: int
    backwards: int
    seconds: tuple[float, ...]

    @staticmethod
    def joined(updates: Sequence[Update]) -> Update:
        """Of ranks or of calls, one after the other; one without rows may lack columns."""
        columns = {key: None for update in updates for key in update.table}
        return Update(
            table={
                key: np.concatenate([u.table[key] for u in updates if key in u.table])
                for key in columns
            },
            grad_norms=tuple(norm for update in updates for norm in update.grad_norms),
            forwards=sum(update.forwards for update in updates),
            backwards=sum(update.backwards for update in updates),
            seconds=tuple(second for update in updates for second in update.seconds),
        )


class RolloutPool(Protocol):
    """Workers that sample groups."""

    @property
    def restarts(self) -> int:
        """How often a worker was lost or replaced."""
        ...

    def generate(
        self, groups: Sequence[Group], plans: Sequence[Plan], weights: Any = None
    ) -> Iterator[Sampled]:
        """Groups as they complete; one that its data made impossible is dropped and counted.

        They are drawn by published ``weights``, which a worker proves to have before it samples, or
        (None) by those loaded last when their job starts. Threads may call at the same time.
        """
        ...

    def load(self, weights: Any) -> None:
        """Published weights, for all that is drawn without naming any."""
        ...

    def cancel(self) -> None:
        """Draw no more of what was asked for; whoever waits for it gets an error."""
        ...


class Scorer(Protocol):
    """Reward models. Threads may score at the same time."""

    def score(self, samples: Iterable[Sampled], held_out: bool = False) -> list[Scored]:
        """Scores for samples as they come, returned in the draws' order.

        With ``held_out`` the rewards that only evaluation may see are scored too.
        """
        ...

    def cancel(self) -> None:
        """Score no more of what was asked for; whoever waits for it gets an error."""
        ...

    def take_seconds(self) -> float:
        """Time that rewards spent scoring since the last call."""
        ...

    def describe(self, samples: Sequence[Sampled]) -> Metrics:
        """Numbers of a whole evaluation set, ``<reward>/<metric>``."""
        ...


class Learner(Protocol):
    """The ranks that train."""

    def update(self, steps: Sequence[Sequence[Item]]) -> Update:
        """One optimiser step per entry of ``steps``, each over all of its items; the first also over
        what was accumulated."""
        ...

    def accumulate(self, items: Sequence[Item]) -> Update:
        """Gradients of ``items`` for the next optimiser step."""
        ...

    def replay(self, items: Sequence[Item]) -> Mapping[str, Any]:
        """The table of ``items`` under the present weights; trains nothing."""
        ...

    def publish(self, version: int, averaged: bool = False) -> Any:
        """The weights that sample (or the average that is evaluated) as one versioned, checksummed
        blob. The trained ones sample, or weights that follow them (``Algorithm.lags``)."""
        ...


class Run(Protocol):
    """Where results go."""

    def log(self, step: int, metrics: Metrics) -> None:
        """One line of metrics for a finished step."""
        ...

    def evaluated(self, step: int, metrics: Metrics, scored: Sequence[Scored]) -> None:
        """Store an evaluation: numbers, scores by sample, the samples themselves."""
        ...

    def checkpoint(self, step: int) -> None:
        """Make the state after ``step`` durable."""
        ...

    def interrupted(self) -> bool:
        """Whether the user asked to stop after the step at hand."""
        ...
