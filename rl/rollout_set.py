"""A scored rollout set becomes optimiser steps: advantages, weights, what is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl.algorithm import Algorithm
from rl.contracts import Metrics, Scored
from rl.items import Item


def optimiser_steps(
    scored: Sequence[Scored],
    weights: Mapping[str, float],
    algorithm: Algorithm[Any],
    step: int,
    share: float = 1.0,
) -> tuple[list[list[Item]], Metrics]:
    """The items of every optimiser step of a rollout set, and the rewards' metrics.

    Groups are dealt to ``minibatches`` and repeated for ``epochs``; a step that only distils (DiPOD's
    alternating form) takes all groups ``dipod.steps`` times. Losses are means over all scored samples
    of a minibatch; a group that would add exactly 0 to it is not sent and only counted in the
    denominator. A step left without items is no optimiser step. ``share``: of an optimiser step that
    ``scored`` is, where it is a part of a set.
    """
    config = algorithm.config
    rewards = {
        name: np.stack([group.scores[name].values for group in scored]) for name in scored[0].scores
    }
    advantages = algorithm.advantages(rewards, weights)
    informative = [bool(np.nan_to_num(row).any()) for row in advantages]
    metrics: Metrics = {"zero_std_ratio": 1 - float(np.mean(informative))}
    for name, values in rewards.items():
        metrics |= _reward_metrics(name, values, sum(len(g.scores[name].failures) for g in scored))
    if config.dipod is not None and config.dipod.distils(step):
        metrics["distilled"] = 1.0
        only = [
            _items(scored, advantages, algorithm, e, 1.0, 0.0) for e in range(config.dipod.steps)
        ]
        return [items for items in only if items], metrics
    joint = config.dipod is not None and config.dipod.form == "joint"
    coefficient = config.dipod.coefficient if config.dipod is not None and joint else 0.0
    steps = [
        _items(
            scored[part :: config.minibatches],
            advantages[part :: config.minibatches],
            algorithm,
            epoch,
            coefficient,
            share,
        )
        for epoch in range(config.epochs)
        for part in range(config.minibatches)
    ]
    return [items for items in steps if items], metrics


def _items(
    scored: Sequence[Scored],
    advantages: np.ndarray,
    algorithm: Algorithm[Any],
    epoch: int,
    distillation: float,
    policy: float,
) -> list[Item]:
    """Items of one optimiser step; ``policy`` and ``distillation`` weigh the two parts of the loss."""
    valid = np.isfinite(advantages)
    samples = [group.sample for group in scored]
    shares = policy * algorithm.shares(samples, valid)
    distilled = distillation * algorithm.distillation_shares(samples, valid)
    always = algorithm.constant_groups or algorithm.config.kl_coefficient > 0
    keep = distillation > 0 or (policy > 0 and always)
    items: list[Item] = []
    for i, sample in enumerate(samples):
        row = np.nan_to_num(advantages[i])
        if row.any() or (keep and valid[i].any()):
            items.append(
                Item(
                    replay=sample.replay,
                    evaluations=algorithm.evaluations(sample),
                    prompt=sample.group.prompt,
                    advantages=row,
                    weights=shares[i],
                    distillation=distilled[i],
                    epoch=epoch,
                )
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
