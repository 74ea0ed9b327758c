r"""The cyclic-denoising audit for memorisation (arXiv 2606.24000).

A sample is noised to ``gamma`` and denoised, again and again. A model of a smooth law gives another
sample each time; one that has memorised returns to the point it came from, up to a large ``gamma``.
The fraction of fixed points against ``gamma`` tells them apart.

For Gaussian data of standard deviation s0 the cycle is ``(x - m)' = s0 / sqrt(V(gamma)) (x_gamma -
(1 - gamma) m)`` with ``V(t) = (1 - t)^2 s0^2 + t^2``: it keeps the law, and successive states have the
correlation ``gaussian_lag``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.draws import keyed_generator
from rollout.flow import ode_step, renoised, shifted_sigmas
from rollout.policies.base import FlowPolicy

# Velocity (n, ...) of states (n, ...) at times (n,).
Velocity = Callable[[Tensor, Tensor], Tensor]
# A fixed point moves by less than a tenth of what parts two samples: a hundredth of the variance.
THRESHOLD = 0.1


@dataclass(frozen=True)
class Movement:
    """What the cycles did. Distances are relative: 1 parts two independent samples of the start.

    Attributes:
        spread: root mean square distance between two of the start states, the unit.
        step: (cycles, n) between successive states; ``drift``: (cycles, n) from the start state.
        fixed: (cycles, n) whether ``step`` is below the threshold.
        nearest: (cycles + 1, n) to the nearest reference, start first; None without references.
    """

    spread: float
    step: Tensor
    drift: Tensor
    fixed: Tensor
    nearest: Tensor | None


def gaussian_lag(gamma: float, s0: float) -> float:
    """Correlation of successive states of Gaussian data: (1 - gamma) s0 / sqrt(V(gamma))."""
    return (1 - gamma) * s0 / math.hypot((1 - gamma) * s0, gamma)


def gaussian_step(gamma: float, s0: float) -> float:
    """Root mean square relative step of Gaussian data, sqrt(1 - lag): a yardstick."""
    return math.sqrt(1 - gaussian_lag(gamma, s0))


def sigmas_from(gamma: float, steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The sampler's grid begun at ``gamma``: ``steps`` + 1 numbers gamma > ... > 0.

    Raises:
        ValueError: ``gamma`` not inside (0, 1): 0 changes nothing and 1 forgets everything.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma {gamma} is not inside (0, 1)")
    grid = shifted_sigmas(steps, shift, gamma / (shift - (shift - 1) * gamma))
    return (gamma, *grid[1:])


def policy_velocity(
    policy: FlowPolicy, condition: Tensor, guidance_scale: float, batch_size: int
) -> Velocity:
    """The guided velocity of a policy under fixed conditions (n, ...), in batches."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        spans = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
        return torch.cat(
            [policy.guided_velocity(x[s], t[s], condition[s], guidance_scale) for s in spans]
        )

    return velocity


@torch.no_grad()
def cycle(
    velocity: Velocity,
    x0: Tensor,
    gamma: float,
    *,
    cycles: int,
    steps: int,
    seeds: Sequence[int],
    shift: float = 1.0,
) -> Tensor:
    """Clean states (cycles + 1, n, ...) in the dtype of ``x0``, the start ``x0`` (n, ...) first.

    The noise of sample i in cycle c is a function of ``(seeds[i], c)`` alone: the same at every
    ``gamma``, and whatever else is in the batch. Denoising is by Euler steps of the ODE.

    Raises:
        ValueError: see ``sigmas_from``; or not a seed for each sample.
    """
    sigmas = sigmas_from(gamma, steps, shift)
    if len(seeds) != len(x0):
        raise ValueError(f"{len(x0)} samples need as many seeds, not {len(seeds)}")
    states = [x0]
    for number in range(cycles):
        drawn = [
            torch.randn(x0.shape[1:], generator=keyed_generator(seed, "audit", number))
            for seed in seeds
        ]
        x = renoised(states[-1], gamma, torch.stack(drawn).to(x0))
        for before, after in itertools.pairwise(sigmas):
            sigma, sigma_next = x.new_full((len(x),), before), x.new_full((len(x),), after)
            x = ode_step(x, velocity(x, sigma), sigma, sigma_next)
        states.append(x)
    return torch.stack(states)


def spread_of(x: Tensor) -> float:
    """Root mean square distance between two different of the samples (n, ...).

    Raises:
        ValueError: fewer than two, or all the same.
    """
    if len(x) < 2:
        raise ValueError("distances are relative to those between samples: take at least two")
    spread = float(x.flatten(1).double().var(0).sum().mul(2).sqrt())
    if spread == 0:
        raise ValueError("the samples are all the same: there is no distance to compare with")
    return spread


def movement(
    states: Tensor, references: Tensor | None = None, threshold: float = THRESHOLD
) -> Movement:
    """Distances of the states (cycles + 1, n, ...) of ``cycle``; references are (m, ...).

    Raises:
        ValueError: see ``spread_of``.
    """
    spread = spread_of(states[0])
    flat = states.flatten(2).double()
    step = (flat[1:] - flat[:-1]).norm(dim=-1) / spread
    drift = (flat[1:] - flat[0]).norm(dim=-1) / spread
    nearest = None
    if references is not None:
        known = references.flatten(1).to(flat)
        # Without matrix products: those lose the small distances that matter here.
        mode = "donot_use_mm_for_euclid_dist"
        distances = [torch.cdist(part, known, compute_mode=mode).amin(1) for part in flat]
        nearest = torch.stack(distances) / spread
    return Movement(spread, step, drift, step < threshold, nearest)
