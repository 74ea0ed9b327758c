r"""One stochastic step ``t -> s`` of a flow policy: mean and standard deviation, noise to be chosen.

With ``x0_hat = x - t v`` and ``eps_hat = x + (1 - t) v``, two families leave the marginals of an exact
model as they are (up to the step size)::

    finite  mean = (1 - s) x0_hat + sqrt(s^2 - gamma^2) eps_hat,   std = gamma
    SDE     mean = x - v dt + g^2 score dt / 2,                    std = g sqrt(dt)

``gamma = 0`` is the ODE, the ancestral ``gamma^2 = s^2 (1 - ((1 - t) s / ((1 - s) t))^2)`` the posterior
of the memoryless process. ``gamma = s`` (full renoise, what few-step students do) does not keep the
marginals. No scheduler of diffusers offers such a step; every method of this package stands on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.flow import sde_step


class KernelConfig(BaseModel, frozen=True, extra="forbid"):
    """The law of a step."""

    kind: Literal["ode", "ancestral", "renoise", "linear", "psi", "rbf", "flow", "memoryless"] = (
        Field(
            default="ancestral",
            description="ancestral: the posterior. ode: no noise. renoise: all of it. By diffusion "
            "coefficient: linear t, psi t (2 - t), rbf 3 t^2, flow scale sqrt(t / (1 - t)), "
            "memoryless sqrt(2 t / (1 - t)).",
        )
    )
    scale: float = Field(default=0.7, gt=0, le=10, description="Of flow.")

    def at(self, t: float, s: float, largest: float) -> Kernel:
        """The step from ``t`` to ``s``; ``largest`` is the grid's second sigma, which stands for t
        where ``1 / (1 - t)`` would be too large at its start."""
        if self.kind in ("ode", "ancestral", "renoise"):
            return Kernel(t, s, gamma=self._gamma(t, s))
        kept = min(t, largest)
        g = {
            "linear": t,
            "psi": t * (2 - t),
            "rbf": 3 * t * t,
            "flow": self.scale * math.sqrt(kept / (1 - kept)),
            "memoryless": math.sqrt(2 * kept / (1 - kept)),
        }[self.kind]
        return Kernel(t, s, g=g)

    def _gamma(self, t: float, s: float) -> float:
        if self.kind == "ode":
            return 0.0
        if self.kind == "renoise":
            return s
        kept = (1 - t) * s / ((1 - s) * t)
        return s * math.sqrt(max(1 - kept * kept, 0.0))


@dataclass(frozen=True)
class Kernel:
    """A step from ``t`` to ``s``: of the finite family (``gamma``), or of the SDE (``g``)."""

    t: float
    s: float
    gamma: float | None = None
    g: float = 0.0

    @property
    def std(self) -> float:
        """Of the noise that the step injects; 0 at the end of the grid of the finite family."""
        return self.g * math.sqrt(self.t - self.s) if self.gamma is None else self.gamma

    def mean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """The mean (B, ...) of the next state, given states ``x`` (B, ...) and their velocity."""
        if self.gamma is None:
            t, s = (
                torch.full((len(x),), u, dtype=x.dtype, device=x.device) for u in (self.t, self.s)
            )
            return sde_step(x, velocity, t, s, torch.full_like(t, self.g))[0]
        clean, noise = clean_of(x, velocity, self.t), x + (1 - self.t) * velocity
        return (1 - self.s) * clean + math.sqrt(self.s**2 - self.gamma**2) * noise


def clean_of(x: Tensor, velocity: Tensor, t: float) -> Tensor:
    """The prediction ``x0_hat = x - t v``."""
    return x - t * velocity


def travelled_back(x: Tensor, s: float, t: float, noise: Tensor) -> Tensor:
    """A state at ``t > s`` from one at ``s``: ``a x + sqrt(t^2 - (a s)^2) noise``, a = (1-t)/(1-s)."""
    shrink = (1 - t) / (1 - s)
    return shrink * x + math.sqrt(t * t - (s * shrink) ** 2) * noise
