"""Noised samples with the velocity of the weights that drew them, cut into a rank's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.items import Item
from rollout.flow import noised_states
from rollout.flow_sampler import Transitions
from rollout.policies.base import FlowPolicy


@dataclass(frozen=True)
class ForwardBatch:
    """A micro-batch of the forward process, as tensors on the policy's device.

    Shapes: ``x`` (n, C, F, H, W) noised states at times ``t`` (n,), ``condition`` (n, ...). The first
    m rows count, the others are padding: ``clean`` (m, C, F, H, W) the samples x0, ``old`` likewise
    their velocity at ``x`` under the weights that drew them, ``advantages`` and ``weights`` (m,).
    """

    x: Tensor
    t: Tensor
    condition: Tensor
    clean: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor


def forward_batches(
    policy: FlowPolicy,
    items: Sequence[Item],
    fetch: Callable[[Any], Transitions],
    size: int,
    count: int,
    sigmas: Sequence[float],
    draws: int,
) -> Iterator[ForwardBatch]:
    """Exactly ``count`` micro-batches of ``size`` states over ``items``, the rest padding.

    Of the states that were drawn for a sample, ``draws`` belong to each pass over the rollout set. A
    rank with less work (or none) runs the same forwards as the others and adds nothing.
    """
    if not items:
        yield from [_padding(policy, size)] * count
        return
    parts = [_rows(item, fetch(item.replay), sigmas, draws) for item in items]
    owner = np.repeat(np.arange(len(parts)), [len(part["x"]) for part in parts])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    total = len(owner)
    for start in range(0, count * size, size):
        if start >= total:
            yield _padding(policy, size)
            continue
        kept = np.arange(start, min(start + size, total))
        rows = np.concatenate([kept, np.full(size - len(kept), start)])
        states = {name: joined[name][rows] for name in ("x", "t")}
        counted = {name: v[kept] for name, v in joined.items() if name not in states}
        yield ForwardBatch(
            condition=policy.encode([items[i].prompt for i in owner[rows]]),
            **{name: v.to(policy.device) for name, v in (states | counted).items()},
        )


def _rows(
    item: Item, replay: Transitions, sigmas: Sequence[float], draws: int
) -> dict[str, Tensor]:
    """One item's states of its pass, sample by sample."""
    final, velocity = torch.from_numpy(replay.final), torch.from_numpy(replay.velocity)
    x, t = noised_states(final, replay.seeds.tolist(), sigmas, velocity.shape[1])
    own = slice(item.epoch * draws, (item.epoch + 1) * draws)
    numbers = {"advantages": item.advantages, "weights": item.weights / draws}
    return {
        "x": x[:, own].flatten(0, 1),
        "t": t[:, own].flatten(),
        "clean": final.repeat_interleave(draws, dim=0),
        "old": velocity[:, own].flatten(0, 1),
        **{
            name: torch.from_numpy(v.astype(np.float32)).repeat_interleave(draws)
            for name, v in numbers.items()
        },
    }


def _padding(policy: FlowPolicy, size: int) -> ForwardBatch:
    """A micro-batch in which nothing counts: the network runs, the loss is an empty sum."""
    x = torch.zeros(size, *policy.latent_shape, device=policy.device)
    t = torch.full((size,), 0.5, device=policy.device)
    return ForwardBatch(x, t, policy.encode_null(size), x[:0], x[:0], t[:0], t[:0])
