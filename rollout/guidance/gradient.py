r"""Guidance by the gradient of a differentiable reward: DPS, FreeDoM and NoiseTilt (NTRK).

All three take the step of a kernel, ``x_s = mean + std eta``, and use ``grad = d r(x0_hat(x)) / dx``:

* **DPS** (arXiv 2209.14687) shifts the mean. The shift that keeps the tilted law for a small step is the
  one of a corrected score, ``s' = s + grad / beta``, put into the kernel's own mean; for an SDE that is
  ``(t / (1 - t) + g^2 / 2) dt grad / beta``. The popular ``std^2 grad / beta`` equals it only for the
  memoryless process, and is offered because releases use it.
* **FreeDoM** (arXiv 2303.09833) takes a shift of fixed length and repeats each step after re-noising.
* **NTRK** (NoiseTilt) leaves the mean and tilts the noise, ``eta = sqrt(rho) W(grad) + sqrt(1 - rho) eps``,
  with W a whitening operator, so that eta stays a typical Gaussian sample: the step stays where the
  network was trained. KL to the plain kernel is ``-(N/2) ln(1 - rho)`` a step.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.flow import per_sample
from rollout.guidance.jeffrey import corrected_velocity
from rollout.guidance.kernels import Kernel, KernelConfig, travelled_back
from rollout.guidance.walk import Slope, Walk
from rollout.guidance.whitening import WhiteningConfig, whiten


class GradientGuidance(BaseModel, frozen=True, extra="forbid"):
    """Options of all methods that follow a gradient."""

    differentiable: ClassVar[bool] = True

    kernel: KernelConfig = Field(default=KernelConfig(), description="The law of a plain step.")
    through_network: bool = Field(
        default=True,
        description="Differentiate the prediction of x0 by the state; false takes its Jacobian as the "
        "identity and saves the backward of the network.",
    )
    best_of: int = Field(
        default=1, ge=1, description="Independent samples, of which the best stays."
    )

    def at_budget(self, nfe: int, steps: int) -> Self:
        """As many independent samples as ``nfe`` network evaluations allow, one at least."""
        return self.model_copy(update={"best_of": max(nfe // steps, 1)})


class DPS(GradientGuidance, frozen=True, extra="forbid"):
    """The kernel's mean, shifted along the gradient."""

    kind: Literal["dps"] = "dps"
    beta: float = Field(default=1.0, gt=0, description="Temperature of the tilt exp(r / beta).")
    shift: Literal["consistent", "variance"] = Field(
        default="consistent",
        description="consistent: of a corrected score. variance: std^2 grad / beta.",
    )
    limit: float | None = Field(
        default=1.0,
        gt=0,
        description="Longest shift, in typical lengths of the injected noise (std sqrt(N)): near t = 1 "
        "the consistent factor is huge and a network's gradient is not exact. null: none.",
    )

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        for step in range(walk.steps):
            kernel = walk.kernel(self.kernel, step)
            slope = walk.slope(x, step, rows, self.through_network)
            mean = kernel.mean(x, slope.velocity)
            if self.shift == "variance":
                shift = kernel.std**2 / self.beta * slope.gradient
            else:
                shift = consistent_shift(kernel, x, slope.velocity, slope.gradient / self.beta)
            if self.limit is not None:
                shift = shortened(shift, self.limit * max(kernel.std, kernel.t - kernel.s))
            x = mean + shift + kernel.std * walk.noise(f"guide {step}")
        return x


class FreeDoM(GradientGuidance, frozen=True, extra="forbid"):
    """Normalised steps along the gradient, each repeated after going back in time."""

    kind: Literal["freedom"] = "freedom"
    scale: float = Field(
        default=0.1, gt=0, description="Length of the shift, in lengths of the noise (std sqrt(N))."
    )
    repeats: int = Field(default=2, ge=1, description="Times a step is taken; 1: no time travel.")

    def at_budget(self, nfe: int, steps: int) -> Self:
        """See ``GradientGuidance``."""
        return self.model_copy(update={"best_of": max(nfe // (steps * self.repeats), 1)})

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        for step in range(walk.steps):
            kernel = walk.kernel(self.kernel, step)
            for repeat in range(self.repeats):
                if repeat:
                    back = walk.noise(f"travel {step} {repeat}")
                    x = travelled_back(x, kernel.s, kernel.t, back)
                slope = walk.slope(x, step, rows, self.through_network)
                shift = self.scale * kernel.std * direction(slope.gradient)
                noise = walk.noise(
                    f"guide {step}" if repeat == 0 else f"guide {step} again {repeat}"
                )
                x = kernel.mean(x, slope.velocity) + shift + kernel.std * noise
        return x


class NTRK(GradientGuidance, frozen=True, extra="forbid"):
    """NoiseTilt's reparametrised kernel: the noise leans towards the whitened gradient."""

    kind: Literal["ntrk"] = "ntrk"
    rho: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the noise's energy that the gradient gets (constant), its mean over the "
        "grid (step_invariant), or its cap (capped).",
    )
    schedule: Literal["constant", "step_invariant", "capped"] = Field(
        default="constant",
        description="step_invariant: rho times reference_steps dt, the same total shift on any grid. "
        "capped: min(rho, std^2 |grad|^2 / (beta^2 N)), what a shift of the mean would have.",
    )
    reference_steps: int = Field(default=25, ge=1, description="Of step_invariant.")
    beta: float = Field(default=1.0, gt=0, description="Temperature of capped.")
    whitening: WhiteningConfig = Field(
        default=WhiteningConfig(),
        description="The operator W that makes a gradient look like noise.",
    )

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        for step in range(walk.steps):
            kernel = walk.kernel(self.kernel, step)
            if kernel.std == 0:  # nothing to tilt: a plain step
                x = kernel.mean(x, walk.velocity(x, step, rows))
                continue
            slope = walk.slope(x, step, rows, self.through_network)
            noise = self.noise(slope, walk.noise(f"guide {step}"), kernel.std, kernel.t - kernel.s)
            x = kernel.mean(x, slope.velocity) + kernel.std * noise
        return x

    def noise(self, slope: Slope, plain: Tensor, std: float, dt: float) -> Tensor:
        """eta (M, ...); rows without a usable gradient keep their plain noise."""
        white = whiten(slope.gradient, self.whitening)
        usable = (white != 0).flatten(1).any(1)
        rho = torch.where(usable, self.shares(slope.gradient, std, dt), 0.0)
        return per_sample(rho.sqrt(), plain) * white + per_sample((1 - rho).sqrt(), plain) * plain

    def shares(self, gradient: Tensor, std: float, dt: float) -> Tensor:
        """rho (M,) of a step."""
        constant = torch.full((len(gradient),), self.rho, device=gradient.device)
        if self.schedule == "constant":
            return constant
        if self.schedule == "step_invariant":
            return (constant * self.reference_steps * dt).clamp(max=0.999)
        consistent = std**2 * gradient.flatten(1).square().mean(1) / self.beta**2
        return torch.minimum(constant, consistent)


def kl_to_base(rho: float) -> float:
    """KL of NTRK's kernel to the plain one, a dimension: ``-ln(1 - rho) / 2``."""
    return -math.log1p(-rho) / 2


def consistent_shift(kernel: Kernel, x: Tensor, velocity: Tensor, correction: Tensor) -> Tensor:
    """What correcting the score by ``correction`` does to the mean of a step; nothing at t = 1, where a
    state says nothing of x0."""
    if kernel.t == 1:
        return torch.zeros_like(x)
    corrected = corrected_velocity(velocity, correction, kernel.t)
    return kernel.mean(x, corrected) - kernel.mean(x, velocity)


def direction(gradient: Tensor) -> Tensor:
    """Rows scaled to mean square 1; zero rows stay zero."""
    size = gradient.flatten(1).square().mean(1).sqrt()
    return gradient / per_sample(torch.where(size > 0, size, 1.0), gradient)


def shortened(shift: Tensor, longest: float) -> Tensor:
    """Rows of root mean square at most ``longest``."""
    size = shift.flatten(1).square().mean(1).sqrt()
    return shift * per_sample((longest / size.clamp(min=1e-30)).clamp(max=1.0), shift)
