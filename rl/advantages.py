"""Advantages from rewards: compared inside a group, scaled by the group or by the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

EPSILON = 1e-4
CONSTANT = 1e-6


class AdvantageConfig(BaseModel, frozen=True, extra="forbid"):
    """How rewards become advantages."""

    baseline: Literal["group", "none"] = Field(
        default="group",
        description="Subtract the group's mean; none weighs samples by the reward itself.",
    )
    std: Literal["group", "global", "none"] = Field(
        default="global",
        description="Divide by the group's standard deviation, the whole batch's, or nothing.",
    )
    clip: float = Field(default=5.0, gt=0, description="Advantages are clamped to +- this.")


def group_advantages(
    rewards: Mapping[str, np.ndarray], weights: Mapping[str, float], config: AdvantageConfig
) -> np.ndarray:
    """``A = (R - mean_group) / (std + 1e-4)``, clamped; several rewards are normalised singly.

    Without a baseline nothing is subtracted, with ``std: none`` nothing divided.

    Every reward is normalised inside its groups before the weighted sum, so that no reward's scale
    decides (the weights do). The standard deviation is the unbiased one. A group whose scores are
    all equal gives exactly 0.

    Args:
        rewards: name to scores (groups, size); NaN is a sample without a score.
        weights: name to weight; a name that is missing or has weight 0 is only watched.
        config: scaling.

    Returns:
        fp64 (groups, size). A sample without a score in any weighted reward has NaN: it is masked,
        and takes no part in its group's statistics.
    """
    total: np.ndarray | None = None
    for name, scores in rewards.items():
        if weight := weights.get(name, 0.0):
            part = weight * _normalised(scores, config)
            total = part if total is None else total + part
    if total is None:
        raise ValueError("no reward has a weight other than 0: there is nothing to train on")
    return np.clip(total, -config.clip, config.clip)


def _normalised(scores: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    counts = np.isfinite(scores).sum(axis=1, keepdims=True)
    filled = np.where(np.isfinite(scores), scores, 0.0)
    means = filled.sum(axis=1, keepdims=True) / np.maximum(counts, 1)
    centred = np.where(np.isfinite(scores), scores - means, np.nan)
    # Rounding in the mean would otherwise give a constant group a direction.
    spread = np.nanmax(np.abs(np.where(counts > 0, centred, 0.0)), axis=1, keepdims=True)
    centred = np.where(
        (spread <= CONSTANT * (1 + np.abs(means))) & (counts > 0), centred * 0, centred
    )
    if config.baseline == "none":
        centred = scores
    if config.std == "none":
        return centred
    if config.std == "group":
        residual = scores - means
        std = np.sqrt(np.nansum(residual**2, axis=1, keepdims=True) / np.maximum(counts - 1, 1))
    else:
        valid = scores[np.isfinite(scores)]
        std = np.std(valid, ddof=1) if len(valid) > 1 else np.zeros(())
    return centred / (std + EPSILON)
