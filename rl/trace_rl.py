"""TraceRL (arXiv 2509.06949): token-level PPO along the order in which decoding committed tokens.

    the decode steps of a completion are cut into ``segments`` runs of consecutive steps
    log p_t: one forward per segment, with exactly the tokens visible that were when it began
    loss = sum_j sum_t max(-A rho_t, -A clip(rho_t, 1 +- c)) / sum_j L_j

With as many segments as steps this is the likelihood of the trace itself; fewer is the paper's
shrinkage. The paper's value model is left out: advantages are the group's. What follows the EOS counts
as never visible, though decoding may have committed it before the answer's last tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Table
from rl.bounds import Masks
from rl.text import TextAlgorithm, TextSettings, clipped, per_token_mean
from rl.text_batches import TextBatch
from rollout.masked import Completions, MaskedSamplerConfig


class TraceRLConfig(TextSettings, frozen=True, extra="forbid"):
    """TraceRL: clipped ratios of tokens, each scored with what was visible when it was decoded."""

    kind: Literal["trace_rl"] = "trace_rl"
    clip_range: float = Field(default=0.2, gt=0, lt=1, description="c of the clipped ratio.")
    segments: int = Field(default=4, ge=1, description="Forwards per completion and pass.")


class TraceRL(TextAlgorithm):
    """See the module."""

    bounded = False
    needs_old = True

    def __init__(self, config: TraceRLConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.trace = config
        self.clip_range = config.clip_range
        self.draws = config.segments

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """One input a segment: hidden is what it and later ones committed, scored what it did."""
        length = int(completions.lengths[member])
        steps = torch.from_numpy(completions.decode_step[member]).long()
        # Steps that committed nothing of the completion itself (only what follows its EOS) are none.
        ranks = torch.unique(steps[:length], return_inverse=True)[1]
        segment = torch.full_like(steps, self.draws)
        segment[:length] = ranks * self.draws // (int(ranks.max()) + 1)
        numbers = torch.arange(self.draws)[:, None]
        return Masks(
            hidden=segment >= numbers,
            scored=segment == numbers,
            scale=torch.ones(self.draws),
            prompt=torch.zeros(self.draws, len(completions.prompt), dtype=torch.bool),
        )

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
            table["kl"] = per_token_mean(0.5 * (log_probs - reference).square(), batch.scored)
            losses = losses + self.config.kl_coefficient * 0.5 * (log_probs - reference).square()
        return per_token_mean(losses, batch.scored), table
