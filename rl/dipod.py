"""DiPOD (arXiv 2606.13795): self-distillation that keeps the bound of a diffusion policy tight.

    joint:        loss + beta (-sum_j L_j ELBO_j / sum_j L_j)     over *all* rollouts of the batch, where
                  ELBO_j is the per-token bound, from the objective's own masks and forward
    alternating:  every so many steps, one in which the policy is frozen as the teacher and
                  E_{x ~ teacher}[ELBO(x)] is raised for a number of optimiser steps, fresh masks each

For flows the bound is minus the conditional flow-matching loss on own samples,
``mean |v(x_t, t) - (eps - x0)|^2`` with ``x_t = (1 - t) x0 + t eps``. At the optimum of the alternating
form the policy is unchanged and the gap between likelihood and bound is 0. On-policy, the joint term
equals a shift of the baseline, E[(A + beta) grad ELBO]: compare with ``advantages.baseline: none``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class DipodConfig(BaseModel, frozen=True, extra="forbid"):
    """Self-distillation on the policy's own samples."""

    form: Literal["joint", "alternating"] = Field(
        default="joint", description="In every loss, or in steps of its own."
    )
    coefficient: float = Field(default=0.05, gt=0, description="beta of the joint form.")
    every: int = Field(
        default=5, ge=2, description="alternating: each so-maniest step distils, the others do not."
    )
    steps: int = Field(
        default=8, ge=1, description="alternating: optimiser steps of such a step, on all rollouts."
    )
    draws: int = Field(
        default=1,
        ge=1,
        description="Noise or mask draws per sample where the objective's own cannot serve.",
    )

    def distils(self, step: int) -> bool:
        """Whether training step ``step`` only distils."""
        return self.form == "alternating" and step % self.every == self.every - 1
