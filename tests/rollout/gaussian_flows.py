"""Flow policies whose velocity is known exactly, and rewards on their states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rollout.draws import Group
from rollout.flow import shifted_sigmas
from rollout.flow_sampler import FlowSamplerConfig
from rollout.guidance.kernels import KernelConfig
from rollout.policies.base import FlowPolicy


class MixtureFlow(FlowPolicy):
    """Data of independent elements, a mixture of Gaussians; ``rows`` counts evaluations."""

    blocks = width = 1

    def __init__(
        self,
        weights: Sequence[float] = (1.0,),
        means: Sequence[float] = (1.0,),
        std: float = 0.5,
        shape: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:
        super().__init__(nn.Linear(1, 1), adapted=False, reference=False)
        self.latent_shape = shape
        self.weights, self.means = torch.tensor(weights), torch.tensor(means)
        self.std, self.rows = std, 0

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def encode_null(self, count: int) -> Tensor:
        return torch.zeros(count, 1, 1)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """p(component | x_t), components last."""
        t = t.reshape(-1, *[1] * (x.ndim - 1))[..., None]
        variance = (1 - t) ** 2 * self.std**2 + t**2
        gap = x[..., None] - (1 - t) * self.means
        return (self.weights.log() - gap**2 / (2 * variance)).softmax(-1)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.rows += len(x)
        u = t.reshape(-1, *[1] * (x.ndim - 1))[..., None]
        variance = (1 - u) ** 2 * self.std**2 + u**2
        # E[eps - x0 | x_t, component] is linear in x_t; components are mixed by their posterior.
        slope = (u - (1 - u) * self.std**2) / variance
        within = -self.means + slope * (x[..., None] - (1 - u) * self.means)
        return (self.posterior(x, t) * within).sum(-1)

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        raise NotImplementedError

    def pixels(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 4, 1)

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


class FunctionTilt:
    """A reward that is a function (n, ...) -> (n,) of clean states."""

    def __init__(self, function: Callable[[Tensor], Tensor], differentiable: bool = True) -> None:
        self.function, self.differentiable = function, differentiable
        self.scored = 0

    def scores(self, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        self.scored += len(clean)
        return self.function(clean).double()

    def potential(self, x: Tensor, t: float, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        return self.function(clean)


def linear(slope: float) -> FunctionTilt:
    """r(x) = slope x, summed over elements."""
    return FunctionTilt(lambda clean: slope * clean.flatten(1).sum(1))


def uniform_grid(steps: int) -> FlowSamplerConfig:
    """sigma_j = 1 - j / steps."""
    return FlowSamplerConfig(steps=steps, shift=1.0, sigma_max=1.0, batch_size=4096)


def recursion(
    steps: int,
    kernel: KernelConfig,
    std: float = 0.5,
    mean: float = 1.0,
    shift: Callable[[float, float, float], float] = lambda t, s, std: 0.0,
    keep: float = 1.0,
) -> tuple[float, float]:
    """Mean and variance of samples of N(mean, std^2) by a grid of ``steps``, exactly.

    ``shift(t, s, std)`` is added to the mean of each step; ``keep`` scales the injected variance.
    """
    flow = MixtureFlow(means=(mean,), std=std)
    flow.means = flow.means.double()
    sigmas = shifted_sigmas(steps, 1.0, 1.0)
    first, second = 0.0, 1.0
    for j in range(steps):
        step = kernel.at(sigmas[j], sigmas[j + 1], sigmas[1])
        probe = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
        t = torch.full((2,), sigmas[j], dtype=torch.float64)
        zero, one = step.mean(probe, flow.velocity(probe, t, probe)).flatten().tolist()
        first = zero + (one - zero) * first + shift(sigmas[j], sigmas[j + 1], step.std)
        second = (one - zero) ** 2 * second + keep * step.std**2
    return first, second


def slope_of(t: float, std: float = 0.5) -> float:
    """d x0_hat / d x_t of N(m, std^2)."""
    return (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)


def sem(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / math.sqrt(len(values)))
