"""Where a step's teacher samples come from: workers that draw ahead of the learner, or a store.

Either way they are a function of (seed, step), and no more than a few are in memory at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from distill.contracts import TeacherItem
from distill.store import TeacherStore
from rl.contracts import Metrics, RolloutPool, Sampled
from rollout.draws import Group, Prompt, groups_for, keyed_generator
from rollout.flow import FlowPlan

# Facts of a step that the metrics tell: forwards spent, and seconds of the workers.
Spent = tuple[int, float]


class Source(Protocol):
    """Gives the items of steps, in order."""

    def take(self, step: int) -> tuple[list[Any], Spent]:
        """The items of ``step``, and what drawing them took."""
        ...

    def observe(self, columns: Mapping[str, np.ndarray]) -> Metrics:
        """Learn from the table of the step that was taken last; what there is to tell."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resume needs beside (seed, step)."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        ...


class Stateless:
    """A source that is a function of (seed, step)."""

    def observe(self, columns: Mapping[str, np.ndarray]) -> Metrics:
        """Nothing to learn."""
        return {}

    def state(self) -> dict[str, Any]:
        """None."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


class StreamedTeacher(Stateless):
    """Workers draw while the learner trains.

    A pool has so many jobs in flight as its workers can queue, which bounds both the memory and how
    far they run ahead. A stream ends where ``until`` says that the pool is needed for something else.
    """

    def __init__(
        self,
        pool: RolloutPool,
        plan: FlowPlan,
        groups: Callable[[int], list[Group]],
        until: Callable[[int], int],
    ) -> None:
        """``groups(step)``: a step's draws. ``until(step)``: first step not in a stream from it."""
        self._pool, self._plan, self._groups, self._until = pool, plan, groups, until
        self._stream: Iterator[Sampled] = iter(())
        self._found: dict[int, list[Sampled]] = defaultdict(list)
        self._end = 0

    def take(self, step: int) -> tuple[list[TeacherItem], Spent]:
        """See ``Source``. A group that its data made impossible is missing."""
        wanted = len(self._groups(step))
        if step >= self._end:
            self._end = self._until(step)
            groups = [group for s in range(step, self._end) for group in self._groups(s)]
            self._stream = self._pool.generate(groups, [self._plan] * len(groups))
        while len(self._found[step]) < wanted:
            sample = next(self._stream, None)
            if sample is None:
                break
            self._found[sample.group.step].append(sample)
        if step + 1 == self._end:
            for sample in self._stream:  # the pool's own end: its checks, its log
                self._found[sample.group.step].append(sample)
        samples = sorted(self._found.pop(step, []), key=lambda sample: sample.group.group)
        spent = (sum(s.forwards for s in samples), sum(s.seconds for s in samples))
        share = 1 / max(1, sum(s.group.size for s in samples))
        items = [
            TeacherItem(s.replay, s.group.size, share, s.group.prompt, s.group.columns)
            for s in samples
        ]
        return items, spent


class StoredTeacher(Stateless):
    """Groups of a store, through keyed permutations of it, one an epoch."""

    def __init__(self, store: TeacherStore, seed: int, count: int) -> None:
        self._store, self._seed, self._count = store, seed, count

    def take(self, step: int) -> tuple[list[TeacherItem], Spent]:
        """See ``Source``. Ranks read the samples themselves."""
        size = len(self._store)
        places: list[int] = []
        for slot in range(self._count):
            epoch, position = divmod(step * self._count + slot, size)
            generator = keyed_generator(self._seed, "store order", epoch)
            places.append(int(torch.randperm(size, generator=generator)[position]))
        references = [self._store.reference(place) for place in places]
        share = 1 / sum(reference.rows for reference in references)
        return [TeacherItem(r, r.rows, share, None, {}) for r in references], (0, 0.0)


def draws_of(
    prompts: Sequence[Prompt], seed: int, count: int, size: int
) -> Callable[[int], list[Group]]:
    """The groups of a step, a function of (seed, step)."""
    return lambda step: groups_for(prompts, seed=seed, step=step, count=count, size=size)
