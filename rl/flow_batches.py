"""From scored groups to the micro-batches of a learner rank.

The driver only handles small records: references to transitions, a number per sample. A rank
fetches what is its own and cuts it into micro-batches of a fixed number of network evaluations,
padded with weight 0: all ranks run equally many, and shapes never depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.items import Item
from rollout.draws import keyed_generator
from rollout.flow_sampler import Transitions
from rollout.policies.base import FlowPolicy


@dataclass(frozen=True)
class FlowBatch:
    """A micro-batch of transitions, as tensors on the policy's device.

    Shapes: ``x`` (n, C, F, H, W); ``condition`` (n, ...); ``index``, ``sigma``, ``sigma_next``,
    ``g`` (n,); ``x_next`` (m, C, F, H, W); ``node`` (m,) the row of ``x`` a branch leaves;
    ``log_prob``, ``advantages``, ``weights`` (m,). Further nodes may be noised clean samples, for a
    flow-matching loss: ``clean`` (c, C, F, H, W) the velocity ``eps - x0`` that they were made with,
    ``clean_node`` (c,) and ``clean_weights`` (c,).
    """

    x: Tensor
    condition: Tensor
    index: Tensor
    sigma: Tensor
    sigma_next: Tensor
    g: Tensor
    x_next: Tensor
    node: Tensor
    log_prob: Tensor
    advantages: Tensor
    weights: Tensor
    clean: Tensor
    clean_node: Tensor
    clean_weights: Tensor


def micro_batches(
    policy: FlowPolicy,
    items: Sequence[Item],
    fetch: Callable[[Any], Transitions],
    size: int,
    count: int,
    noised: int = 0,
) -> Iterator[FlowBatch]:
    """Exactly ``count`` micro-batches of ``size`` nodes over ``items``, the rest padding.

    Padding rows have no branches and padding micro-batches weight 0, so a rank with less work (or
    none) runs the same forwards as the others and adds nothing. ``noised`` further nodes per sample
    are its final state at a random time, keyed by the sample and the epoch.
    """
    if not items:
        yield from [_padding(policy, size)] * count
        return
    parts = [_arrays(item, fetch(item.replay), noised) for item in items]
    offsets = np.cumsum([0, *[len(part["x"]) for part in parts]])
    owner = np.repeat(np.arange(len(parts)), np.diff(offsets))
    joined = {
        name: np.concatenate(
            [
                p[name] + (o if name in LINKS else 0)
                for p, o in zip(parts, offsets[:-1], strict=True)
            ]
        )
        for name in parts[0]
    }
    prompts = [item.prompt for item in items]
    total = int(offsets[-1])
    for start in range(0, count * size, size):
        if start >= total:
            yield _padding(policy, size)
            continue
        rows = np.arange(start, start + size)
        rows = np.where(rows < total, rows, start)
        arrays = {name: joined[name][rows] for name in NODES}
        for link, names in LINKS.items():
            inside = (joined[link] >= start) & (joined[link] < start + size)
            chosen = np.flatnonzero(inside)
            arrays |= {name: joined[name][chosen] for name in names}
            arrays[link] = joined[link][chosen] - start
        yield FlowBatch(
            condition=policy.encode([prompts[i] for i in owner[rows]]),
            **{name: torch.from_numpy(v).to(policy.device) for name, v in arrays.items()},
        )


NODES = ("x", "index", "sigma", "sigma_next", "g")
# What belongs to a branch or to a noised sample, by the array that says at which node it is.
LINKS = {
    "node": ("x_next", "log_prob", "advantages", "weights"),
    "clean_node": ("clean", "clean_weights"),
}


def _arrays(item: Item, transitions: Transitions, noised: int) -> dict[str, np.ndarray]:
    """One item's nodes (recorded, then noised), branches and clean velocities."""
    recorded = {name: getattr(transitions, name) for name in NODES}
    extra, velocity = _noised(item, transitions, noised)
    times = len(extra["x"])
    return {
        **{name: np.concatenate([recorded[name], extra[name]]) for name in NODES},
        "node": transitions.node,
        "x_next": transitions.x_next,
        "log_prob": transitions.log_prob,
        "advantages": item.advantages[transitions.member].astype(np.float32),
        "weights": item.weights[transitions.member].astype(np.float32),
        "clean_node": len(recorded["x"]) + np.arange(times),
        "clean": velocity,
        "clean_weights": np.repeat(item.distillation / max(noised, 1), noised).astype(np.float32),
    }


def _noised(
    item: Item, transitions: Transitions, draws: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Nodes at ``(1 - t) x0 + t eps``, ``draws`` per sample, and their velocities ``eps - x0``."""
    clean = torch.from_numpy(transitions.final).repeat_interleave(draws, dim=0)
    times, noises = [clean[:0, 0, 0, 0, 0]], [clean[:0]]
    for seed in transitions.seeds if draws else ():
        generator = keyed_generator(int(seed), "distillation", item.epoch)
        # In (0, 1]: at 0 the SDE step that other nodes take divides by it.
        times.append(1 - torch.rand(draws, generator=generator))
        noises.append(torch.randn((draws, *clean.shape[1:]), generator=generator))
    t, noise = torch.cat(times), torch.cat(noises)
    mix = t.reshape(-1, 1, 1, 1, 1)
    nodes = {
        "x": ((1 - mix) * clean + mix * noise).numpy(),
        "index": np.zeros(len(clean), np.int64),
        "sigma": t.numpy(),
        "sigma_next": t.numpy(),
        "g": np.ones(len(clean), np.float32),
    }
    return nodes, (noise - clean).numpy()


def _padding(policy: FlowPolicy, size: int) -> FlowBatch:
    """A micro-batch with nodes and no branches: the network runs, the loss is an empty sum."""
    device = policy.device
    x = torch.zeros(size, *policy.latent_shape, device=device)
    half = torch.full((size,), 0.5, device=device)
    index = torch.zeros(size, dtype=torch.int64, device=device)
    none = half[:0]
    return FlowBatch(
        x, policy.encode_null(size), index, half, half / 2, half, x[:0], index[:0], none, none, none,
        x[:0], index[:0], none,
    )  # fmt: skip
