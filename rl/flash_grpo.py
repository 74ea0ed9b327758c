"""Flash-GRPO (arXiv 2605.15980): one trained step per rollout.

    for each prompt: one index k from a pool (the high-noise half), shared by its whole group  (ITG)
        rollouts: Euler ODE steps, but an SDE step at k
    w_k = (1 / lambda_k) / mean over the pool of 1 / lambda                                    (TGR)
    L = mean of max(-w_k A rho, -w_k A clip(rho, 1 +- c)) + beta KL

*Iso-temporal grouping*: advantages compare rollouts, so all rollouts of a group must be credited at
the same timestep. k comes from a hash of (seed, step) and the prompt's place in it, stratified over
the pool: no broadcast, no dependence on ranks or micro-batches.
*Temporal gradient rectification*: |d log_prob / d v| is proportional to lambda(t), an artefact of
the discretisation; dividing by it gives every timestep the same say. lambda is the analytic value
on the run's own grid, and Z the mean over the *pool*: the release's batch mean cancels the weight
whenever a batch holds a single index.

``iso_temporal`` and ``rectification`` off is the paper's naive single step; each is its ablation.
Beyond the paper: shared initial noise, antithetic injections and a shorter tail (see ``rl/grpo.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rl.grpo import GRPO, GRPOConfig, first_half
from rollout.draws import Group, keyed_generator, keyed_uniform
from rollout.flow import FlowGrid, FlowPlan


class FlashGRPOConfig(GRPOConfig, frozen=True, extra="forbid"):
    """Flash-GRPO: one trained step per rollout, with the paper's two corrections as switches."""

    kind: Literal["flash_grpo"] = "flash_grpo"
    pool: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Grid indices k may take; default the first half."
    )
    iso_temporal: bool = Field(default=True, description="ITG: one index per group.")
    rectification: bool = Field(default=True, description="TGR: divide by lambda(t).")

    def indices(self, steps: int) -> tuple[int, ...]:
        """The pool on a grid of ``steps``."""
        return self.pool if self.pool is not None else first_half(steps)


class FlashGRPO(GRPO):
    """See the module."""

    def __init__(
        self, config: FlashGRPOConfig, grid: FlowGrid, guidance_scale: float, seed: int
    ) -> None:
        super().__init__(config, grid, guidance_scale, seed)
        self.pool = config.indices(grid.steps)
        self.iso_temporal = config.iso_temporal
        self.weights = torch.ones(grid.steps)
        if config.rectification:
            self.weights = rectification_weights(grid, self.pool)

    def plans(self, step: int, groups: Sequence[Group]) -> list[FlowPlan]:
        """One index a group; without ITG one a member."""
        if self.iso_temporal:
            indices = stratified_indices(self.pool, self.seed, step, len(groups))
            return [self.plan([k]) for k in indices]
        count = sum(group.size for group in groups)
        indices = iter(stratified_indices(self.pool, self.seed, step, count))
        return [
            FlowPlan(
                member_indices=tuple(next(indices) for _ in range(group.size)),
                shared_noise=self.config.initial_noise == "shared",
                tail=self.config.tail,
                keep_final=self.config.dipod is not None,
            )
            for group in groups
        ]

    def timestep_weights(self, index: Tensor) -> Tensor:
        """w_k, or 1 without rectification."""
        return self.weights.to(index.device)[index]


def rectification_weights(grid: FlowGrid, pool: Sequence[int]) -> Tensor:
    """w_k for every grid index (steps,): the pool's have mean 1, the others are NaN (never used)."""
    inverse = {k: 1 / grid.gradient_scale(k) for k in pool}
    mean = sum(inverse.values()) / len(inverse)
    weights = torch.full((grid.steps,), float("nan"))
    for k, value in inverse.items():
        weights[k] = value / mean
    return weights


def stratified_indices(pool: Sequence[int], seed: int, step: int, count: int) -> list[int]:
    """``count`` indices from ``pool``: each uniform, together as even as ``count`` allows.

    A function of (seed, step) and the place in the step, on every rank and in every micro-batch.
    """
    offset = keyed_uniform(seed, "timestep offset", step)
    order = torch.randperm(count, generator=keyed_generator(seed, "timestep order", step))
    strata = [(int(place) + offset) / count for place in order]
    return [pool[min(int(u * len(pool)), len(pool) - 1)] for u in strata]
