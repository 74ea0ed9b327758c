"""The Fréchet distance against closed forms and another way of computing it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from rewards.frechet import frechet_distance


def features(seed: int, n: int, d: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) + seed


def exactly(mean: np.ndarray, root: np.ndarray, n: int = 200) -> np.ndarray:
    """Samples whose own mean and covariance (root @ root.T) are exact."""
    raw = np.random.default_rng(0).standard_normal((n, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return white @ root.T + mean


def test_identical_sets_have_distance_zero():
    a = features(1, 60, 8)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    a, b = features(1, 30, 1), 3 * features(2, 50, 1)
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(want)


def test_closed_form_of_axis_aligned_gaussians():
    a = exactly(np.array([0.0, 1, 2]), np.diag([1.0, 2, 3]))
    b = exactly(np.array([1.0, 1, 0]), np.diag([2.0, 2, 0.5]))
    # |m|^2 = 1 + 4; sum of (s_a - s_b)^2 = 1 + 0 + 6.25
    assert frechet_distance(a, b) == pytest.approx(12.25)


def test_covariances_that_do_not_commute_agree_with_scipy():
    a, b = features(1, 80, 6), features(2, 90, 6)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(np.asarray(sqrtm(cov_a @ cov_b)))
    mean = a.mean(0) - b.mean(0)
    want = mean @ mean + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-7)


def test_fewer_samples_than_features_stay_finite_and_not_negative():
    a, b = features(1, 5, 40), features(2, 6, 40)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(a.T)))
    assert np.isfinite(frechet_distance(a, b)) and frechet_distance(a, b) > 0


def test_one_sample_has_no_covariance():
    assert np.isnan(frechet_distance(features(1, 1, 4), features(2, 9, 4)))
