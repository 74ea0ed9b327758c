"""What the GRPO family has in common: options, the loss, and how a rollout set is used.

An algorithm adds two things to it: the *plans* by which groups are drawn (where noise is injected,
hence what is trained) and the *weight* of each timestep in the loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rl.algorithm import Algorithm, AlgorithmSettings, Table
from rl.contracts import Metrics, Sampled
from rl.flow_batches import FlowBatch, micro_batches
from rl.items import Item
from rl.metrics import check_drift, flow_metrics
from rl.surrogate import clipped_surrogate
from rollout.flow import FlowGrid, FlowPlan, TailConfig
from rollout.flow_sampler import FlowSummary, Transitions
from rollout.policies.base import FlowPolicy


class GRPOConfig(AlgorithmSettings, frozen=True, extra="forbid"):
    """Options of every member of the family."""

    clip_range: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="c of the clipped ratio: 1e-4 for images, 1e-3 for Wan.",
    )
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

    @abstractmethod
    def indices(self, steps: int) -> tuple[int, ...]:
        """The grid indices that may be trained, on a grid of ``steps``."""


class GRPO(Algorithm[GRPOConfig]):
    """An algorithm on a grid."""

    def __init__(
        self, config: GRPOConfig, grid: FlowGrid, guidance_scale: float, seed: int
    ) -> None:
        self.config = config
        self.grid = grid
        self.guidance_scale = guidance_scale
        self.seed = seed

    def timestep_weights(self, index: Tensor) -> Tensor:
        """The weight of grid indices (m,) in the loss; 1 unless the algorithm says otherwise."""
        return torch.ones_like(index, dtype=torch.float32)

    def plan(self, indices: Sequence[int]) -> FlowPlan:
        """A plan that injects at ``indices``, with this recipe's variance reduction."""
        return FlowPlan(
            sde_indices=tuple(indices),
            shared_noise=self.config.initial_noise == "shared",
            antithetic=self.config.antithetic,
            tail=self.config.tail,
            keep_final=self.config.dipod is not None,
        )

    def evaluation_plan(self, steps: int | None, orders: int = 0) -> FlowPlan:
        """ODE."""
        return FlowPlan(steps=steps)

    def loss(self, policy: FlowPolicy, batch: FlowBatch) -> tuple[Tensor, Table]:
        """The clipped surrogate on the branches, DiPOD's flow-matching loss on noised samples."""
        velocity = policy.guided_velocity(
            batch.x, batch.sigma, batch.condition, self.guidance_scale
        )
        loss, table = clipped_surrogate(
            policy,
            batch,
            velocity,
            self.timestep_weights(batch.index[batch.node]),
            guidance_scale=self.guidance_scale,
            clip_range=self.config.clip_range,
            kl_coefficient=self.config.kl_coefficient,
            on_policy=self.on_policy,
        )
        if self.config.dipod is not None:
            # The guided velocity is the policy: it is what made the samples.
            errors = (velocity[batch.clean_node] - batch.clean).square().flatten(1).mean(1)
            loss = loss + (batch.clean_weights * errors).sum()
        return loss, table

    def shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """A mean over all branches of scored samples."""
        branches = np.array([[self._summary(s).branches] for s in samples])
        return valid / max(float((valid * branches).sum()), 1.0)

    def distillation_shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """A mean over samples."""
        return valid / max(float(valid.sum()), 1.0)

    def evaluations(self, sample: Sampled) -> int:
        """The nodes, and DiPOD's noised samples."""
        return self._summary(sample).nodes + self._noised * sample.group.size

    def batches(
        self,
        policy: FlowPolicy,
        items: Sequence[Item],
        fetch: Callable[[Any], Transitions],
        size: int,
        count: int,
    ) -> Iterator[FlowBatch]:
        """See ``rl/flow_batches.py``."""
        return micro_batches(policy, items, fetch, size, count, self._noised)

    def metrics(self, table: Mapping[str, np.ndarray]) -> Metrics:
        """See ``rl/metrics.py``."""
        return flow_metrics(table)

    def check_drift(self, table: Mapping[str, np.ndarray], dtype: str) -> Metrics:
        """Against a fifth of the clip range."""
        return check_drift(table, self.config.clip_range, dtype)

    @property
    def _noised(self) -> int:
        return self.config.dipod.draws if self.config.dipod is not None else 0

    @staticmethod
    def _summary(sample: Sampled) -> FlowSummary:
        assert isinstance(sample.summary, FlowSummary)
        return sample.summary


def first_half(steps: int) -> tuple[int, ...]:
    """The grid indices of the high-noise half, where layout and content are decided."""
    return tuple(range(max(steps // 2, 1)))
