"""DiffusionNFT (arXiv 2509.16117): rewards weigh two flow-matching losses, no likelihood is needed.

    sample x0 by the ODE with theta_old;   r = clip(A / 10 + 1/2, 0, 1),  A clamped to +- 5
    for draws (t, eps) of each sample:     x_t = (1 - t) x0 + t eps
        v+ = b v_theta + (1 - b) v_old,    v- = (1 + b) v_old - b v_theta       (implicit policies)
        x0+- = x_t - t v+-,                w+- = mean|x0+- - x0|                 (no gradient)
    L = 5 / b [r mean(x0+ - x0)^2 / w+  +  (1 - r) mean(x0- - x0)^2 / w-] + 1e-4 mean(v_theta - v_ref)^2
    after each rollout set:  theta_old <- d theta_old + (1 - d) theta,  d = min(.001 n, .5)

Where v_theta = v_old the gradient is A times that of a flow-matching loss: a sample above its group's
mean is imitated, one below is moved away from. 5 is half of the divisor, so that the divisor only
decides where r saturates. n counts optimiser steps of the run, as in the release.

theta_old is what samples, so the sampler also evaluates v_old, at states that it and the learner draw
from the sample's seed (``rollout.flow.noised_states``). The learner's ranks hold no second network;
a sample takes ``draws * epochs + 1`` latents in the rollout set. A rollout that waits (``schedule``)
keeps the v_old of the weights that drew it; there is no ratio to correct. Times are the sigmas of the
sampling grid, the only ones at which the policy is used; the release takes all of them for every
sample.

Guidance: a guided velocity is the policy here as in the GRPO family (it made the samples), on all
sides of the loss. The paper trains and samples without, ``rollout.guidance_scale: 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rl.algorithm import Algorithm, AlgorithmSettings, Table
from rl.contracts import Metrics, Sampled
from rl.items import Item
from rl.metrics import DriftError
from rl.nft_batches import ForwardBatch, forward_batches
from rollout.draws import Group
from rollout.flow import FlowGrid, FlowPlan, per_sample
from rollout.flow_sampler import Transitions
from rollout.policies.base import FlowPolicy

# Below it an error is rounding, and dividing by it would make a gradient of that.
SMALLEST_ERROR = 1e-5
# v_old is data of the loss, not the denominator of a ratio: rounding in it does no harm.
LARGEST_DRIFT = 0.1


class OldPolicyConfig(BaseModel, frozen=True, extra="forbid"):
    """How the weights that sample follow the trained ones."""

    rate: float = Field(
        default=1e-3, ge=0, description="What d grows by per optimiser step; 0: they are the same."
    )
    ceiling: float = Field(default=0.5, ge=0, lt=1, description="What d grows to.")
    flat_steps: int = Field(
        default=0, ge=0, description="Optimiser steps in which d stays 0 before it grows."
    )

    def decay(self, steps: int) -> float:
        """d after ``steps`` optimiser steps of the run."""
        return min(self.rate * max(steps - self.flat_steps, 0), self.ceiling)


class NFTConfig(AlgorithmSettings, frozen=True, extra="forbid"):
    """DiffusionNFT: negative-aware flow matching on the policy's own samples."""

    kind: Literal["nft"] = "nft"
    beta: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="How far the implicit policies lie from the old one; smaller: larger updates.",
    )
    divisor: float = Field(
        default=10.0,
        gt=0,
        description="r = clip(A / divisor + 1/2, 0, 1); twice advantages.clip never saturates.",
    )
    draws: int = Field(
        default=1, ge=1, description="Noised states of a sample in a pass, at different sigmas."
    )
    old_policy: OldPolicyConfig = Field(
        default=OldPolicyConfig(), description="The average of the weights that samples."
    )
    kl_coefficient: float = Field(
        default=1e-4,
        ge=0,
        description="Weight of mean (v - v_ref)^2 to the weights before training; 0: none.",
    )
    dipod: None = Field(default=None, description="null: NFT has flow matching of its own.")


class NFT(Algorithm[NFTConfig]):
    """See the module."""

    lags = True
    constant_groups = True

    def __init__(self, config: NFTConfig, grid: FlowGrid, guidance_scale: float) -> None:
        self.config = config
        self.sigmas = grid.sigmas[:-1]
        self.guidance_scale = guidance_scale

    def plans(self, step: int, groups: Sequence[Group]) -> list[FlowPlan]:
        """ODE, with the velocity at the states of all passes."""
        return [FlowPlan(noised=self.config.draws * self.config.epochs) for _ in groups]

    def evaluation_plan(self, steps: int | None, orders: int = 0) -> FlowPlan:
        """ODE."""
        return FlowPlan(steps=steps)

    def old_decay(self, steps: int) -> float:
        """See ``OldPolicyConfig``."""
        return self.config.old_policy.decay(steps)

    def loss(self, policy: FlowPolicy, batch: ForwardBatch) -> tuple[Tensor, Table]:
        """The weighted sum over the micro-batch's states."""
        config, rows = self.config, slice(len(batch.weights))
        x, t = batch.x[rows], batch.t[rows]
        every = policy.guided_velocity(batch.x, batch.t, batch.condition, self.guidance_scale)
        velocity = every[rows]
        positive, negative = implicit_losses(x, t, batch.clean, velocity, batch.old, config.beta)
        r = preference(batch.advantages, config.divisor)
        losses = config.divisor / 2 * (r * positive + (1 - r) * negative) / config.beta
        table: Table = {}
        if config.kl_coefficient:
            with torch.no_grad(), policy.reference():
                anchor = policy.guided_velocity(
                    batch.x, batch.t, batch.condition, self.guidance_scale
                )
            kl = _mean_square(velocity - anchor[rows])
            losses = losses + config.kl_coefficient * kl
            table["kl"] = kl.detach()
        with torch.no_grad():
            lag = (_mean_square(velocity - batch.old) / _mean_square(batch.old)).sqrt()
        columns = {"positive": positive, "negative": negative, "r": r, "lag": lag, "loss": losses}
        table |= {name: column.detach() for name, column in columns.items()}
        table["weight"] = batch.weights
        return (batch.weights * losses).sum(), table

    def shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """A mean over scored samples; that of a sample is one over its draws."""
        return valid / max(float(valid.sum()), 1.0)

    def distillation_shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """None: there is no DiPOD term."""
        return np.zeros(valid.shape)

    def evaluations(self, sample: Sampled) -> int:
        """The draws of all members."""
        return self.config.draws * sample.group.size

    def batches(
        self,
        policy: FlowPolicy,
        items: Sequence[Item],
        fetch: Callable[[Any], Transitions],
        size: int,
        count: int,
    ) -> Iterator[ForwardBatch]:
        """See ``rl/nft_batches.py``."""
        draws = self.config.draws
        return forward_batches(policy, items, fetch, size, count, self.sigmas, draws)

    def metrics(self, table: Mapping[str, np.ndarray]) -> Metrics:
        """Means over noised states; ``nft/lag`` is |v - v_old| over |v_old|, root mean squares."""
        if len(table["loss"]) == 0:
            return {}
        names = {name: f"nft/{name}" for name in ("positive", "negative", "r", "lag")}
        if "kl" in table:
            names["kl"] = "kl"
        metrics = {key: float(table[name].mean()) for name, key in names.items()}
        weight = float(table["weight"].sum()) or 1.0
        return metrics | {"loss": float((table["weight"] * table["loss"]).sum()) / weight}

    def check_drift(self, table: Mapping[str, np.ndarray], dtype: str) -> Metrics:
        """Before the first update v_theta is v_old, up to rounding in ``dtype``."""
        drift = float(np.quantile(table["lag"], 0.99)) if len(table["lag"]) else 0.0
        if drift > LARGEST_DRIFT:
            raise DriftError(
                f"before the first update rollout and learner predict velocities that differ by "
                f"{drift:.3g} of their size (p99, {dtype}), above {LARGEST_DRIFT:g}. Likely cause: "
                "the rollout weights, prompts or guidance are not the learner's"
            )
        return {"drift/velocity_p99": drift}


def preference(advantages: Tensor, divisor: float) -> Tensor:
    """r in [0, 1]: how much of a sample's loss is the positive policy's."""
    return (advantages / divisor + 0.5).clamp(0, 1)


def implicit_losses(
    x: Tensor, t: Tensor, clean: Tensor, velocity: Tensor, old: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """``mean(x0+- - x0)^2 / w+-`` of the implicit positive and negative policy, (m,) each.

    Args:
        x: (m, ...) states at ``t`` (m,), made from samples ``clean`` (m, ...).
        velocity: v_theta at them, which the gradient goes through; ``old`` (m, ...) is v_old.
        beta: b of the module.
    """
    change = beta * (velocity - old)
    positive, negative = (
        x - per_sample(t, x) * (old + sign * change) - clean for sign in (1.0, -1.0)
    )
    return _by_own_size(positive), _by_own_size(negative)


def _by_own_size(error: Tensor) -> Tensor:
    size = error.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)
    return _mean_square(error) / size


def _mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1)
