"""FPO on text: PPO with the ELBO in place of the log-likelihood (used as a baseline by DiPOD).

    rho_j = exp(ELBO_j - ELBO_j^old), both from the same masks, in nats over the whole completion
    loss = mean_j max(-A rho, -A clip(rho, 1 +- c))

``0.04 mean(ELBO - ELBO_ref)``, which a release adds as a KL, is none: its gradient lowers every bound.
It is left out; ``kl_coefficient`` is the squared difference (k2), whose gradient is a KL's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks, elbo, exact_k_masks
from rl.text import TextAlgorithm, TextSettings, clipped
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class FPOConfig(TextSettings, frozen=True, extra="forbid"):
    """FPO: sequence-level clipped ratio of ELBOs."""

    kind: Literal["fpo"] = "fpo"
    epochs: int = Field(default=4, ge=1, description="mu, passes over a rollout set.")
    clip_range: float = Field(default=0.5, gt=0, lt=1, description="c of the clipped ratio.")
    draws: int = Field(default=2, ge=1, description="Masks per completion and pass.")


class FPO(TextAlgorithm):
    """See the module."""

    needs_old = True
    per_token = False

    def __init__(self, config: FPOConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.fpo = config
        self.clip_range = config.clip_range
        self.draws = config.draws

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """Uniform subsets."""
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        return exact_k_masks(length, window, len(completions.prompt), self.draws, generator)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """Per completion."""
        present = elbo(log_probs, batch.scale)
        log_ratio = present - elbo(old, batch.scale)
        losses, ratio, outside = clipped(log_ratio, batch.advantages, self.clip_range)
        table: Table = {"ratio": ratio, "clipped": outside.float()}
        if reference is not None:
            table["kl"] = 0.5 * (present - elbo(reference, batch.scale)).square()
            losses = losses + self.config.kl_coefficient * table["kl"]
        return losses, table
