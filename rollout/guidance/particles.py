r"""Sequential Monte Carlo: FK steering and DAS, which sample the tilted law as particles grow in number.

A row has particles with log-weights. When their effective number falls below half of them they are
resampled, systematically; without resampling log-weights accumulate.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.guidance.gradient import consistent_shift, shortened
from rollout.guidance.kernels import KernelConfig
from rollout.guidance.walk import Walk

Potential = Literal["diff", "max", "add"]


class ParticleGuidance(BaseModel, frozen=True, extra="forbid"):
    """Options of both."""

    best_of: ClassVar[int] = 1

    kernel: KernelConfig = Field(default=KernelConfig(), description="The law of a plain step.")
    particles: int = Field(default=4, ge=1, description="States a row.")
    beta: float = Field(default=1.0, gt=0, description="Temperature of the tilt exp(r / beta).")
    select: Literal["best", "sample"] = Field(
        default="best",
        description="What comes out: the particle of the best reward, or one drawn by weight.",
    )

    def at_budget(self, nfe: int, steps: int) -> Self:
        """So many particles as ``nfe`` network evaluations allow, one at least."""
        return self.model_copy(update={"particles": max(nfe // steps, 1)})


class SMC(ParticleGuidance, frozen=True, extra="forbid"):
    """FK steering (arXiv 2501.06848): plain steps, weighted by potentials of the predicted reward."""

    differentiable: ClassVar[bool] = False

    kind: Literal["smc"] = "smc"
    potential: Potential = Field(
        default="diff",
        description="diff: exp((r_k - r_{k-1}) / beta). max, add: of the largest, or the sum, of the "
        "rewards so far; the last potential makes the product exp(r / beta) for all three.",
    )

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        rows = walk.rows(self.particles)
        x = walk.start(self.particles)
        cloud = Cloud(walk, self.particles)
        history = torch.zeros(0, len(rows), dtype=torch.float64)
        paid = torch.zeros(len(rows), dtype=torch.float64)
        for step in range(walk.steps):
            velocity = walk.velocity(x, step, rows)
            scores = walk.scores(walk.clean(x, velocity, step), rows)
            history = torch.cat([history, scores[None]])
            paid = paid + cloud.weigh(log_potential(self.potential, history) / self.beta)
            kept = cloud.resampled(step)
            x, velocity, history, paid = x[kept], velocity[kept], history[:, kept], paid[kept]
            kernel = walk.kernel(self.kernel, step)
            x = kernel.mean(x, velocity) + kernel.std * walk.noise(f"guide {step}", self.particles)
        scores = walk.scores(x, rows)
        cloud.weigh(scores / self.beta - paid)
        return x[cloud.chosen(scores, self.select)]


class DAS(ParticleGuidance, frozen=True, extra="forbid"):
    """Tempered SMC whose proposals follow the gradient (arXiv 2501.05803).

    The reward counts ``2^(k/N) - 1`` at step k, 1 at the end. A proposal is the kernel of a corrected
    score (see ``DPS``); its weight holds the ratio of the plain kernel to it, so any shift is exact.
    """

    differentiable: ClassVar[bool] = True

    kind: Literal["das"] = "das"
    limit: float = Field(
        default=0.3, gt=0, description="Longest shift of a proposal, in lengths of its noise."
    )
    through_network: bool = Field(
        default=True, description="Differentiate the prediction of x0 by the state."
    )

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        rows = walk.rows(self.particles)
        x = walk.start(self.particles)
        cloud = Cloud(walk, self.particles)
        paid = torch.zeros(len(rows), dtype=torch.float64)
        for step in range(walk.steps):
            temper = (2 ** (step / walk.steps) - 1) / self.beta
            slope = walk.slope(x, step, rows, self.through_network)
            paid = paid + cloud.weigh(temper * slope.potential - paid)
            kept = cloud.resampled(step)
            x, velocity, paid = x[kept], slope.velocity[kept], paid[kept]
            kernel = walk.kernel(self.kernel, step)
            noise = walk.noise(f"guide {step}", self.particles)
            mean = kernel.mean(x, velocity)
            if kernel.std == 0:
                x = mean
                continue
            shift = consistent_shift(kernel, x, velocity, temper * slope.gradient[kept])
            shift = shortened(shift, self.limit * kernel.std) / kernel.std
            ratio = -(shift.square() / 2 + shift * noise).flatten(1).double().sum(1).cpu()
            cloud.weigh(ratio)
            x = mean + kernel.std * (shift + noise)
        scores = walk.scores(x, rows)
        cloud.weigh(scores / self.beta - paid)
        return x[cloud.chosen(scores, self.select)]


class Cloud:
    """Log-weights of the particles of every row; fp64, on the CPU."""

    def __init__(self, walk: Walk, particles: int) -> None:
        self.walk, self.particles = walk, particles
        self.log_weights = torch.zeros(len(walk.samples), particles, dtype=torch.float64)

    def weigh(self, log_factor: Tensor) -> Tensor:
        """Multiply the weights by exp of (rows x particles,) factors, which are returned."""
        self.log_weights += log_factor.view_as(self.log_weights)
        return log_factor

    def resampled(self, step: int) -> Tensor:
        """The particle that each slot continues from; weights of resampled rows become equal."""
        kept = torch.arange(self.particles).repeat(len(self.walk.samples), 1)
        for row, draw in enumerate(self.walk.draws):
            weights = normalised(self.log_weights[row])
            if effective(weights) < self.particles / 2:
                u = torch.rand(1, generator=draw.generator(f"resample {step}"), dtype=torch.float64)
                kept[row] = systematic(weights, float(u))
                self.log_weights[row] = 0.0
        return (kept + torch.arange(len(kept))[:, None] * self.particles).flatten()

    def chosen(self, scores: Tensor, select: str) -> Tensor:
        """One particle of each row: of the best score, or drawn by weight."""
        offsets = torch.arange(len(self.walk.samples)) * self.particles
        if select == "best":
            return scores.view_as(self.log_weights).argmax(1) + offsets
        places = [
            torch.multinomial(normalised(weights), 1, generator=draw.generator("select"))
            for weights, draw in zip(self.log_weights, self.walk.draws, strict=True)
        ]
        return torch.cat(places) + offsets


def log_potential(kind: Potential, history: Tensor) -> Tensor:
    """The exponent (M,) of an intermediate potential at temperature 1, from rewards so far (k, M).

    Their product over a path is ``exp(r_k)`` for diff; the caller divides what was paid out of the
    last one, which makes it so for the others.
    """
    if kind == "diff":
        return history[-1] - history[-2] if len(history) > 1 else history[-1]
    return history.max(0).values if kind == "max" else history.sum(0)


def normalised(log_weights: Tensor) -> Tensor:
    """Weights (P,) that sum to 1; equal ones where all are impossible."""
    if not bool((log_weights > -torch.inf).any()):
        return torch.full_like(log_weights, 1 / len(log_weights))
    return log_weights.softmax(0)


def effective(weights: Tensor) -> float:
    """The effective number of particles, 1 / sum w^2."""
    return float(1 / weights.square().sum())


def systematic(weights: Tensor, u: float) -> Tensor:
    """Systematic resampling: the particle (P,) of each of the points ``(u + i) / P``."""
    count = len(weights)
    points = (torch.arange(count, dtype=torch.float64) + u) / count
    return torch.searchsorted(weights.cumsum(0), points).clamp(max=count - 1)
