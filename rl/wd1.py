"""wd1 (arXiv 2507.08838): weighted likelihood, no ratio.

    w+ = softmax over the group of psi A,  w- = softmax of -psi A
    loss = -mean over groups of sum_j (w+_j - w-_j) log p_j / L_j

log p_j is diffu-GRPO's estimate: one forward, completion masked, part of the prompt hidden. With no
ratio there is nothing to compare with, hence no old or reference forward; and rollouts that older
weights drew (``schedule``) are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks, full_masks
from rl.text import TextAlgorithm, TextSettings, per_token_mean
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class WD1Config(TextSettings, frozen=True, extra="forbid"):
    """wd1: likelihood weighted by a softmax of advantages."""

    kind: Literal["wd1"] = "wd1"
    epochs: int = Field(default=4, ge=1, description="mu, passes over a rollout set.")
    psi: float = Field(default=1.0, gt=0, description="Sharpness of the weights.")
    prompt_dropout: float = Field(
        default=0.15, ge=0, lt=1, description="Share of the prompt that is hidden."
    )
    kl_coefficient: float = Field(default=0.0, ge=0, le=0, description="0: wd1 has no KL.")


class WD1(TextAlgorithm):
    """See the module."""

    draws = 1
    bounded = False
    per_token = False

    def __init__(self, config: WD1Config, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.wd1 = config

    def advantages(
        self, rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]
    ) -> np.ndarray:
        """``size (w+ - w-)``: the loss, a mean over all completions, is then the paper's."""
        advantages = super().advantages(rewards, weights)
        positive, negative = (_softmax(self.wd1.psi * sign * advantages) for sign in (1.0, -1.0))
        return np.isfinite(advantages).sum(axis=1, keepdims=True) * (positive - negative)

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """The whole completion."""
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        prompt = len(completions.prompt)
        return full_masks(length, window, prompt, 1, generator, self.wd1.prompt_dropout)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """Weighted mean log-probability of the tokens."""
        return -batch.advantages * per_token_mean(log_probs, batch.scored), {}


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN (a sample without a score) takes no part and stays."""
    shifted = np.exp(
        logits - np.nanmax(np.where(np.isnan(logits), -np.inf, logits), 1, keepdims=True)
    )
    return shifted / np.nansum(shifted, axis=1, keepdims=True)
