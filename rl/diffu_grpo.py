"""diffu-GRPO (d1, arXiv 2504.12216): token-level PPO on a one-forward estimate of log p.

    log p_t: one forward with the whole completion masked and 15 % of the prompt hidden
    rho_t = exp(log p_t - log p_t^old);  KL_t = exp(r_t) - r_t - 1,  r_t = log p_t^ref - log p_t
    loss = sum_j sum_t [max(-A rho, -A clip(rho, 1 +- c)) + beta KL] / sum_j L_j

Every pass hides another part of the prompt; old and reference see what the present policy sees.
Advantages are not divided by a standard deviation unless the recipe asks (the release divides).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks, full_masks
from rl.text import TextAlgorithm, TextSettings, clipped, per_token_mean
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class DiffuGRPOConfig(TextSettings, frozen=True, extra="forbid"):
    """diffu-GRPO: token-level clipped ratios from one fully masked forward."""

    kind: Literal["diffu_grpo"] = "diffu_grpo"
    epochs: int = Field(default=8, ge=1, description="mu, passes over a rollout set.")
    clip_range: float = Field(default=0.5, gt=0, lt=1, description="c of the clipped ratio.")
    kl_coefficient: float = Field(
        default=0.04, ge=0, description="beta of the k3 KL to the weights before training; 0: none."
    )
    prompt_dropout: float = Field(
        default=0.15, ge=0, lt=1, description="Share of the prompt that is hidden."
    )


class DiffuGRPO(TextAlgorithm):
    """See the module."""

    draws = 1
    bounded = False
    needs_old = True

    def __init__(self, config: DiffuGRPOConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.diffu = config
        self.clip_range = config.clip_range

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """The whole completion."""
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        prompt = len(completions.prompt)
        return full_masks(length, window, prompt, 1, generator, self.diffu.prompt_dropout)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """Means over tokens; the share of a completion is its length."""
        advantages = batch.advantages[:, None, None]
        losses, ratio, outside = clipped(log_probs - old, advantages, self.clip_range)
        table: Table = {
            "ratio": per_token_mean(ratio, batch.scored),
            "clipped": per_token_mean(outside.float(), batch.scored),
        }
        if reference is not None:
            difference = reference - log_probs
            kl = difference.exp() - difference - 1
            losses = losses + self.diffu.kl_coefficient * kl
            table["kl"] = per_token_mean(kl, batch.scored)
        return per_token_mean(losses, batch.scored), table
