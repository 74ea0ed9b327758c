"""The closed-form and enumerated numbers of flow-matching RL, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from rollout.flow import (
    DiffusionConfig,
    FlowGrid,
    diffusion_coefficient,
    gradient_scale,
    log_prob,
    ode_step,
    sde_step,
    shifted_sigmas,
)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_wan_grid_and_the_timesteps_it_feeds():
    sigmas = shifted_sigmas(20, 3.0)
    timesteps = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert [int(1000 * s) for s in sigmas[:-1]] == [int(t) for t in timesteps.split()]
    assert sigmas[0] == pytest.approx(0.999666, abs=5e-7)
    assert sigmas[1] == pytest.approx(0.982420, abs=5e-7)
    assert sigmas[-1] == 0


def test_inverse_gradient_scale_of_the_release_table():
    grid = FlowGrid(shifted_sigmas(20, 3.0), DiffusionConfig(kind="wan"))
    inverse = [1 / grid.gradient_scale(i) for i in range(10)]
    table = [
        7.476982, 7.041366, 6.611185, 6.186700, 5.768183,
        5.355919, 4.950202, 4.551336, 4.159628, 3.775384,
    ]  # fmt: skip
    assert inverse == pytest.approx(table, abs=1e-6)
    assert sum(inverse) / 10 == pytest.approx(5.587689, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "scale", "mean", "std", "density"),
    [
        ("flow", 0.7, 0.544075, 0.313050, 0.226498),
        ("constant", 0.3, 0.559269, 0.067082, 1.598563),
        ("wan", 0.7, 0.554981, 0.175741, 0.786997),
    ],
)
def test_scalar_step(kind: str, scale: float, mean: float, std: float, density: float):
    config = DiffusionConfig.model_validate({"kind": kind, "scale": scale})
    g = diffusion_coefficient(config, 0.8, 0.05, 0.98242)
    x, v = one(0.5)[:, None], one(-1.2)[:, None]
    got_mean, got_std = sde_step(x, v, one(0.8), one(0.75), one(g))
    assert got_mean.item() == pytest.approx(mean, abs=1e-6)
    assert got_std.item() == pytest.approx(std, abs=1e-6)
    got = log_prob(one(0.6)[:, None], got_mean, got_std)
    assert got.item() == pytest.approx(density, abs=2e-6)


def test_capped_coefficient_bounds_the_standard_deviation():
    config = DiffusionConfig(kind="capped", scale=0.9)
    g = diffusion_coefficient(config, 0.999, 0.05, 0.98)
    assert g * 0.05**0.5 == pytest.approx(0.45)
    free = DiffusionConfig(kind="flow", scale=0.9)
    assert diffusion_coefficient(config, 0.3, 0.05, 0.98) == diffusion_coefficient(
        free, 0.3, 0.05, 0.98
    )


def test_flow_coefficient_at_the_start_uses_the_second_sigma():
    config = DiffusionConfig(kind="flow", scale=0.7)
    assert diffusion_coefficient(config, 1.0, 0.05, 0.95) == pytest.approx(0.7 * (1 / 0.05) ** 0.5)


def test_gradient_scale_identity_for_flow():
    a, t, dt = 0.7, 0.8, 0.05
    g = diffusion_coefficient(DiffusionConfig(kind="flow", scale=a), t, dt, 0.95)
    identity = (1 / a + a / 2) * (dt * (1 - t) / t) ** 0.5
    assert gradient_scale(t, dt, g) == pytest.approx(identity)
    assert identity == pytest.approx(0.198850, abs=1e-6)


def test_gradient_of_the_log_prob_has_the_analytic_size():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(1, 50, dtype=torch.float64, generator=generator) for _ in range(2))
    v = torch.randn(1, 50, dtype=torch.float64, generator=generator).requires_grad_()
    mean, std = sde_step(x, v, one(0.7), one(0.6), one(0.65))
    log_prob((mean + std[:, None] * noise).detach(), mean, std).backward()
    expected = noise.abs() * gradient_scale(0.7, 0.1, 0.65) / 50
    assert v.grad is not None
    torch.testing.assert_close(v.grad.abs(), expected)


@pytest.mark.parametrize(
    ("kind", "scale", "variance"),
    [
        ("ode", 0.0, 0.215526),
        ("flow", 0.7, 0.241495),
        ("constant", 0.3, 0.220643),
        ("wan", 0.7, 0.224624),
    ],
)
def test_gaussian_data_keeps_its_mean_and_nearly_its_variance(
    kind: str, scale: float, variance: float
):
    """The exact velocity is affine in x, so mean and variance follow a recursion."""
    data_mean, data_var = 1.5, 0.25
    sigmas = shifted_sigmas(20, 1.0, sigma_max=1.0)
    mean, var = 0.0, 1.0
    for t, t_next in itertools.pairwise(sigmas):
        total = (1 - t) ** 2 * data_var + t**2
        slope = (t - (1 - t) * data_var) / total

        def velocity(x: torch.Tensor, t: float = t, slope: float = slope) -> torch.Tensor:
            return slope * (x - (1 - t) * data_mean) - data_mean

        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        pair = [one(t).expand(2), one(t_next).expand(2)]
        if kind == "ode":
            out, std = ode_step(points, velocity(points), *pair), torch.zeros(2)
        else:
            config = DiffusionConfig.model_validate({"kind": kind, "scale": scale})
            g = diffusion_coefficient(config, t, t - t_next, sigmas[1])
            out, std = sde_step(points, velocity(points), *pair, one(g).expand(2))
        gain = (out[1] - out[0]).item()
        mean, var = out[0].item() + gain * mean, gain**2 * var + std[0].item() ** 2
    assert mean == pytest.approx(1.5, abs=1e-9)
    assert var == pytest.approx(variance, abs=1e-6)


def test_guard_identity():
    """(dl + mean dmu^2 / 2 s^2) s = mean(eps * dmu): what GRPO-Guard re-centres by."""
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(1, 64, dtype=torch.float64, generator=generator) for _ in range(4)]
    x, noise, v, v_old = draw
    mean, std = sde_step(x, v, one(0.8), one(0.75), one(0.7))
    old, _ = sde_step(x, v_old, one(0.8), one(0.75), one(0.7))
    x_next = old + std[:, None] * noise
    change = log_prob(x_next, mean, std) - log_prob(x_next, old, std)
    shift = mean - old
    left = (change + shift.square().mean() / (2 * std**2)) * std
    assert abs((left - (noise * shift).mean()).item()) < 1e-15
