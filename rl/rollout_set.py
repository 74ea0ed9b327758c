"""A scored rollout set becomes optimiser steps: advantages, weights, what is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rl.advantages import group_advantages
from rl.batches import Item
from rl.contracts import Metrics, Scored
from rl.grpo import GRPOConfig


def optimiser_steps(
    scored: Sequence[Scored], weights: Mapping[str, float], config: GRPOConfig
) -> tuple[list[list[Item]], Metrics]:
    """The items of every optimiser step of a rollout set, and the rewards' metrics.

    Groups are dealt to ``minibatches`` and repeated for ``epochs``. The loss of a step is the mean
    over all scored branches of its minibatch; a group with advantages of exactly 0 adds nothing to
    it, so it is not sent (unless a KL wants it) and only counted in the denominator. A step left
    without items is no optimiser step.
    """
    rewards = {
        name: np.stack([group.scores[name].values for group in scored]) for name in scored[0].scores
    }
    advantages = group_advantages(rewards, weights, config.advantages)
    steps = [
        _items(
            scored[part :: config.minibatches],
            advantages[part :: config.minibatches],
            keep_constant=config.kl_coefficient > 0,
        )
        for part in range(config.minibatches)
    ]
    informative = [bool(np.nan_to_num(row).any()) for row in advantages]
    metrics: Metrics = {"zero_std_ratio": 1 - float(np.mean(informative))}
    for name, values in rewards.items():
        metrics |= _reward_metrics(name, values, sum(len(g.scores[name].failures) for g in scored))
    return [items for _ in range(config.epochs) for items in steps if items], metrics


def _items(scored: Sequence[Scored], advantages: np.ndarray, keep_constant: bool) -> list[Item]:
    valid = np.isfinite(advantages)
    branches = sum(
        int(row.sum()) * group.sample.branches for row, group in zip(valid, scored, strict=True)
    )
    items: list[Item] = []
    for group, row, mask in zip(scored, advantages, valid, strict=True):
        row = np.nan_to_num(row)
        if row.any() or (keep_constant and mask.any()):
            sample = group.sample
            items.append(
                Item(sample.transitions, sample.nodes, sample.group.prompt, row, mask / branches)
            )
    return items


def _reward_metrics(name: str, values: np.ndarray, failed: int) -> Metrics:
    finite = values[np.isfinite(values)]
    prefix = f"reward/{name}"
    metrics: Metrics = {f"{prefix}/failed": float(failed)}
    if len(finite) > 1:
        metrics[f"{prefix}/mean"] = float(finite.mean())
        metrics[f"{prefix}/std"] = float(finite.std(ddof=1))
        spreads = [
            row[np.isfinite(row)].std(ddof=1) for row in values if np.isfinite(row).sum() > 1
        ]
        metrics[f"{prefix}/within_group_std"] = float(np.mean(spreads)) if spreads else 0.0
    return metrics
