"""ESPO (arXiv 2512.03759): sequence-level PPO on the ELBO, per token, with coupled masks.

    rho_j = exp((ELBO_j - ELBO_j^old) / L_j), from pairs of a mask and its complement
    loss = mean_j max(-A rho, -A clip(rho, 1 +- c)) + beta KL_j,  KL_j = (ELBO_j - ELBO_j^ref)^2 / 2 L_j

The KL is the k2 estimate: its gradient is that of the KL between policy and reference.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks, coupled_masks, elbo
from rl.text import TextAlgorithm, TextSettings, clipped
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class ESPOConfig(TextSettings, frozen=True, extra="forbid"):
    """ESPO: per-token ratio of ELBOs from coupled masks."""

    kind: Literal["espo"] = "espo"
    epochs: int = Field(default=4, ge=1, description="mu, passes over a rollout set.")
    clip_range: float = Field(default=0.2, gt=0, lt=1, description="c of the clipped ratio.")
    draws: int = Field(
        default=2, ge=2, multiple_of=2, description="Masks per completion and pass, in pairs."
    )


class ESPO(TextAlgorithm):
    """See the module."""

    needs_old = True
    per_token = False

    def __init__(self, config: ESPOConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.espo = config
        self.clip_range = config.clip_range
        self.draws = config.draws

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """Coupled."""
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        return coupled_masks(length, window, len(completions.prompt), self.draws, generator)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """Per completion."""
        present = elbo(log_probs, batch.scale)
        log_ratio = (present - elbo(old, batch.scale)) / batch.lengths
        losses, ratio, outside = clipped(log_ratio, batch.advantages, self.clip_range)
        table: Table = {"ratio": ratio, "clipped": outside.float()}
        if reference is not None:
            difference = present - elbo(reference, batch.scale)
            table["kl"] = difference.square() / (2 * batch.lengths)
            losses = losses + self.config.kl_coefficient * table["kl"]
        return losses, table
