"""From items to micro-batches: every rank the same number, padded with rows of weight 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.contracts import TeacherItem
from distill.real_data import RealSamples
from distill.store import StoredGroup, initial_noise
from rollout.policies.base import FlowPolicy


@dataclass(frozen=True)
class TwoStepBatch:
    """A micro-batch of teacher samples, padded with rows of weight 0.

    Attributes:
        condition: (n, tokens, width); ``z``, ``x0``, ``real``: (n, C, F, H, W), the start noise, the
            teacher's sample from it, and the discriminator's real sample.
        weights: (n,), shares in the loss. ``seeds``: of the draws.
    """

    condition: Tensor
    z: Tensor
    x0: Tensor
    real: Tensor
    weights: Tensor
    seeds: tuple[int, ...]


def two_step_batches(
    policy: FlowPolicy,
    items: Sequence[TeacherItem],
    fetch: Callable[[Any], Any],
    size: int,
    count: int,
    real: RealSamples | None,
) -> Iterator[TwoStepBatch]:
    """Exactly ``count`` micro-batches of ``size`` samples over ``items``.

    Args:
        policy: encodes the prompts. fetch: resolves an item's ``replay``.
        real: draws the discriminator's real samples; None: they are the teacher's.
    """
    rows = [row for item in items for row in _rows(policy, item, fetch(item.replay), real)]
    nothing = torch.zeros(policy.latent_shape)
    padding = _Row(policy.encode_null(1)[0].cpu(), nothing, nothing, 0.0, 0)
    for start in range(0, size * count, size):
        part = rows[start : start + size]
        part += [padding] * (size - len(part))
        seeds = tuple(row.seed for row in part)
        device = policy.device
        yield TwoStepBatch(
            condition=torch.stack([row.condition for row in part]).to(device),
            z=initial_noise(np.array(seeds, np.int64), policy.latent_shape).to(device),
            x0=torch.stack([row.x0 for row in part]).to(device),
            real=torch.stack([row.real for row in part]).to(device),
            weights=torch.tensor([row.weight for row in part], device=device),
            seeds=seeds,
        )


@dataclass(frozen=True)
class _Row:
    """One sample."""

    condition: Tensor
    x0: Tensor
    real: Tensor
    weight: float
    seed: int


def _rows(
    policy: FlowPolicy, item: TeacherItem, replay: Any, real: RealSamples | None
) -> Iterator[_Row]:
    prompt, columns = item.prompt, item.columns
    if isinstance(replay, StoredGroup):
        prompt, columns = replay.prompt, replay.columns
    condition = policy.encode([str(prompt)])[0].cpu()
    final = replay.x0 if isinstance(replay, StoredGroup) else replay.final
    for x0, seed in zip(final, replay.seeds, strict=True):
        sample = torch.from_numpy(np.array(x0))
        drawn = sample if real is None else real(columns, int(seed))
        yield _Row(condition, sample, drawn, item.weight, int(seed))
