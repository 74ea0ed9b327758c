"""Whitening: what comes out is noise a sampler could have drawn, and still knows the gradient.

Which operator is held to which property, and why not:

- ``rescale`` changes no shape: it is exempt from everything about values and spectra.
- ``rank`` sets values and sees no neighbours: exempt from correlations, bands and flatness.
- ``phase`` and ``wgnc`` set spectra; their values are normal when the gradient's phases are random,
  as those of the gradient here, but nothing makes them so. A flatness of ``phase`` is 1 by
  construction; thresholds of ``wgnc`` empty a tenth of the bins, which flatness sees: both exempt.
- Noise comes back the same from ``2os``, ``rescale`` and nearly ``rank``; the others move noise too.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.fft import dctn, idctn
from scipy.special import betaincinv, ndtri
from scipy.stats import kstest, kurtosis

from rollout.guidance.domains import (
    COSINE,
    FOURIER,
    VALUE,
    conjugate_pairs,
    tile_shape,
    tiled,
    untiled,
)
from rollout.guidance.order_statistics import (
    bounds,
    energy_bounds,
    lower_bounds,
    project,
    project_statistics,
)
from rollout.guidance.whitening import Operator, WhiteningConfig, shrink_blocks, whiten

ALPHA = 1e-4
CPU = torch.device("cpu")
OPERATORS: tuple[Operator, ...] = get_args(Operator)
NORMAL: tuple[Operator, ...] = ("2os", "rank", "phase", "wgnc")
WHITE: tuple[Operator, ...] = ("2os", "phase", "wgnc")
SHAPES = [(1, 1, 8, 8), (1, 4, 8, 8), (16, 1, 24, 32), (3, 5, 7, 9), (64,), (3, 10)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_over_f(seed: int = 0) -> torch.Tensor:
    """(1, 16, 1, 64, 64), amplitude 1/f in each channel; zero frequency counts as the lowest."""
    radius = torch.stack(torch.meshgrid(*[torch.fft.fftfreq(64)] * 2, indexing="ij")).norm(dim=0)
    radius[0, 0] = 1 / 64
    spectrum = torch.fft.fftn(noise(1, 16, 1, 64, 64, seed=seed), dim=(-2, -1))
    return torch.fft.ifftn(spectrum / radius, dim=(-2, -1)).real


def gradients() -> dict[str, torch.Tensor]:
    smooth = one_over_f()
    left, channel = torch.arange(64) < 9, torch.arange(16).view(1, 16, 1, 1, 1) == 3
    return {
        "heavy tails": smooth**3,
        "one entry": torch.nn.functional.one_hot(torch.tensor([777]), 65536).view_as(smooth) * 2.0,
        "constant": torch.full_like(smooth, -3.0),
        "one channel": torch.where(channel, smooth, 0.0),
        "patch": torch.where(left, noise(*smooth.shape), 0.0),
        "wave": torch.sin(0.3 * torch.arange(64)).expand(smooth.shape),
        "steep": smooth.cumsum(-1).cumsum(-2),
    }


def cosine_to(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest cosine between rows."""
    rows = a.double().flatten(1), b.double().flatten(1)
    return float(torch.nn.functional.cosine_similarity(*rows).min())


def power(x: torch.Tensor) -> np.ndarray:
    return np.abs(np.fft.fft2(x.double().numpy(), norm="ortho")) ** 2


def flatness(x: torch.Tensor) -> float:
    """Geometric over arithmetic mean of the spectrum; exp(-Euler's constant) = .5615 if white."""
    spectrum = power(x)
    return float(np.exp(np.log(spectrum).mean()) / spectrum.mean())


@pytest.fixture(scope="module")
def white() -> dict[Operator, torch.Tensor]:
    return {name: whiten(one_over_f(), WhiteningConfig(operator=name)) for name in OPERATORS}


def test_bounds_of_one_entry_and_of_two_by_two():
    lower, upper = bounds(1, 1, ALPHA, CPU)
    assert (lower.item(), upper.item()) == pytest.approx((-3.890592, 3.890592), abs=1e-6)
    lower, upper = (b.numpy() for b in bounds(2, 2, ALPHA, CPU))
    assert lower[0] == pytest.approx([-4.214795, -2.575827], abs=1e-6)
    assert upper[0] == pytest.approx([1.378078, 2.692888], abs=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (41, 7), (300, 90), (720, 2912)])
def test_bounds_are_beta_quantiles_of_beta_quantiles_at_both_ends(rows: int, columns: int):
    lower = lower_bounds(rows, columns, ALPHA)
    _, upper = bounds(rows, columns, ALPHA, CPU)
    j = np.arange(1, columns + 1)
    for r in {1, 2, rows // 2, rows - 1, rows}:
        outer = betaincinv(r, rows - r + 1, [ALPHA / 2, 1 - ALPHA / 2])
        exact = ndtri(betaincinv(j, columns - j + 1, outer[:, None]))
        np.testing.assert_allclose(lower[r - 1], exact[0], atol=1e-9)
        np.testing.assert_allclose(upper[r - 1], exact[1], atol=1e-5)


def test_bounds_are_those_of_sorted_normals():
    tables = torch.from_numpy(np.random.default_rng(0).standard_normal((20000, 4, 6)))
    ordered = tables.sort(dim=2).values.sort(dim=1).values.float()
    lower, upper = bounds(4, 6, 0.1, CPU)
    assert (ordered < lower).double().mean((0,)).numpy() == pytest.approx(0.05, abs=0.008)
    assert (ordered > upper).double().mean((0,)).numpy() == pytest.approx(0.05, abs=0.008)


def test_projection_of_the_worked_example():
    table = torch.tensor([[[10.0, -9.0], [0.0, 7.0]]])
    expected = [[4.214795, -4.214795], [0.0, 2.692888]]
    np.testing.assert_allclose(project(table, ALPHA)[0], expected, atol=1e-6)


def test_projection_ends_within_the_bounds_and_one_pass_would_not(
    monkeypatch: pytest.MonkeyPatch,
):
    tables = 4 * noise(3, 64, 64) ** 3

    def outside(projected: torch.Tensor) -> float:
        ordered = projected.sort(dim=2).values.sort(dim=1).values
        return float((ordered - ordered.clamp(*bounds(64, 64, ALPHA, CPU))).abs().max())

    assert outside(project(tables, ALPHA)) <= 1e-6
    monkeypatch.setattr("rollout.guidance.order_statistics.PASSES", 1)
    assert outside(project(tables, ALPHA)) > 1e-3


def test_tile_statistics_end_within_their_bounds():
    size, tiles = 256, 32
    uneven = noise(1, tiles, size) * torch.linspace(0.1, 3, tiles)[None, :, None]
    scaled = project_statistics(uneven, ALPHA)
    lower, upper = energy_bounds(tiles, size, ALPHA, CPU)
    energy = scaled.square().sum(2).sort().values
    assert bool((energy >= lower * 0.9999).all() and (energy <= upper * 1.0001).all())
    moved = noise(1, tiles, size)
    moved[:, 5] += 2
    mean = 16 * project_statistics(moved, ALPHA).mean(2)[0]
    assert int(mean.argmax()) == 5
    assert mean[5].item() == pytest.approx(bounds(1, tiles, ALPHA, CPU)[1][0, -1].item(), rel=0.1)
    typical = noise(1, tiles, size, seed=4)
    np.testing.assert_allclose(project_statistics(typical, ALPHA), typical, atol=1e-6)
    assert bool((project_statistics(torch.zeros(1, 4, 8), ALPHA).isfinite()).all())


def test_energy_bounds_are_chi_squares():
    lower, upper = energy_bounds(1, 10, 0.05, CPU)
    assert (lower.item(), upper.item()) == pytest.approx((3.246973, 20.483177), abs=1e-5)


def test_thresholds_of_a_block_worked():
    shrunk = shrink_blocks(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    assert shrunk.tolist() == pytest.approx([1.6886018, *[0.6187686] * 3], abs=1e-6)


def test_blocks_have_the_norms_of_normals_or_stay_flat():
    blocks = torch.cat([noise(50, 16).abs() ** 4, noise(50, 16, seed=1).abs() + 3])
    shrunk = shrink_blocks(blocks)
    assert shrunk.square().sum(1).numpy() == pytest.approx(16, rel=1e-5)
    assert shrunk.sum(1).numpy() == pytest.approx(8 * math.sqrt(math.pi), rel=1e-5)
    np.testing.assert_allclose(shrink_blocks(shrunk), shrunk, atol=1e-5)
    even = torch.tensor([[1.0] * 15 + [0.5], [2.0] * 16, [0.0] * 16])
    assert torch.equal(shrink_blocks(even), torch.ones(3, 16))
    assert torch.equal(shrink_blocks(torch.full((2, 1), 5.0)), torch.ones(2, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_are_isometries_with_an_inverse(shape: tuple[int, ...]):
    x = noise(2, *shape)
    for domain in (VALUE, FOURIER, COSINE):
        y = domain.forward(x)
        assert y.norm().item() == pytest.approx(x.norm().item(), rel=1e-6)
        np.testing.assert_allclose(domain.inverse(y), x, atol=3e-6)
        assert torch.equal(untiled(tiled(y, domain), domain, y.shape), y)


@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_are_those_of_scipy_over_space_and_time(shape: tuple[int, ...]):
    x = noise(2, *shape)
    axes = tuple(range(min(2, len(shape)), x.ndim))
    wanted = np.asarray(dctn(x.double().numpy(), axes=axes, norm="ortho"))
    np.testing.assert_allclose(COSINE.forward(x), wanted, atol=5e-6)
    back = np.asarray(idctn(x.double().numpy(), axes=axes, norm="ortho"))
    np.testing.assert_allclose(COSINE.inverse(x), back, atol=5e-6)
    spectrum = np.fft.fftn(x.double().numpy(), axes=axes, norm="ortho")
    np.testing.assert_allclose(FOURIER.forward(x), spectrum.real - spectrum.imag, atol=5e-6)


def test_tiles_of_spectra_are_rings_across_channels_of_values_pieces_of_one():
    shape = (16, 1, 64, 64)
    channel = torch.arange(16).view(1, 16, 1, 1, 1).expand(1, *shape).double()
    radius = torch.stack(torch.meshgrid(*[torch.fft.fftfreq(64)] * 2, indexing="ij")).norm(dim=0)
    assert bool((tiled(channel, VALUE).std(2) == 0).all())
    rings = tiled(radius.expand(1, *shape), FOURIER)[0]
    assert rings.shape == tile_shape(65536) == (128, 512)
    rings = rings[rings.mean(1).argsort()]
    assert bool((rings[1:].amin(1) >= rings[:-1].amax(1)).all())
    assert bool((tiled(channel, FOURIER)[0].std(1) > 4).all())
    assert [tile_shape(n) for n in (64, 256, 7, 1, 2096640)] == [
        (4, 16),
        (8, 32),
        (1, 7),
        (1, 1),
        (720, 2912),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_conjugate_pairs_cover_every_coefficient(shape: tuple[int, ...]):
    one, other = conjugate_pairs(torch.Size(shape), CPU)
    assert set(torch.cat([one, other]).tolist()) == set(range(math.prod(shape)))
    assert len(set(one.tolist())) == len(one)
    x = noise(1, *shape)
    axes = tuple(range(min(2, len(shape)), x.ndim))
    flat = torch.fft.fftn(x, dim=axes).flatten()
    np.testing.assert_allclose(flat[one], flat[other].conj().resolve_conj(), atol=1e-3)


def test_two_level_operator_on_a_one_over_f_gradient(white: dict[Operator, torch.Tensor]):
    x = white["2os"]
    assert cosine_to(one_over_f(), x) == pytest.approx(0.69, abs=0.01)
    assert (x[..., 1:] * x[..., :-1]).mean().item() == pytest.approx(0.04, abs=0.01)
    assert flatness(x) == pytest.approx(0.562, abs=0.01)
    assert kurtosis(x.flatten()) == pytest.approx(0, abs=0.02)


def test_noise_comes_back_the_same():
    x = noise(2, 16, 1, 64, 64, seed=3)
    assert cosine_to(x, whiten(x, WhiteningConfig())) >= 0.9999999
    assert cosine_to(x, whiten(x, WhiteningConfig(operator="rank"))) >= 0.9999
    assert cosine_to(x, whiten(x, WhiteningConfig(operator="rescale"))) >= 0.9999999
    small = noise(500, 1, 1, 8, 8)
    assert cosine_to(small, whiten(small, WhiteningConfig())) >= 0.995


@pytest.mark.parametrize("operator", NORMAL)
def test_values_are_normal(operator: Operator, white: dict[Operator, torch.Tensor]):
    x = white[operator].flatten().double().numpy()
    assert abs(x.mean()) * 256 < 4
    assert x.var() == pytest.approx(1, abs=2e-3)
    assert kstest(x, "norm").statistic < 0.012
    assert kurtosis(x) == pytest.approx(0, abs=0.08)
    assert 3.5 < np.abs(x).max() < 6.1


@pytest.mark.parametrize("operator", WHITE)
def test_spectra_are_white(operator: Operator, white: dict[Operator, torch.Tensor]):
    x = white[operator]
    for axis in (-1, -2):
        for lag in range(1, 9):
            n = x.shape[axis] - lag
            product = x.narrow(axis, 0, n) * x.narrow(axis, lag, n)
            assert abs(product.mean().item()) < 0.05, (axis, lag)
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64)] * 2))
    band = np.minimum((radius * 16).astype(int), 8)
    mean, before = (power(y).mean((0, 1, 2)) for y in (x, one_over_f()))
    assert before[band == 0].mean() > 5 * before[band == 1].mean()
    # The largest of 128 tile energies of 512 entries may be 1.3 times the mean.
    assert [mean[band == b].mean() for b in range(9)] == pytest.approx([1] * 9, abs=0.35)
    assert [mean[band == b].mean() for b in range(1, 9)] == pytest.approx([1] * 8, abs=0.2)


def test_what_other_operators_leave_is_seen(white: dict[Operator, torch.Tensor]):
    for operator in ("rescale", "rank"):
        x = white[operator]
        assert (x[..., 1:] * x[..., :-1]).mean() > 0.5
        assert flatness(x) < 0.2
    assert flatness(white["phase"]) == pytest.approx(1, abs=1e-4)
    assert flatness(white["wgnc"]) < 0.53
    cubed = one_over_f() ** 3
    assert kurtosis(whiten(cubed, WhiteningConfig(operator="rescale")).flatten()) > 10


@pytest.mark.parametrize("name", list(gradients()))
def test_two_level_operator_whitens_sparse_and_steep_gradients(name: str):
    x = whiten(gradients()[name], WhiteningConfig())
    values = x.flatten().double().numpy()
    assert abs(kurtosis(values)) < 0.5 and np.abs(values).max() < 6.5
    assert kstest(values, "norm").statistic < 0.05
    assert flatness(x) == pytest.approx(0.5615, abs=0.06)
    assert abs((x[..., 1:] * x[..., :-1]).mean().item()) < 0.1
    assert cosine_to(x, gradients()[name]) > 0.01


@pytest.mark.parametrize("operator", OPERATORS)
def test_sparse_and_extreme_gradients_give_finite_rows_of_the_norm_of_noise(operator: Operator):
    rows = torch.cat([*gradients().values(), one_over_f() * 1e30, one_over_f() * 1e-30])
    x = whiten(rows, WhiteningConfig(operator=operator))
    assert x.dtype == torch.float32
    assert x.square().flatten(1).double().sum(1).numpy() == pytest.approx(65536, rel=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_even_in_scale_odd_in_sign(operator: Operator, shape: tuple[int, ...]):
    config = WhiteningConfig(operator=operator)
    g = noise(4, *shape).cumsum(-1)
    g[3].flatten()[1:] = 0
    x = whiten(g, config)
    assert x.shape == g.shape
    assert torch.equal(whiten(-g, config), -x)
    assert torch.equal(whiten(4 * g, config), x)
    assert cosine_to(whiten(3.7 * g, config)[:3], x[:3]) > 1 - 1e-5
    assert x.square().flatten(1).sum(1).numpy() == pytest.approx(math.prod(shape), rel=1e-5)


# 1 - cosine between W(g) and W(W(g)), exact projections apart from rounding but for ``2os``.
@pytest.mark.parametrize(
    ("operator", "rest"),
    [("2os", 1e-7), ("rescale", 1e-10), ("rank", 1e-10), ("phase", 1e-10), ("wgnc", 1e-10)],
)
def test_idempotent(operator: Operator, rest: float, white: dict[Operator, torch.Tensor]):
    config = WhiteningConfig(operator=operator)
    assert 1 - cosine_to(white[operator], whiten(white[operator], config)) < rest
    small = whiten(noise(16, 1, 4, 8, 8).cumsum(-1), config)
    assert 1 - cosine_to(small, whiten(small, config)) < max(rest, 1e-3 * (operator == "2os"))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (16, 3, 16, 16)])
def test_a_row_does_not_see_its_company_and_nothing_is_drawn(
    operator: Operator, shape: tuple[int, ...]
):
    config = WhiteningConfig(operator=operator)
    g = noise(6, *shape).cumsum(-1) ** 3
    x = whiten(g, config)
    torch.manual_seed(1)
    assert torch.equal(whiten(g, config), x)
    assert all(torch.equal(whiten(g[i : i + 1], config)[0], x[i]) for i in range(6))


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_without_a_direction_are_zero_and_leave_the_others_alone(operator: Operator):
    config = WhiteningConfig(operator=operator)
    g = noise(5, 2, 1, 8, 8)
    g[0] = 0
    g[1, 0, 0, 3, 3] = math.nan
    g[2, 1, 0, 0, 0] = -math.inf
    x = whiten(g, config)
    assert not x[:3].any()
    assert torch.equal(x[3:], whiten(g[3:], config))
    assert not whiten(g[:2], config).any()
    assert whiten(g[:0], config).shape == (0, 2, 1, 8, 8)


def test_half_precision_gives_fp32_and_gradients_do_not_flow():
    g = noise(2, 1, 4, 8, 8).bfloat16().requires_grad_()
    x = whiten(g, WhiteningConfig())
    assert x.dtype == torch.float32 and not x.requires_grad
    assert torch.equal(x, whiten(g.detach().float(), WhiteningConfig()))


def test_more_alpha_and_more_sweeps_do_more():
    g = noise(64, 1, 1, 8, 8).cumsum(-1).cumsum(-2)

    def lag(alpha: float) -> float:
        x = whiten(g, WhiteningConfig(alpha=alpha))
        return (x[..., 1:] * x[..., :-1]).mean().item()

    assert lag(1e-4) > 0.5 and lag(0.2) < 0.2
    patch = gradients()["patch"]
    sweeps = [flatness(whiten(patch, WhiteningConfig(sweeps=n))) for n in (1, 2, 3)]
    assert sweeps == sorted(sweeps) and sweeps[1] > sweeps[0] + 0.03


def test_settings_out_of_range_are_refused():
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"sweeps": 0}, {"sweeps": 4}, {"tile": 8}):
        with pytest.raises(ValidationError):
            WhiteningConfig.model_validate(wrong)
    with pytest.raises(ValueError, match="batch axis"):
        whiten(torch.ones(5), WhiteningConfig())
