"""Advantages: golden numbers, several rewards, constant groups, missing scores."""

from __future__ import annotations

import numpy as np
import pytest

from rl.advantages import AdvantageConfig, group_advantages

GROUP = AdvantageConfig(std="group")


def test_golden_group():
    (row,) = group_advantages({"r": np.array([[1.0, 2, 3, 4]])}, {"r": 1.0}, GROUP)
    assert row == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-4)


def test_constant_group_is_exactly_zero_even_after_rounding():
    scores = np.full((2, 7), 0.1)
    scores[1] += 1e-17
    assert not group_advantages({"r": scores}, {"r": 1.0}, GROUP).any()


def test_global_std_is_the_batch_s():
    scores = np.array([[0.0, 2.0], [10.0, 12.0]])
    got = group_advantages({"r": scores}, {"r": 1.0}, AdvantageConfig(std="global"))
    assert got == pytest.approx(np.array([[-1, 1], [-1, 1]]) / (scores.std(ddof=1) + 1e-4))


def test_rewards_are_normalised_before_they_are_weighted():
    small = np.array([[0.0, 1.0, 0.0, 1.0]])
    large = 1000 * np.array([[1.0, 0.0, 0.0, 1.0]])
    got = group_advantages({"a": small, "b": large}, {"a": 1.0, "b": 1.0}, GROUP)
    same = group_advantages({"a": small, "b": large / 1000}, {"a": 1.0, "b": 1.0}, GROUP)
    assert got == pytest.approx(same, abs=1e-3)


def test_a_missing_score_is_masked_and_moves_nobody():
    scores = np.array([[1.0, 2.0, np.nan, 3.0]])
    got = group_advantages({"r": scores}, {"r": 1.0}, GROUP)[0]
    without = group_advantages({"r": scores[:, [0, 1, 3]]}, {"r": 1.0}, GROUP)[0]
    assert np.isnan(got[2])
    assert got[[0, 1, 3]] == pytest.approx(without)


def test_advantages_are_clamped():
    scores = np.zeros((1, 64))
    scores[0, 0] = 1e6
    assert group_advantages({"r": scores}, {"r": 1.0}, GROUP).max() == 5.0


def test_watched_rewards_do_not_count():
    scores = np.array([[1.0, 2.0]])
    with pytest.raises(ValueError, match="nothing to train on"):
        group_advantages({"r": scores}, {"r": 0.0}, GROUP)
