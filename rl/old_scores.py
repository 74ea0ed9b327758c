"""Scores of completions under the weights that sampled them, for objectives that compare with these.

Whoever trains on a completion later, by weights that are newer, finds here what its ratio is to. The
masks are those of training: keyed by the completion's own seed and the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rl.items import Item
from rl.text import TextAlgorithm
from rollout.masked import MaskedRollout
from rollout.policies.base import MaskedDiffusionPolicy


@torch.no_grad()
def with_old(
    algorithm: TextAlgorithm,
    policy: MaskedDiffusionPolicy,
    rollouts: Sequence[MaskedRollout],
    passes: int,
    size: int,
) -> list[MaskedRollout]:
    """``rollouts`` with ``Completions.old`` of every pass, and the forwards that it took.

    ``size``: network evaluations of a forward; a rank's own, so that shapes are the same.
    """
    scores = torch.stack([_scores(algorithm, policy, rollouts, e, size) for e in range(passes)])
    parts = scores.float().cpu().split([rollout.group.size for rollout in rollouts], dim=1)
    return [
        replace(
            rollout,
            replay=replace(rollout.replay, old=part.numpy()),
            forwards=rollout.forwards + passes * rollout.group.size * algorithm.draws,
        )
        for rollout, part in zip(rollouts, parts, strict=True)
    ]


def _scores(
    algorithm: TextAlgorithm,
    policy: MaskedDiffusionPolicy,
    rollouts: Sequence[MaskedRollout],
    epoch: int,
    size: int,
) -> Tensor:
    """One pass over all completions, (completions, draws, G)."""
    items: list[Item] = []
    for rollout in rollouts:
        none = np.zeros(rollout.group.size)
        items.append(Item(rollout.replay, 0, rollout.group.prompt, none, none, none, epoch))
    completions = sum(rollout.group.size for rollout in rollouts)
    count = -(-completions // (size // algorithm.forwards_per_completion))
    batches = algorithm.batches(policy, items, lambda replay: replay, size, count)
    return torch.cat([algorithm.scores(policy, batch) for batch in batches])
