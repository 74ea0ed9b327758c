"""Regions: golden allocations, the tracker's bookkeeping, partitions that are saved and merged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from distill.regions import (
    T_BINS,
    Regions,
    RegionsConfig,
    Tracker,
    allocate,
    effective_sample_size,
    estimator_variance,
    ratios,
    table,
)

PI = np.array([0.7, 0.2, 0.1])
D = np.array([0.1, 0.4, 0.9])


def clusters(sizes: list[int]) -> np.ndarray:
    """Tight clouds (sum of sizes, 2), the k-th around (10 k, 0), in mixed order."""
    generator = np.random.default_rng(0)
    centres = np.repeat(np.arange(len(sizes)), sizes)
    points = np.stack([10.0 * centres, np.zeros(len(centres))], 1)
    return generator.permutation(points + 0.1 * generator.standard_normal(points.shape))


def batch(size: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of awkward magnitudes, t and regions (size,)."""
    generator = np.random.default_rng(1)
    losses = np.exp(2 * generator.standard_normal(size))
    return losses, generator.random(size), generator.integers(0, count, size)


def one_bin(values: list[float], counts: list[int]) -> np.ndarray:
    """The table (3, K, 10) of regions with constant losses, all in the first t-bin."""
    out = np.zeros((3, len(values), T_BINS))
    out[2, :, 0] = counts
    out[0, :, 0] = np.multiply(values, counts)
    out[1, :, 0] = np.multiply(np.square(values), counts)
    return out


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (0, [0.663333, 0.213333, 0.123333]),
        (1, [0.295833, 0.333333, 0.370833]),
        (2, [0.085833, 0.273333, 0.640833]),
    ],
)
def test_golden_allocations(gamma: float, expected: list[float]):
    q = allocate(PI, D, RegionsConfig(gamma=gamma, epsilon=0.1))
    assert q == pytest.approx(expected, abs=1e-6)


def test_golden_weights_are_unbiased_and_cost_this_much():
    q = allocate(PI, D, RegionsConfig(gamma=1, epsilon=0.1))
    w = ratios(PI, q)
    assert w == pytest.approx([2.366197, 0.6, 0.269663], abs=1e-6)
    assert q @ w == pytest.approx(1)
    assert q @ (w * D) == pytest.approx(0.24)
    batch_of_q = np.repeat(w, [710, 800, 890])
    assert effective_sample_size(batch_of_q) / 2400 == pytest.approx(0.5545374, abs=1e-6)


def test_drawing_by_mass_times_discrepancy_has_the_least_variance():
    second = 2 * D**2  # exponential losses: the deviation is the mean
    best = PI * D / (PI @ D)
    assert estimator_variance(PI, best, D, second) == pytest.approx(0.0576)
    assert estimator_variance(PI, PI, D, second) == pytest.approx(0.1824)
    for nudge in ([0.01, -0.01, 0], [0, 0.01, -0.01], [-0.01, 0, 0.01]):
        assert estimator_variance(PI, best + nudge, D, second) > 0.0576


def test_no_gamma_and_no_floor_is_the_base_distribution_bit_for_bit():
    pi = np.random.default_rng(0).dirichlet(np.ones(97))
    d = np.random.default_rng(1).random(97)
    q = allocate(pi, d, RegionsConfig(gamma=0, epsilon=0))
    assert q.tobytes() == pi.tobytes()
    assert (ratios(q, pi) == 1).all()


def test_softmax_tilts_by_the_exponential_and_forgets_it_when_hot():
    cold = allocate(PI, D, RegionsConfig(allocation="softmax", temperature=0.5, epsilon=0))
    assert cold == pytest.approx(PI * np.exp(D / 0.5) / (PI @ np.exp(D / 0.5)))
    hot = allocate(PI, D, RegionsConfig(allocation="softmax", temperature=1e9, epsilon=0))
    assert hot == pytest.approx(PI, abs=1e-8)
    freezing = allocate(PI, 1000 * D, RegionsConfig(allocation="softmax", temperature=1e-3))
    assert freezing == pytest.approx([1 / 30, 1 / 30, 0.9 + 1 / 30])


def test_regions_without_mass_are_never_drawn_and_take_no_floor():
    pi = np.array([0.75, 0.25, 0])
    q = allocate(pi, np.array([0.1, 0.3, 50]), RegionsConfig(gamma=1, epsilon=0.2))
    assert q == pytest.approx([0.5, 0.5, 0])
    assert q[2] == 0
    assert ratios(pi, q)[2] == 0


@pytest.mark.parametrize(
    ("pi", "d", "problem"),
    [
        ([0.7, 0.2], [1.0, 1.0], "sum to 0.9"),
        ([1.2, -0.2], [1.0, 1.0], "not negative"),
        ([0.5, 0.5], [1.0], "2 numbers"),
        ([0.5, 0.5], [1.0, np.nan], "at least 0"),
        ([0.5, 0.5], [1.0, -1.0], "at least 0"),
        ([0.5, 0.5], [0.0, 0.0], "every discrepancy is 0"),
    ],
)
def test_allocation_refuses_nonsense(pi: list[float], d: list[float], problem: str):
    with pytest.raises(ValueError, match=problem):
        allocate(np.array(pi), np.array(d), RegionsConfig())


def test_the_tracker_does_not_depend_on_how_samples_were_split_over_ranks():
    losses, t, regions = batch(1000, 7)
    whole = Tracker.start(7, 0.1).observe(*table(losses, t, regions, 7))
    order = np.random.default_rng(2).permutation(1000)
    for ranks in (2, 3, 8):
        parts = [
            table(losses[rows], t[rows], regions[rows], 7) for rows in np.array_split(order, ranks)
        ]
        split = Tracker.start(7, 0.1).observe(*np.sum(parts, axis=0))
        assert split.state() == whole.state()


def test_a_region_s_discrepancy_is_the_mean_of_its_normalised_losses():
    losses, t, regions = batch(500, 4)
    tracker = Tracker.start(4, 0.1).observe(*table(losses, t, regions, 4))
    relative = tracker.normalised(losses, t)
    expected = [relative[regions == k].mean() for k in range(4)]
    squares = [(relative[regions == k] ** 2).mean() for k in range(4)]
    assert tracker.mean == pytest.approx(np.array(expected), rel=1e-7)
    assert tracker.second == pytest.approx(np.array(squares), rel=1e-7)
    assert tracker.count.tolist() == np.bincount(regions).tolist()
    assert relative[t < 0.1].mean() == pytest.approx(1)


def test_the_scale_of_a_noise_level_does_not_make_a_region_hard():
    t = np.tile([0.05, 0.95], 50)
    regions = np.repeat([0, 1], 50)
    losses = np.where(t < 0.5, 100.0, 0.01) * np.where(regions == 1, 3, 1)
    tracker = Tracker.start(2, 0.1).observe(*table(losses, t, regions, 2))
    assert tracker.mean == pytest.approx([0.5, 1.5], rel=1e-6)


def test_the_first_observation_is_taken_as_it_is_and_the_second_is_bias_corrected():
    first = Tracker.start(2, 0.1).observe(*one_bin([0.5, 1.5], [4, 4]))
    assert first.mean.tolist() == [0.5, 1.5]
    second = first.observe(*one_bin([1.5, 0.5], [4, 4]))
    assert second.mean[0] == pytest.approx((0.9 * 0.5 + 1.5) / 1.9)
    assert first.mean.tolist() == [0.5, 1.5]


def test_only_regions_that_were_seen_move():
    first = Tracker.start(2, 0.5).observe(*one_bin([0.5, 1.5], [4, 4]))
    second = first.observe(*one_bin([1.0, 0.0], [4, 0]))
    assert second.mean[1] == 1.5
    assert second.weight[1] == first.weight[1]
    assert second.count.tolist() == [8, 4]


def test_a_region_never_seen_starts_at_the_global_mean_then_at_its_first_observation():
    pi = np.array([0.6, 0.2, 0.2])
    start = Tracker.start(3, 0.1)
    assert start.discrepancy(pi).tolist() == [1, 1, 1]
    first = start.observe(*one_bin([0.5, 1.5, 0], [4, 4, 0]))
    assert first.discrepancy(pi) == pytest.approx([0.5, 1.5, (0.6 * 0.5 + 0.2 * 1.5) / 0.8])
    late = first.observe(*one_bin([0, 0, 2.0], [0, 0, 4]))
    assert late.discrepancy(pi)[2] == pytest.approx(2.0 / late.level[0])


def test_the_average_lags_a_drift_by_nine_hundredths():
    tracker = Tracker.start(2, 0.1)
    for step in range(200):
        rising = 0.01 * step
        # The other region falls as much: the level stays 1.
        tracker = tracker.observe(*one_bin([rising, 2 - rising], [1, 1]))
    assert tracker.mean[0] - 1.99 == pytest.approx(-0.09, abs=1e-6)
    assert tracker.mean[1] - 0.01 == pytest.approx(0.09, abs=1e-6)


def test_a_student_that_is_the_teacher_is_average_everywhere():
    tracker = Tracker.start(2, 0.1).observe(*one_bin([0.0, 0.0], [3, 5]))
    assert tracker.mean.tolist() == [1, 1]
    assert tracker.normalised(np.zeros(1), np.zeros(1)).tolist() == [1]


def test_a_tracker_comes_back_from_json_and_goes_on_the_same():
    losses, t, regions = batch(100, 5)
    tracker = Tracker.start(5, 0.3).observe(*table(losses, t, regions, 5))
    again = Tracker.from_state(json.loads(json.dumps(tracker.state())))
    assert again.state() == tracker.state()
    later = table(losses[:50], t[:50], regions[:50], 5)
    assert again.observe(*later).state() == tracker.observe(*later).state()


def test_the_tracker_refuses_what_would_spoil_it():
    tracker = Tracker.start(2, 0.1)
    with pytest.raises(ValueError, match="not finite"):
        tracker.observe(*one_bin([np.nan, 1.0], [1, 1]))
    with pytest.raises(ValueError, match="for 2 regions"):
        tracker.observe(*one_bin([1.0], [1]))
    with pytest.raises(ValueError, match="unknown region 2: there are 2"):
        table(np.ones(2), np.zeros(2), np.array([0, 2]), 2)
    with pytest.raises(ValueError, match="unknown region -1"):
        table(np.ones(1), np.zeros(1), np.array([-1]), 2)
    with pytest.raises(ValueError, match="t outside"):
        table(np.ones(1), np.array([np.nan]), np.array([0]), 2)
    with pytest.raises(ValueError, match="observe the batch first"):
        tracker.normalised(np.ones(1), np.zeros(1))
    with pytest.raises(ValueError, match="level"):
        Tracker.from_state({k: v for k, v in tracker.state().items() if k != "level"})


def test_labels_become_regions_in_their_order():
    masses = np.array([0.4, 0.1, 0.3, 0.2])
    regions = Regions.by_label([10, 9, 10, 2], masses)
    assert regions.names == ("2", "9", "10")
    assert regions.index.tolist() == [2, 1, 2, 0]
    assert regions.pi == pytest.approx([0.2, 0.1, 0.7])
    assert Regions.by_label(["a", "b", "a", "a"]).pi.tolist() == [0.75, 0.25]


def test_kmeans_finds_clusters_and_numbers_them_by_their_first_condition():
    points = clusters([30, 20, 10, 25, 15])
    regions = Regions.by_kmeans(points, 5, seed=0)
    _, first, truth = np.unique(
        np.round(points[:, 0]) // 10, return_index=True, return_inverse=True
    )
    assert regions.index.tolist() == [sorted(first).index(first[k]) for k in truth]
    assert sorted(regions.pi) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    for seed in range(3):
        assert Regions.by_kmeans(points, 5, seed=seed).to_json() == regions.to_json()


def test_small_regions_join_the_nearest():
    points = clusters([30, 3, 20])
    # The small cloud moves towards the last one.
    points[np.abs(points[:, 0] - 10) < 2, 0] += 4
    assert len(Regions.by_kmeans(points, 3, seed=0, minimum=3).names) == 3
    regions = Regions.by_kmeans(points, 3, seed=0, minimum=4)
    assert sorted(np.bincount(regions.index)) == [23, 30]
    small = np.abs(points[:, 0] - 14) < 2
    assert set(regions.index[small]) == set(regions.index[points[:, 0] > 18])
    assert len(Regions.by_kmeans(points, 3, seed=0, minimum=50).names) == 1


def test_regions_come_back_from_json_exactly():
    masses = np.random.default_rng(0).dirichlet(np.ones(9))
    regions = Regions.by_label(np.arange(9) % 4, masses)
    again = Regions.from_json(regions.to_json())
    assert again.index.tobytes() == regions.index.tobytes()
    assert again.masses.tobytes() == regions.masses.tobytes()
    assert again.names == regions.names
    assert again.pi.tobytes() == regions.pi.tobytes()


def test_pairs_lie_in_the_regions_of_their_conditions():
    pool = Regions.by_label(["a", "b", "c", "b"])
    pairs = pool.take(np.array([0, 0, 0, 3]))
    assert pairs.index.tolist() == [0, 0, 0, 1]
    assert pairs.names == pool.names
    assert pairs.pi.tolist() == [0.75, 0.25, 0]
    with pytest.raises(ValueError, match="unknown condition 4"):
        pool.take(np.array([4]))


def test_partitions_refuse_what_is_none():
    with pytest.raises(ValueError, match=r"sum to 0\.8, not to 1"):
        Regions.by_label([0, 1], np.array([0.4, 0.4]))
    with pytest.raises(ValueError, match="not negative"):
        Regions.by_label([0, 1], np.array([1.5, -0.5]))
    with pytest.raises(ValueError, match="one each"):
        Regions.by_label([0, 1], np.ones(1))
    with pytest.raises(ValueError, match="unknown region 3: there are 2"):
        Regions(np.array([0, 3]), np.array([0.5, 0.5]), ("a", "b"))
    with pytest.raises(ValueError, match="2 conditions do not make 3"):
        Regions.by_kmeans(np.zeros((2, 4)), 3, seed=0)
    with pytest.raises(ValueError, match="index, masses and names"):
        Regions.from_json("{}")


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(ValidationError, match="need a count"):
        RegionsConfig(kind="kmeans")
    with pytest.raises(ValidationError, match="belong to kind kmeans"):
        RegionsConfig(count=8)
    config = RegionsConfig(kind="kmeans", count=8, minimum=4)
    assert RegionsConfig.model_validate(config.model_dump()) == config
