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

from rollout.flow_sampler import Transitions
from rollout.policies.base import FlowPolicy


@dataclass(frozen=True)
class Item:
    """One group on its way to a learner rank.

    Attributes:
        transitions: ``Transitions``, or a reference to them that the rank resolves.
        nodes: how many network evaluations replaying it takes.
        prompt: the text that the condition is made from.
        advantages: fp64 (size,), one a member; weights: fp64 (size,), share of each member's
            branches in the mean loss of the optimiser step (0: masked).
    """

    transitions: Any
    nodes: int
    prompt: str
    advantages: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class FlowBatch:
    """A micro-batch of transitions, as tensors on the policy's device.

    Shapes: ``x`` (n, C, F, H, W); ``condition`` (n, ...); ``index``, ``sigma``, ``sigma_next``,
    ``g`` (n,); ``x_next`` (m, C, F, H, W); ``node`` (m,) the row of ``x`` a branch leaves;
    ``log_prob``, ``advantages``, ``weights`` (m,).
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


def micro_batches(
    policy: FlowPolicy,
    items: Sequence[Item],
    fetch: Callable[[Any], Transitions],
    size: int,
    count: int,
) -> Iterator[FlowBatch]:
    """Exactly ``count`` micro-batches of ``size`` nodes over ``items``, the rest padding.

    Padding rows have no branches and padding micro-batches weight 0, so a rank with less work (or
    none) runs the same forwards as the others and adds nothing.
    """
    if not items:
        yield from [_padding(policy, size)] * count
        return
    fetched = [fetch(item.transitions) for item in items]
    offsets = np.cumsum([0, *[len(t.x) for t in fetched]])
    owner = np.concatenate([np.full(len(t.x), i) for i, t in enumerate(fetched)])
    nodes = {
        name: np.concatenate([getattr(t, name) for t in fetched])
        for name in ("x", "index", "sigma", "sigma_next", "g")
    }
    branch_node = np.concatenate([t.node + o for t, o in zip(fetched, offsets[:-1], strict=True)])
    branches = {
        "x_next": np.concatenate([t.x_next for t in fetched]),
        "log_prob": np.concatenate([t.log_prob for t in fetched]),
        "advantages": np.concatenate(
            [i.advantages[t.member] for i, t in zip(items, fetched, strict=True)]
        ).astype(np.float32),
        "weights": np.concatenate(
            [i.weights[t.member] for i, t in zip(items, fetched, strict=True)]
        ).astype(np.float32),
    }
    prompts = [item.prompt for item in items]
    total = int(offsets[-1])
    for start in range(0, count * size, size):
        if start >= total:
            yield _padding(policy, size)
            continue
        rows = np.arange(start, start + size)
        rows = np.where(rows < total, rows, start)
        chosen = np.flatnonzero((branch_node >= start) & (branch_node < start + size))
        arrays = {name: value[rows] for name, value in nodes.items()}
        arrays |= {name: value[chosen] for name, value in branches.items()}
        arrays["node"] = branch_node[chosen] - start
        yield FlowBatch(
            condition=policy.encode([prompts[i] for i in owner[rows]]),
            **{name: torch.from_numpy(v).to(policy.device) for name, v in arrays.items()},
        )


def _padding(policy: FlowPolicy, size: int) -> FlowBatch:
    """A micro-batch with nodes and no branches: the network runs, the loss is an empty sum."""
    device = policy.device
    x = torch.zeros(size, *policy.latent_shape, device=device)
    half = torch.full((size,), 0.5, device=device)
    index = torch.zeros(size, dtype=torch.int64, device=device)
    none = half[:0]
    return FlowBatch(
        x, policy.encode_null(size), index, half, half / 2, half, x[:0], index[:0], none, none, none
    )


def share(items: Sequence[Item], ranks: int) -> list[list[Item]]:
    """Items dealt round over ``ranks``, the same for every timing."""
    return [list(items[rank::ranks]) for rank in range(ranks)]


def micro_steps(shares: Sequence[Sequence[Item]], size: int) -> int:
    """Micro-batches that every rank runs: those of the rank with the most nodes."""
    return max(-(-sum(item.nodes for item in part) // size) for part in shares)
