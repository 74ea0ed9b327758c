"""What the GRPO family has in common: options, the loss, and how a rollout set is used.

An algorithm adds two things to it: the *plans* by which groups are drawn (where noise is injected,
hence what is trained) and the *weight* of each timestep in the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rl.advantages import AdvantageConfig
from rl.batches import FlowBatch
from rl.surrogate import Table, clipped_surrogate
from rollout.draws import Group
from rollout.flow import FlowGrid, FlowPlan, TailConfig
from rollout.policies.base import FlowPolicy


class GRPOConfig(BaseModel, frozen=True, extra="forbid"):
    """Options of every member of the family."""

    clip_range: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="c of the clipped ratio: 1e-4 for images, 1e-3 for Wan.",
    )
    kl_coefficient: float = Field(
        default=0.0, ge=0, description="beta of the KL to the weights before training; 0: none."
    )
    advantages: AdvantageConfig = Field(
        default=AdvantageConfig(), description="Rewards to advantages."
    )
    minibatches: int = Field(
        default=1,
        ge=1,
        description="Optimiser steps per rollout set, each on its share of the groups.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over a rollout set.")
    initial_noise: Literal["independent", "shared"] = Field(
        default="independent",
        description="shared: a group starts from one noise, so its rewards differ only by what "
        "the loss credits; the common ODE prefix is computed once.",
    )
    antithetic: bool = Field(
        default=False, description="Injected noise in pairs of opposite sign; needs shared noise."
    )
    tail: TailConfig | None = Field(
        default=None, description="Cheaper steps after the last injection in training rollouts."
    )

    @property
    def on_policy(self) -> bool:
        """Whether every rollout is used once, before anything was updated."""
        return self.minibatches * self.epochs == 1


class GRPO(ABC):
    """An algorithm on a grid. Pure: it holds no state that changes."""

    def __init__(
        self, config: GRPOConfig, grid: FlowGrid, guidance_scale: float, seed: int
    ) -> None:
        self.config = config
        self.grid = grid
        self.guidance_scale = guidance_scale
        self.seed = seed

    @abstractmethod
    def plans(self, step: int, groups: Sequence[Group]) -> list[FlowPlan]:
        """How each group of a step is drawn: a function of (seed, step, group)."""

    def timestep_weights(self, index: Tensor) -> Tensor:
        """The weight of grid indices (m,) in the loss; 1 unless the algorithm says otherwise."""
        return torch.ones_like(index, dtype=torch.float32)

    def loss(self, policy: FlowPolicy, batch: FlowBatch) -> tuple[Tensor, Table]:
        """The micro-batch's part of the loss, and a row for each of its branches."""
        return clipped_surrogate(
            policy,
            batch,
            self.timestep_weights(batch.index[batch.node]),
            guidance_scale=self.guidance_scale,
            clip_range=self.config.clip_range,
            kl_coefficient=self.config.kl_coefficient,
            on_policy=self.config.on_policy,
        )

    def plan(self, indices: Sequence[int]) -> FlowPlan:
        """A plan that injects at ``indices``, with this recipe's variance reduction."""
        return FlowPlan(
            sde_indices=tuple(indices),
            shared_noise=self.config.initial_noise == "shared",
            antithetic=self.config.antithetic,
            tail=self.config.tail,
        )


def first_half(steps: int) -> tuple[int, ...]:
    """The grid indices of the high-noise half, where layout and content are decided."""
    return tuple(range(max(steps // 2, 1)))
