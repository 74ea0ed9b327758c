r"""Flow matching as a Markov chain: the grid, the ODE and SDE steps, log-probabilities, plans.

Conventions (rectified flow): ``t = sigma`` in [0, 1], ``x_t = (1 - t) x0 + t eps``, the network
predicts ``velocity = eps - x0``. Sampling walks a grid ``sigma_0 > ... > sigma_N = 0``.

The SDE step (Flow-GRPO, arXiv 2505.05470, eq. 9; Flash-GRPO, arXiv 2605.15980) has the marginals of
the ODE for every diffusion coefficient ``g``::

    mean = x (1 - g^2 dt / 2t) - v (1 + g^2 (1 - t) / 2t) dt,    std = g sqrt(dt),    dt = t - t'
    log_prob = mean_D[ -(x' - mean)^2 / 2 std^2 - ln std - ln(2 pi) / 2 ]

The log-probability is a *mean* over the D elements of a sample, as in the public releases: the
clip ranges of the literature (1e-4 ... 1e-3) belong to that scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.draws import keyed_generator

# Wan never starts at exactly t = 1, where the score is 0/0.
WAN_SIGMA_MAX = 0.999
STD_CAP = 0.45


class DiffusionConfig(BaseModel, frozen=True, extra="forbid"):
    """The diffusion coefficient g(t) of the SDE step."""

    kind: Literal["wan", "flow", "constant", "capped"] = Field(
        default="wan",
        description="wan: sigma_1 t (Flash-GRPO). flow: scale sqrt(t/(1-t)) (Flow-GRPO). "
        "constant: scale (DanceGRPO). capped: flow with std <= 0.45 (GenRL, LongCat).",
    )
    scale: float = Field(
        default=0.7,
        gt=0,
        le=10,
        description="a of flow and capped, eta of constant; unused by wan.",
    )


class TailConfig(BaseModel, frozen=True, extra="forbid"):
    """A cheaper end of training rollouts: the steps after the last injected noise."""

    steps: int = Field(gt=0, description="Steps from the injected noise to sigma 0.")
    solver: Literal["euler", "dpmpp_2m"] = Field(
        default="euler", description="First order, or DPM-Solver++(2M) in its flow form."
    )


@dataclass(frozen=True)
class FlowPlan:
    """How the samples of one group are drawn.

    Attributes:
        sde_indices: grid indices whose step injects noise, ascending; all others are ODE steps.
        member_indices: instead, one index for each member (the naive single-step plan, in which
            members of a group are compared across timesteps).
        shared_noise: the group starts from one noise; the ODE prefix is computed once.
        antithetic: members 2j and 2j+1 get opposite injected noise (needs ``shared_noise``).
        tail: cheaper steps after the last injection, or None for the grid's own.
        steps: another grid length than the sampler's, for evaluation by ODE.
        keep_final: the final states are replayed too (as data of a flow-matching loss).
        noised: the final states are replayed, with the velocity at so many noised states of each
            (``noised_states``), for an objective that compares with the weights that sampled.
        renoise: a step goes to the prediction of x0 and from there to the next sigma with fresh noise
            (a few-step student that was trained so), instead of along the ODE.
        teacher: drawn from the teacher of a distillation, not from its student.
    """

    sde_indices: tuple[int, ...] = ()
    member_indices: tuple[int, ...] = ()
    shared_noise: bool = False
    antithetic: bool = False
    tail: TailConfig | None = None
    steps: int | None = None
    keep_final: bool = False
    noised: int = 0
    renoise: bool = False
    teacher: bool = False


@dataclass(frozen=True)
class FlowGrid:
    """A sampling grid with its diffusion coefficient.

    Attributes:
        sigmas: fp64 numbers sigma_0 > ... > sigma_N = 0.
        diffusion: which g(t).
    """

    sigmas: tuple[float, ...]
    diffusion: DiffusionConfig

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.sigmas) - 1

    def coefficient(self, index: int) -> float:
        """g at grid index ``index`` (fp64)."""
        sigma, dt = self.sigmas[index], self.sigmas[index] - self.sigmas[index + 1]
        return diffusion_coefficient(self.diffusion, sigma, dt, self.sigmas[1])

    def gradient_scale(self, index: int) -> float:
        """lambda at grid index ``index``: the analytic size of d log_prob / d velocity."""
        sigma, dt = self.sigmas[index], self.sigmas[index] - self.sigmas[index + 1]
        return gradient_scale(sigma, dt, self.coefficient(index))


def shifted_sigmas(steps: int, shift: float, sigma_max: float = WAN_SIGMA_MAX) -> tuple[float, ...]:
    """The Wan grid: ``u_j = sigma_max (1 - j/N)``, ``sigma = shift u / (1 + (shift - 1) u)``.

    ``sigma_max = 1`` gives the grid of DanceGRPO and MixGRPO. Returns N + 1 fp64 numbers, last 0.
    """
    grid = (sigma_max * (1 - j / steps) for j in range(steps + 1))
    return tuple(shift * u / (1 + (shift - 1) * u) for u in grid)


def diffusion_coefficient(
    config: DiffusionConfig, sigma: float, dt: float, second_sigma: float
) -> float:
    """g(t) at ``t = sigma`` for a step of size ``dt``; ``second_sigma`` is sigma_1 of the grid.

    At ``t = 1`` the ``flow`` coefficient uses ``1 - sigma_1`` in its denominator, as Flow-GRPO does.
    """
    if config.kind == "wan":
        return second_sigma * sigma
    if config.kind == "constant":
        return config.scale
    g = config.scale * math.sqrt(sigma / (1 - (second_sigma if sigma >= 1 else sigma)))
    return min(g, STD_CAP / math.sqrt(dt)) if config.kind == "capped" else g


def gradient_scale(sigma: float, dt: float, g: float) -> float:
    """lambda(t) = sqrt(dt)/g + g sqrt(dt) (1 - t) / 2t, so that |d log_prob/d v| = |eps| lambda / D.

    Flash-GRPO's temporal gradient rectification divides by it (arXiv 2605.15980, eq. 12).
    """
    return math.sqrt(dt) / g + g * math.sqrt(dt) * (1 - sigma) / (2 * sigma)


def ode_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE; ``x`` (B, ...), ``sigma`` (B,)."""
    return x - velocity * per_sample(sigma - sigma_next, x)


def renoised(clean: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """The state at ``sigma`` whose prediction of x0 is ``clean`` and whose noise is ``noise``."""
    return (1 - sigma) * clean + sigma * noise


def noised_states(
    final: Tensor, seeds: Sequence[int], sigmas: Sequence[float], count: int
) -> tuple[Tensor, Tensor]:
    """``count`` states ``(1 - t) x0 + t eps`` of each sample, the same for whoever asks.

    The times of a sample are ``sigmas`` in an order of its own, again from the first when ``count``
    exceeds them; times and noises are keyed by the sample's seed.

    Args:
        final: fp32 (n, ...) samples x0 on the CPU, with the ``seeds`` (n,) of their draws.

    Returns:
        fp32 (n, count, ...) states and (n, count) times t.
    """
    times: list[Tensor] = []
    noises: list[Tensor] = []
    rounds = -(-count // len(sigmas))
    for seed in seeds:
        generator = keyed_generator(int(seed), "forward process")
        orders = [torch.randperm(len(sigmas), generator=generator) for _ in range(rounds)]
        times.append(torch.tensor(sigmas)[torch.cat(orders)[:count]])
        noises.append(torch.randn((count, *final.shape[1:]), generator=generator))
    t, noise = torch.stack(times), torch.stack(noises)
    mix = t.reshape(*t.shape, *[1] * (final.ndim - 1))
    return (1 - mix) * final[:, None] + mix * noise, t


def sde_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation (B,) of ``x'`` given ``x``, in the dtype of ``x``."""
    dt = sigma - sigma_next
    ratio = g * g / (2 * sigma)
    mean = x * per_sample(1 - ratio * dt, x) - velocity * per_sample(
        (1 + ratio * (1 - sigma)) * dt, x
    )
    return mean, g * dt.sqrt()


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of ``x_next`` (B, ...), averaged over the elements of a sample: (B,)."""
    deviation = (x_next - mean) / per_sample(std, mean)
    return -deviation.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2


def dpmpp_2m_step(
    x: Tensor,
    denoised: Tensor,
    previous: Tensor,
    previous_sigma: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
) -> Tensor:
    """One DPM-Solver++(2M) step (arXiv 2211.01095, alg. 2) with alpha = 1 - t and sigma = t.

    Rows are independent: a row whose ``previous_sigma`` is NaN has no history and takes a
    first-order step (DDIM); one that steps to sigma 0 returns its prediction, as the solver does.

    Args:
        x: (B, ...) state at ``sigma`` (B,); ``denoised`` its prediction x0 = x - sigma v.
        previous: (B, ...) prediction at ``previous_sigma`` (B,).
        sigma_next: (B,).
    """
    last = sigma_next == 0
    target = torch.where(last, sigma / 2, sigma_next)  # any value > 0: the row is replaced below
    log_snr_step = _log_snr(target) - _log_snr(sigma)
    ratio = log_snr_step / (_log_snr(sigma) - _log_snr(previous_sigma)) / 2
    history = per_sample(ratio, x) * (denoised - previous)
    estimate = denoised + torch.where(per_sample(previous_sigma.isnan(), x), 0.0, history)
    scale = per_sample((1 - target) * torch.expm1(-log_snr_step), x)
    stepped = x * per_sample(target / sigma, x) - scale * estimate
    return torch.where(per_sample(last, x), denoised, stepped)


def _log_snr(sigma: Tensor) -> Tensor:
    return torch.log1p(-sigma) - sigma.log()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) numbers shaped to multiply ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
