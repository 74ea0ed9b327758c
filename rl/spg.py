"""SPG, sandwiched policy gradient (arXiv 2510.09541).

    A_j = R_j - mean of the group
    l_j = ELBO_j / L_j                                                     if A_j > 0
          omega EUBO_j / L_j + (1 - omega) ELBO_j / L_j                    else
    loss = -sum_j L_j A_j l_j / sum_j L_j

What is to become likelier is raised by a lower bound; what is to become unlikelier is pushed down by
something that lies above. No ratio, no clip, no KL: a rollout set is used mu times with new masks in
every pass, and one that older weights drew (``schedule``) as it is. ``negatives`` are the paper's
variants: mix (omega), eubo (omega = 1), elbo (omega = 0), and zero (negatives dropped). EUBO with b < L
is a surrogate of an upper bound, see ``rl/bounds.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks, block_masks, elbo, eubo, exact_k_masks
from rl.text import TextAlgorithm, TextSettings
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class SPGConfig(TextSettings, frozen=True, extra="forbid"):
    """SPG: a lower bound for what is rewarded, (nearly) an upper one for what is not."""

    kind: Literal["spg"] = "spg"
    epochs: int = Field(default=4, ge=1, description="mu, passes over a rollout set.")
    negatives: Literal["mix", "eubo", "elbo", "zero"] = Field(
        default="mix", description="What samples of negative advantage are pushed down by."
    )
    omega: float = Field(default=0.5, ge=0, le=1, description="Share of the EUBO in the mix.")
    b: float = Field(default=1.5, ge=1, description="Exponent of the EUBO (1.0 for Sudoku).")
    draws: int = Field(default=2, ge=1, description="Masks per completion and pass.")
    masking: Literal["random", "block"] = Field(
        default="block", description="As decoding by blocks sees it, or a uniform subset."
    )
    context_dropout: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="block: hidden share of the prompt and earlier tokens.",
    )
    kl_coefficient: float = Field(default=0.0, ge=0, le=0, description="0: SPG has no KL.")


class SPG(TextAlgorithm):
    """See the module."""

    def __init__(self, config: SPGConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.spg = config
        self.draws = config.draws

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """Block-wise or uniform."""
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        prompt, config = len(completions.prompt), self.spg
        if config.masking == "random":
            return exact_k_masks(length, window, prompt, config.draws, generator)
        block, dropout = self.sampler.block_length, config.context_dropout
        return block_masks(length, window, prompt, config.draws, generator, block, dropout)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """``-A l``, per token."""
        lower = elbo(log_probs, batch.scale) / batch.lengths
        raised, covered = eubo(log_probs, batch.scored, batch.scale, self.spg.b)
        upper = raised / covered.clamp(min=1)
        omega = {"mix": self.spg.omega, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[self.spg.negatives]
        below = omega * upper + (1 - omega) * lower
        if self.spg.negatives == "zero":
            below = torch.zeros_like(below)
        bound = torch.where(batch.advantages > 0, lower, below)
        return -batch.advantages * bound, {"eubo": upper}
