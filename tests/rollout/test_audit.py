"""The cyclic audit: exact on Gaussians; it tells a memorising velocity from a smooth one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rollout.audit import (
    Velocity,
    cycle,
    gaussian_lag,
    gaussian_step,
    movement,
    policy_velocity,
    sigmas_from,
    spread_of,
)
from rollout.draws import keyed_generator
from rollout.policies.wan_conditional import WanPolicy

MEAN, S0 = 1.0, 0.5


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Of N(MEAN, S0^2) in every coordinate."""
    t = t[:, None]
    variance = ((1 - t) * S0) ** 2 + t**2
    return (t - (1 - t) * S0**2) * (x - (1 - t) * MEAN) / variance - MEAN


def memorising_velocity(points: Tensor) -> Velocity:
    """Of the law that is one of ``points`` (m, d): the exact optimum on a training set."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        distance = (x[:, None] - (1 - t)[:, None, None] * points).square().sum(-1)
        clean = (-distance / (2 * t[:, None] ** 2)).softmax(-1) @ points
        return (x - clean) / t[:, None]

    return velocity


def gaussian_start(count: int, width: int) -> Tensor:
    generator = keyed_generator(0, "start")
    return MEAN + S0 * torch.randn(count, width, generator=generator, dtype=torch.float64)


def test_the_lag_of_gaussian_data_is_the_golden_one():
    assert gaussian_lag(0.3, 0.5) == pytest.approx(0.7 * 0.5 / math.sqrt(0.7**2 * 0.25 + 0.09))
    assert gaussian_lag(0.5, 1.0) == pytest.approx(1 / math.sqrt(2))
    assert gaussian_lag(0.9, 0.5) == pytest.approx(0.0554700, abs=1e-6)
    assert gaussian_step(0.5, 1.0) == pytest.approx(math.sqrt(1 - 1 / math.sqrt(2)))


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.8])
def test_a_cycle_of_gaussian_data_is_the_exact_map_and_keeps_the_law(gamma: float):
    count = 20_000
    x0 = gaussian_start(count // 50, 50)
    seeds = range(len(x0))
    states = cycle(gaussian_velocity, x0, gamma, cycles=2, steps=1500, seeds=seeds)
    noise = torch.stack([torch.randn(50, generator=keyed_generator(s, "audit", 0)) for s in seeds])
    noised = (1 - gamma) * x0 + gamma * noise
    ratio = S0 / math.hypot((1 - gamma) * S0, gamma)
    exact = MEAN + ratio * (noised - (1 - gamma) * MEAN)
    assert torch.allclose(states[1], exact, atol=5e-3)
    bound = 4 / math.sqrt(count)
    lag = gaussian_lag(gamma, S0)
    for cycles, expected in ((1, lag), (2, lag**2)):
        both = torch.stack([states[0].flatten(), states[cycles].flatten()])
        assert torch.corrcoef(both)[0, 1] == pytest.approx(expected, abs=bound)
        assert states[cycles].std() == pytest.approx(S0, rel=bound)
        assert states[cycles].mean() == pytest.approx(MEAN, abs=bound)
    moved = movement(states)
    assert moved.step[0].square().mean().sqrt() == pytest.approx(gaussian_step(gamma, S0), rel=0.02)
    assert moved.spread == pytest.approx(S0 * math.sqrt(100), rel=0.02)


def test_what_is_memorised_stays_and_a_smooth_law_moves():
    points = gaussian_start(40, 64)
    fractions: dict[str, list[float]] = {"memorised": [], "smooth": []}
    for gamma in (0.2, 0.35):
        for name, velocity in (
            ("memorised", memorising_velocity(points)),
            ("smooth", gaussian_velocity),
        ):
            states = cycle(velocity, points, gamma, cycles=3, steps=40, seeds=range(40))
            fractions[name].append(movement(states).fixed[-1].double().mean().item())
    assert min(fractions["memorised"]) >= 0.95 and max(fractions["smooth"]) == 0


def test_a_memorising_model_pulls_new_points_onto_its_training_set_and_never_lets_go():
    points, new = gaussian_start(80, 64).split(40)
    states = cycle(memorising_velocity(points), new, 0.4, cycles=3, steps=40, seeds=range(40))
    moved = movement(states, points)
    assert moved.nearest is not None and moved.nearest.shape == (4, 40)
    assert moved.nearest[0].min() > 0.5 and moved.nearest[1:].max() < 1e-6
    assert not moved.fixed[0].any() and moved.fixed[2].double().mean() > 0.9
    assert torch.allclose(moved.drift[0], moved.step[0]) and moved.drift[2].min() > 0.5


def test_distances_are_relative_to_those_between_the_samples():
    start = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    states = torch.stack([start, start + torch.tensor([0.3, 0.4]), start])
    moved = movement(states, torch.tensor([[0.0, 1.0], [9.0, 9.0]]), threshold=0.11)
    assert moved.spread == pytest.approx(5.0) and spread_of(start) == moved.spread
    assert moved.step.flatten().tolist() == pytest.approx([0.1] * 4)
    assert moved.drift.tolist() == [pytest.approx([0.1, 0.1]), [0.0, 0.0]]
    assert moved.fixed.all() and not movement(states, threshold=0.09).fixed.any()
    assert moved.nearest is not None
    assert moved.nearest[0].tolist() == pytest.approx([0.2, math.sqrt(18) / 5])
    assert movement(states).nearest is None


def test_noise_belongs_to_the_sample_and_the_cycle(base_policy: WanPolicy):
    shape = base_policy.latent_shape
    x0 = torch.randn(6, *shape, generator=keyed_generator(0, "x0"))
    prompts = ["3", "1", "4", "1", "5", "9"]

    def states(rows: list[int], batch: int) -> Tensor:
        condition = base_policy.encode([prompts[row] for row in rows])
        velocity = policy_velocity(base_policy, condition, 1.0, batch)
        return cycle(velocity, x0[rows], 0.6, cycles=2, steps=3, seeds=[10 + r for r in rows])

    whole = states([0, 1, 2, 3, 4, 5], 6)
    assert torch.equal(whole, states([0, 1, 2, 3, 4, 5], 6))
    assert torch.allclose(whole[:, [4, 1]], states([4, 1], 2), atol=1e-5)
    assert torch.allclose(whole, states([0, 1, 2, 3, 4, 5], 4), atol=1e-5)
    assert torch.equal(whole[0], x0)
    # Where the velocity is 0 a cycle only mixes its noise in: another one each time.
    first, second = (
        (after - 0.5 * before) / 0.5
        for before, after in itertools.pairwise(
            cycle(lambda x, t: 0 * x, x0, 0.5, cycles=2, steps=1, seeds=range(6))
        )
    )
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.2


def test_the_grid_begins_at_gamma_and_has_the_sampler_s_shift():
    assert sigmas_from(0.4, 4) == pytest.approx((0.4, 0.3, 0.2, 0.1, 0.0))
    shifted = sigmas_from(0.6, 5, 3.0)
    assert shifted[0] == 0.6 and shifted[-1] == 0 and len(shifted) == 6
    unshifted = [s / (3 - 2 * s) for s in shifted]
    assert unshifted == pytest.approx([unshifted[0] * (1 - j / 5) for j in range(6)])


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.5, float("nan")])
def test_levels_that_say_nothing_are_refused(gamma: float):
    with pytest.raises(ValueError, match="not inside"):
        cycle(gaussian_velocity, torch.zeros(2, 3), gamma, cycles=1, steps=2, seeds=[0, 1])


def test_samples_that_give_no_unit_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        movement(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="all the same"):
        movement(torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="as many seeds"):
        cycle(gaussian_velocity, torch.zeros(2, 3), 0.5, cycles=1, steps=2, seeds=[0])
