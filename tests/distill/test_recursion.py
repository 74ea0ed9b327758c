"""Recursive training: closed forms against the iterated recursion, and the monitor on its particles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.recursion import (
    annealed,
    fit,
    generation_gains,
    generation_variances,
    kappa,
    limit_gain,
    limit_variance,
    spectrum,
)

CASES = [(0.5, 0.1), (0.1, 0.02), (0.9, 1.5), (1.0, 0.3)]


def test_golden_numbers():
    assert limit_variance(4, alpha=0.5, t0=0.1) == pytest.approx(3.4786386, abs=5e-8)
    assert kappa(alpha=0.5, t0=0.1) == pytest.approx(0.6726208, abs=5e-8)


@pytest.mark.parametrize(("alpha", "t0"), CASES)
def test_limit_gain_is_the_series_of_smoothed_copies(alpha: float, t0: float):
    for mode in (1, 2, 3, 6):
        terms = [alpha * (1 - alpha) ** k * math.exp(-mode * (k + 1) * t0 / 2) for k in range(4000)]
        assert limit_gain(mode, alpha, t0) == pytest.approx(sum(terms), rel=1e-12)


@pytest.mark.parametrize(("alpha", "t0"), CASES)
def test_iterating_reaches_the_limit_and_stays(alpha: float, t0: float):
    times = [t0] * 400
    for mode in (1, 2, 5):
        gains = generation_gains(mode, alpha, times)
        assert gains[0] == 1 and gains[1] == pytest.approx(math.exp(-mode * t0 / 2))
        assert gains[-1] == pytest.approx(limit_gain(mode, alpha, t0), rel=1e-12)
    for start in (None, 0.0, 50.0):
        variances = generation_variances(4, alpha, times, start)
        assert variances[-1] == pytest.approx(limit_variance(4, alpha, t0), rel=1e-12)


def test_variances_of_generations_are_the_gains_of_mode_two():
    times = annealed(0.4, 0.7, 30)
    gains, variances = generation_gains(2, 0.3, times), generation_variances(0.2, 0.3, times)
    assert variances == pytest.approx([1 + (0.2 - 1) * gain for gain in gains])


def test_a_single_gaussian_generation_is_the_diffusion_s_own_formula():
    # 3 e^-.2 + 1 - e^-.2, with alpha = .25 of 4 and .75 of 8/3.
    want = 1 + 2 * math.exp(-0.2)
    assert generation_variances(4, 0.25, [0.2], start=8 / 3)[1] == pytest.approx(want)


def test_high_modes_go_first_and_unit_variance_stays():
    gains = [limit_gain(mode, 0.5, 0.1) for mode in range(1, 9)]
    assert gains == sorted(gains, reverse=True) and gains[-1] < 0.6 * gains[0]
    assert limit_variance(1, 0.5, 0.1) == 1
    assert limit_variance(0.2, 0.5, 0.1) > 0.2


def test_without_fresh_data_everything_is_lost_and_without_stopping_nothing():
    assert limit_gain(1, alpha=0, t0=0.1) == 0
    assert limit_gain(7, alpha=0.2, t0=0) == pytest.approx(1)
    assert limit_variance(4, alpha=0, t0=0.01) == 1


def test_annealing_brings_back_what_a_constant_time_loses():
    assert annealed(0.4, 1, 4) == pytest.approx([0.4, 0.2, 0.4 / 3, 0.1])
    assert annealed(0.4, 0, 3) == [0.4] * 3
    constant, slow, fast = (
        generation_gains(4, 0.5, annealed(0.2, beta, 3000))[-1] for beta in (0.0, 0.5, 1.0)
    )
    assert constant == pytest.approx(limit_gain(4, 0.5, 0.2))
    assert constant < 0.6 < 0.97 < slow < fast and fast == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("alpha", "t0"), [(-0.1, 0.1), (1.1, 0.1), (0.5, -1), (math.nan, 0.1)])
def test_impossible_parameters_are_refused_everywhere(alpha: float, t0: float):
    for call in (
        lambda: kappa(alpha, t0),
        lambda: limit_gain(2, alpha, t0),
        lambda: generation_gains(2, alpha, [t0]),
        lambda: generation_variances(4, alpha, [t0]),
    ):
        with pytest.raises(ValueError, match="alpha must be"):
            call()


def test_what_has_no_limit_is_refused():
    with pytest.raises(ValueError, match="no limit"):
        limit_gain(2, alpha=0, t0=0)
    with pytest.raises(ValueError, match="mode 0"):
        limit_gain(0, alpha=0.5, t0=0.1)


def recursion(
    data: np.ndarray, start: np.ndarray, alpha: float, times: list[float], seed: int = 0
) -> list[np.ndarray]:
    """The generations as particles: mix with fresh data, then diffuse for the stopping time."""
    generator = np.random.default_rng(seed)
    generations = [start]
    for time in times:
        fresh = generator.random(len(start)) < alpha
        mixed = np.where(fresh[:, None], generator.permutation(data)[: len(start)], generations[-1])
        noise = generator.standard_normal(start.shape)
        generations.append(math.exp(-time / 2) * mixed + math.sqrt(-math.expm1(-time)) * noise)
    return generations


def lopsided(n: int, d: int = 1, seed: int = 1) -> np.ndarray:
    """Two unequal peaks in each direction: mean 0, variance 1, skewed and not mesokurtic."""
    generator = np.random.default_rng(seed)
    high = generator.random((n, d)) < 0.1
    peaks = np.where(high, 3.0, -1 / 3) * math.sqrt(0.9)
    return peaks + math.sqrt(0.1) * generator.standard_normal((n, d))


def test_particles_have_the_variance_that_the_closed_form_says():
    data = 2 * np.random.default_rng(2).standard_normal((200_000, 1))
    drawn = [float(g.var()) for g in recursion(data, data[::-1], 0.5, [0.1] * 12)]
    # One standard error is about 4 sqrt(2 / n) = 0.013.
    assert drawn == pytest.approx(generation_variances(4, 0.5, [0.1] * 12), abs=0.05)
    assert drawn[-1] == pytest.approx(3.4786386, abs=0.05)


def test_particles_approach_the_limit_at_least_by_kappa_in_w2():
    generator = np.random.default_rng(3)
    data = generator.standard_normal((40_000, 1)) * 0.3 + 2
    generations = recursion(data, generator.standard_normal((40_000, 1)) - 4, 0.3, [0.2] * 40)
    limit = np.sort(generations[-1], axis=0)
    w2 = [math.sqrt(np.square(np.sort(g, axis=0) - limit).mean()) for g in generations[:12]]
    for i, distance in enumerate(w2):
        assert distance <= kappa(0.3, 0.2) ** i * w2[0] + 0.05
    # And not much faster: the bound says something.
    assert w2[4] > 0.3 * kappa(0.3, 0.2) ** 4 * w2[0]


def test_spectrum_sees_the_low_pass_filter_in_particles():
    data = lopsided(200_000)
    last = recursion(data, lopsided(200_000, seed=9), 0.5, [0.1] * 12)[-1]
    seen = spectrum(last, data, modes=(2, 3, 4))
    assert set(seen.gains) == {3, 4}  # unit variance: mode 2 of the reference is 0
    for mode in (3, 4):
        want = limit_gain(mode, 0.5, 0.1)
        assert abs(seen.gains[mode] - want) < 4 * seen.errors[mode] < 0.12
    assert seen.variance_ratio == pytest.approx([1], abs=0.02)
    assert seen.attenuated()
    assert seen.metrics(alpha=0.5)["kappa"] == pytest.approx(0.6726208, abs=0.01)


def test_features_in_units_of_the_noise_follow_the_law_at_any_variance_and_mean():
    generator = np.random.default_rng(4)
    data = 2 * lopsided(200_000) + 1
    data = np.concatenate([data, 0.4 * generator.standard_normal((200_000, 1)) - 0.7], axis=1)
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    last = recursion(data @ turn, data[::-1] @ turn, 0.3, [0.3] * 20)[-1]
    seen = spectrum(last, data @ turn, modes=(1, 2, 3), standardise=False)
    for mode in (1, 2, 3):
        want = limit_gain(mode, 0.3, 0.3)
        assert seen.gains[mode] == pytest.approx(want, abs=0.03)
        assert seen.moments[mode] / seen.reference[mode] == pytest.approx([want] * 2, abs=0.06)


def test_more_samples_of_the_reference_do_not_alarm():
    for seed in range(10):
        seen = spectrum(lopsided(20_000, d=3, seed=100 + seed), lopsided(20_000, d=3, seed=seed))
        assert seen.gains == pytest.approx({3: 1, 4: 1}, abs=0.08)
        assert not seen.attenuated()
        assert "kappa" not in seen.metrics()
        # One standard error is about sqrt(2 * 7 / n) = 0.026: the peaks have heavy tails.
        assert seen.variance_ratio == pytest.approx([1] * 3, abs=0.12)


def test_standard_errors_of_gains_are_as_large_as_what_they_are_off():
    off: list[float] = []
    for seed in range(200):
        seen = spectrum(lopsided(2000, seed=1000 + seed), lopsided(2000, seed=seed))
        off.append((seen.gains[3] - 1) / seen.errors[3])
    assert 0.85 < np.std(off) < 1.15


def test_a_gaussian_reference_has_no_mode_to_lose():
    generator = np.random.default_rng(5)
    seen = spectrum(generator.standard_normal((5000, 6)), generator.standard_normal((5000, 6)))
    assert seen.gains == {} and not seen.attenuated()
    assert set(seen.metrics()) == {f"variance_ratio/{d}" for d in range(6)}


def test_a_lost_direction_shows_in_its_variance_ratio():
    generator = np.random.default_rng(6)
    scale = np.array([3.0, 2.0, 1.0])
    data = scale * generator.standard_normal((5000, 3))
    samples = scale * np.array([0.1, 1, 1]) * generator.standard_normal((5000, 3))
    ratio = spectrum(samples, data, directions=2).variance_ratio
    assert ratio == pytest.approx([0.01, 1], abs=0.1)


def test_hermite_moments_by_hand():
    # E x^3 - 3 x and E x^4 - 6 x^2 + 3, over 0 and 2, then at 1 only; an axis may point either way.
    seen = spectrum(np.ones((4, 1)), np.array([[0.0], [2.0]]), modes=(1, 3, 4), standardise=False)
    sign = np.sign(seen.reference[1])
    assert sign * seen.reference[3] == pytest.approx([1.0])
    assert seen.reference[4] == pytest.approx([(3 - 5) / 2])
    assert sign * seen.moments[3] == pytest.approx([-2.0])
    assert seen.moments[4] == pytest.approx([-2.0])


def test_identical_samples_have_gain_one_whatever_the_order():
    data = lopsided(5000, d=4)
    seen = spectrum(np.random.default_rng(7).permutation(data), data)
    assert seen.gains == pytest.approx({3: 1, 4: 1})
    assert seen.variance_ratio == pytest.approx([1] * 4)


def test_standardised_spectrum_ignores_shift_scale_and_rotation():
    data = lopsided(5000, d=3) * [3, 2, 1]
    samples = recursion(data, data, 0.5, [0.3] * 3)[-1]
    turn, _ = np.linalg.qr(np.random.default_rng(8).standard_normal((3, 3)))
    moved = spectrum(7 * samples @ turn + 5, 7 * data @ turn + 5)
    assert moved.metrics() == pytest.approx(spectrum(samples, data).metrics())
    width = spectrum(np.pad(samples, ((0, 0), (0, 2))), np.pad(data, ((0, 0), (0, 2))))
    assert len(width.variance_ratio) == 3  # constant features are no direction
    assert width.metrics() == pytest.approx(moved.metrics())


def test_features_that_cannot_be_compared_are_refused():
    good = lopsided(10, d=2)
    broken = good.copy()
    broken[3, 1] = np.nan
    for bad in (broken, good[:1], good[:, 0]):
        with pytest.raises(ValueError, match="must be finite features"):
            spectrum(bad, good)
    with pytest.raises(ValueError, match="widths must be equal"):
        spectrum(good[:, :1], good)
    with pytest.raises(ValueError, match="modes 1 or more"):
        spectrum(good, good, modes=(0, 2))
    with pytest.raises(ValueError, match="no variance"):
        spectrum(good, np.ones((5, 2)))


@pytest.mark.parametrize(("alpha", "t0"), [(0.5, 0.1), (0.1, 0.02), (0.9, 1.0), (0.0, 0.2)])
def test_fit_recovers_the_recursion_from_its_generations(alpha: float, t0: float):
    table = {mode: generation_gains(mode, alpha, [t0] * 6) for mode in (2, 3, 4)}
    history = {float(i): {n: gains[i] for n, gains in table.items()} for i in range(7)}
    found = fit(history)
    assert found is not None and found.residual < 1e-6
    assert (found.alpha, found.t0) == pytest.approx((alpha, t0), abs=1e-4)
    assert found.kappa == pytest.approx(kappa(alpha, t0), abs=1e-4)


def test_fit_recovers_the_recursion_from_its_limit():
    limit = {mode: limit_gain(mode, 0.5, 0.4) for mode in (2, 3, 4)}
    free, known = fit({math.inf: limit}), fit({math.inf: {3: limit[3]}}, alpha=0.5)
    assert free is not None and known is not None
    assert (free.alpha, free.t0) == pytest.approx((0.5, 0.4), abs=1e-3)
    assert known.t0 == pytest.approx(0.4, abs=1e-6)


def test_too_few_gains_are_not_fitted():
    assert fit({math.inf: {3: 0.8}}) is None
    assert fit({0.0: {3: 1.0, 4: 1.0}}, alpha=0.5) is None  # the data itself tells nothing
    assert fit({}) is None


def test_fit_follows_particles_generation_by_generation():
    data = lopsided(100_000, d=2)
    generations = recursion(data, lopsided(100_000, d=2, seed=9), 0.4, [0.15] * 6)
    history = {float(i): spectrum(g, data).gains for i, g in enumerate(generations)}
    found = fit(history)
    assert found is not None
    assert found.kappa == pytest.approx(kappa(0.4, 0.15), abs=0.03)
    assert found.t0 == pytest.approx(0.15, abs=0.02)
