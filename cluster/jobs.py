"""How a step's work is cut into calls, the same for local and Ray pools.

The cuts depend on the recipe alone, never on how many workers there are or how fast: a call's shapes,
hence its last bits, are the same on one worker and on a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.workers import Record
from distill.compression import ConditionedItem
from distill.contracts import TeacherItem
from rewards.calling import Scores, check_failures
from rewards.catalogue import RewardConfig
from rl.contracts import Sampled, Scored
from rl.items import Item
from rollout.draws import Group

# What a learner rank takes: a record that holds a reference in ``replay``.
AnyItem = Item | TeacherItem | ConditionedItem


def partition(groups: Sequence[Group], batch_size: int) -> list[slice]:
    """Consecutive whole groups of at most ``batch_size`` samples together (one group at least).

    Groups of different steps are in different calls, whatever the range of steps at hand.
    """
    jobs: list[slice] = []
    start = samples = 0
    for position, group in enumerate(groups):
        full = samples + group.size > batch_size or group.step != groups[start].step
        if position > start and full:
            jobs.append(slice(start, position))
            start, samples = position, 0
        samples += group.size
    return [*jobs, slice(start, len(groups))]


def sampled(
    job: int, groups: Sequence[Group], records: Sequence[Record], parts: Sequence[Any]
) -> Iterator[Sampled]:
    """The driver's view of a finished job; ``parts`` alternate replays and media."""
    for position, (group, record) in enumerate(zip(groups, records, strict=True)):
        if record.problem is None and record.summary is not None:
            yield Sampled(
                group=group,
                job=job,
                replay=parts[2 * position],
                media=parts[2 * position + 1],
                summary=record.summary,
                facts=record.facts,
                forwards=record.forwards,
                seconds=record.seconds,
                version=record.version,
            )


def chunked(samples: Iterable[Sampled]) -> Iterator[list[Sampled]]:
    """The groups of each job: what a reward is handed together, whatever finished first."""
    for _, groups in itertools.groupby(samples, key=lambda sample: sample.job):
        yield list(groups)


def chunk_columns(samples: Sequence[Sampled]) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts and reward columns, one entry for each sample."""
    groups = [s.group for s in samples for _ in range(s.group.size)]
    names = sorted({name for group in groups for name in group.columns})
    return (
        [group.prompt for group in groups],
        {name: [group.columns.get(name) for group in groups] for name in names},
    )


def reward_name(config: RewardConfig) -> str:
    """What a reward is called in metrics."""
    return config.name or config.kind


def collect(
    chunks: Sequence[Sequence[Sampled]],
    scores: Mapping[str, Sequence[Scores]],
    configs: Sequence[RewardConfig],
) -> list[Scored]:
    """Scores dealt back to their groups, in the draws' order.

    Raises:
        RewardFailed: a reward failed on a larger share of the samples than it may.
    """
    for config in configs:
        parts = scores[reward_name(config)]
        check_failures(_concatenate(parts), config, reward_name(config))
    scored: list[Scored] = []
    for position, chunk in enumerate(chunks):
        offset = 0
        for sample in chunk:
            span = range(offset, offset + sample.group.size)
            offset += sample.group.size
            own = {name: _part(parts[position], span) for name, parts in scores.items()}
            scored.append(Scored(sample, own))
    return sorted(scored, key=lambda s: s.sample.group.group)


def _concatenate(parts: Sequence[Scores]) -> Scores:
    return Scores(
        values=np.concatenate([part.values for part in parts]),
        failures=tuple(failure for part in parts for failure in part.failures),
        not_scored=sum(part.not_scored for part in parts),
    )


def _part(scores: Scores, span: range) -> Scores:
    values = scores.values[span.start : span.stop]
    failures = tuple(
        replace(f, index=f.index - span.start) for f in scores.failures if f.index in span
    )
    return Scores(values, failures, int(np.isnan(values).sum()) - len(failures))


def place_replays(
    steps: Sequence[Sequence[AnyItem]],
) -> tuple[list[list[AnyItem]], list[Any]]:
    """Items with positions in place of their replays, and each of these once.

    Ray resolves references only where they are arguments themselves.
    """
    places: dict[int, int] = {}
    replays: list[Any] = []
    placed: list[list[AnyItem]] = []
    for items in steps:
        row: list[AnyItem] = []
        for item in items:
            place = places.setdefault(id(item.replay), len(replays))
            if place == len(replays):
                replays.append(item.replay)
            row.append(replace(item, replay=place))
        placed.append(row)
    return placed, replays
