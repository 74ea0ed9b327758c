"""Random conditioning (RC): a student learns conditions of which there are no pictures.

A pair (x0, c) is noised to x_t = (1 − t) x0 + t ε, t ~ U(0, 1) the noise fraction. With probability

    p(t) = exp(−5 (1 − t)),        p(1) = 1, p(0) = .0067, mean .1987,

c is switched for some condition ĉ of a large pool without pictures: at high noise x_t says little
of x0, and any condition fits it. Teacher and student are both evaluated at (x_t, t, ĉ). Per sample,

    L = λ_distill mean |v_student − v_teacher|² + λ_denoise [ĉ = c] mean |v_student − (ε − x0)|²

means over the elements of the sample; 10 % of the conditions are dropped for guidance.

RC draws pairs and conditions by their base masses. ``Sources.allocated`` draws both by region
(``distill.regions``: ARIA, public as an abstract only; the algorithm is ours) and
``sample_weights`` corrects each draw: pairs by (π/q)^b, default b = 1, so that pictures count as in
RC; switched conditions with their own b, default 0, so that updates go where teacher and student
differ. With both at 1 the expected loss is RC's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, Field

from distill.regions import Regions, RegionsConfig, allocate, check_known, ratios

if TYPE_CHECKING:
    from torch import Tensor


class RandomConditioningConfig(BaseModel, frozen=True, extra="forbid"):
    """How conditions are switched, and what the two losses weigh."""

    rate: float = Field(
        default=5.0, ge=0, description="Of p(t) = exp(-rate (1 - t)), to switch a condition."
    )
    null_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of conditions dropped for guidance."
    )
    denoising_weight: float = Field(
        default=1.0, ge=0, description="Of the loss to the pictures, where a condition was kept."
    )
    distillation_weight: float = Field(
        default=1.0, ge=0, description="Of the loss to the teacher, everywhere."
    )

    def switch_probability(self, t: np.ndarray) -> np.ndarray:
        """p(t) of noise fractions t in [0, 1], any shape."""
        return np.exp(-self.rate * (1 - t))


@dataclass(frozen=True, eq=False)
class Sources:
    """What samples are drawn from: pairs, and the pool that their conditions are part of."""

    pool: Regions
    q: np.ndarray  # (K,) probabilities of switched conditions
    owned: np.ndarray  # (m,) int64: the condition of each pair, as its id in the pool
    pairs: Regions  # the same K regions, over pairs
    q_pairs: np.ndarray  # (K,) probabilities of pairs

    @classmethod
    def plain(cls, pool: Regions, owned: np.ndarray) -> Sources:
        """RC: conditions by their masses, pairs evenly."""
        pairs = pool.take(owned)
        return cls(pool, pool.pi, owned, pairs, pairs.pi)

    @classmethod
    def allocated(
        cls, pool: Regions, owned: np.ndarray, d: np.ndarray, config: RegionsConfig
    ) -> Sources:
        """More of the regions with a large discrepancy d (K,)."""
        pairs = pool.take(owned)
        q, q_pairs = (allocate(regions.pi, d, config) for regions in (pool, pairs))
        return cls(pool, q, owned, pairs, q_pairs)


@dataclass(frozen=True, eq=False)
class Choice:
    """What the samples of a batch are, (B,) each."""

    t: np.ndarray  # fp64 noise fraction
    pair: np.ndarray  # int64: whose picture
    condition: np.ndarray  # int64: ĉ, its id in the pool
    switched: np.ndarray  # bool: ĉ was drawn from the pool
    null: np.ndarray  # bool: ĉ is dropped; belongs to no region when discrepancies are tracked


def choose(
    sources: Sources,
    config: RandomConditioningConfig,
    *,
    seed: int,
    step: int,
    slots: Sequence[int],
) -> Choice:
    """The samples in ``slots`` of a step's global batch, each a function of (seed, step, slot).

    Every rank can hence make the whole batch's choice, or any part of it, without asking others.
    """
    from rollout.draws import keyed_uniform

    def uniforms(stream: str) -> np.ndarray:
        return np.array([keyed_uniform(seed, stream, step, slot) for slot in slots])

    t = uniforms("noise fraction")
    pair = draw_conditions(sources.pairs, sources.q_pairs, uniforms("pair"))
    switched = uniforms("switch") < config.switch_probability(t)
    other = draw_conditions(sources.pool, sources.q, uniforms("condition"))
    condition = np.where(switched, other, sources.owned[pair])
    return Choice(t, pair, condition, switched, uniforms("null") < config.null_dropout)


def draw_conditions(regions: Regions, q: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Ids (B,): the inverse of one distribution function over all conditions at uniforms (B,).

    Condition i of region k has probability m_i · q_k/π_k, which is a region by q and a condition
    inside it by its mass. The pool keeps its own order whatever the regions are, so q = π (and
    K = 1) gives exactly the draws of the masses m alone, i.e. RC's.

    Raises:
        ValueError: q is no distribution over the regions, or wants one without conditions.
    """
    factor = ratios(q, regions.pi)
    if np.isinf(factor).any():
        name = regions.names[int(factor.argmax())]
        raise ValueError(f"region {name!r} is to be drawn but has no conditions")
    cdf = np.cumsum(regions.masses * factor[regions.index])
    last = np.searchsorted(cdf, cdf[-1])
    return np.minimum(np.searchsorted(cdf, uniforms * cdf[-1], side="right"), last)


def correction(pi: np.ndarray, q: np.ndarray, regions: np.ndarray, b: float) -> np.ndarray:
    """(π_k/q_k)^b (B,) of samples of regions k (B,) that were drawn by q (K,) instead of π (K,).

    Raises:
        ValueError: an unknown region, or one that q never draws.
    """
    check_known(regions, len(pi), "region")
    factor = ratios(pi, q)[regions]
    if np.isinf(factor).any():
        raise ValueError(f"region {regions[np.isinf(factor)][0]} is never drawn, yet has samples")
    return factor**b


def weights(corrections: np.ndarray, clip: float) -> np.ndarray:
    """Corrections (B,) of a global batch over their mean, then at most ``clip``.

    What the clip cuts off is not given to others.
    """
    return np.minimum(corrections / corrections.mean(), clip)


def sample_weights(sources: Sources, choice: Choice, config: RegionsConfig) -> np.ndarray:
    """Weights (B,) of the losses of a *global* batch, whose choice every rank knows."""
    pair_regions = sources.pairs.index[choice.pair]
    factors = correction(sources.pairs.pi, sources.q_pairs, pair_regions, config.correction)
    switched = choice.condition[choice.switched]
    factors[choice.switched] *= correction(
        sources.pool.pi, sources.q, sources.pool.index[switched], config.correction_switched
    )
    return weights(factors, config.clip)


def losses(
    student_velocity: Tensor,
    teacher_velocity: Tensor,
    target_velocity: Tensor,
    paired_mask: Tensor,
    config: RandomConditioningConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both losses of each sample, in fp32; the teacher gets no gradient.

    Args:
        student_velocity: (B, ...) at (x_t, t, ĉ).
        teacher_velocity: (B, ...) at the same place.
        target_velocity: (B, ...), ε − x0.
        paired_mask: bool (B,), where the condition was kept.
        config: the weights of the two.

    Returns:
        Loss (B,), and without gradient: distillation (B,), which the tracker wants, and denoising
        (B,), NaN where the condition was switched.

    Raises:
        ValueError: shapes that differ, or a mask that is not bool (B,).
    """
    import torch

    shapes = [tuple(v.shape) for v in (student_velocity, teacher_velocity, target_velocity)]
    if len(set(shapes)) > 1:
        raise ValueError(f"velocities of student, teacher and target differ in shape: {shapes}")
    if paired_mask.shape != student_velocity.shape[:1] or paired_mask.dtype != torch.bool:
        raise ValueError(f"paired_mask must be bool ({shapes[0][0]},)")
    student = student_velocity.float()
    distillation = _mean_square(student, teacher_velocity.detach())
    denoising = _mean_square(student, target_velocity)
    loss = (
        config.distillation_weight * distillation
        + config.denoising_weight * denoising.masked_fill(~paired_mask, 0.0)
    )
    return loss, {
        "distillation": distillation.detach(),
        "denoising": denoising.detach().masked_fill(~paired_mask, float("nan")),
    }


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the elements of each sample, (B,)."""
    return (a - b.float()).square().flatten(1).mean(1)
