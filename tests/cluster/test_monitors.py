"""What is said of a run while it is on, and what stays silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.monitors import pooled, recursion_metrics, warnings

WATCHED = "evaluation/digit_held_out/accuracy"


def history(values: list[float]) -> list[dict[str, float]]:
    return [{"step": 10 * i, WATCHED: value} for i, value in enumerate(values)]


def test_a_collapse_is_told_with_the_step_where_it_began():
    (message,) = warnings(history([0.6, 0.8, 0.9, 0.4, 0.3, 0.2]), WATCHED)
    assert "step 30" in message and WATCHED in message


@pytest.mark.parametrize("values", [[0.6, 0.8, 0.9, 0.88, 0.9], [0.9, 0.3, 0.9, 0.9], [0.5]])
def test_a_spike_or_a_plateau_is_no_collapse(values: list[float]):
    assert warnings(history(values), WATCHED) == []


def test_nothing_is_watched_without_a_metric():
    assert warnings(history([0.6, 0.8, 0.9, 0.4, 0.3, 0.2]), None) == []


def test_own_samples_are_compared_with_the_first_evaluation(tmp_path: Path):
    """Samples that shrink towards their mean show a falling variance; the reference stays the first."""
    generator = np.random.default_rng(0)
    start = generator.integers(0, 256, (400, 1, 8, 8, 1), dtype=np.uint8)
    first = recursion_metrics(tmp_path, [start[:200], start[200:]])
    ratios = [v for k, v in first.items() if "variance_ratio" in k]
    assert ratios == pytest.approx([1.0] * len(ratios))
    shrunk = ((start.astype(float) - 127.5) * 0.5 + 127.5).round().astype(np.uint8)
    later = recursion_metrics(tmp_path, [shrunk])
    for name, value in later.items():
        if "variance_ratio" in name:
            assert value == pytest.approx(0.25, abs=0.02)
    again = recursion_metrics(tmp_path, [start])
    assert again == pytest.approx(first)


def test_few_samples_say_nothing(tmp_path: Path):
    assert recursion_metrics(tmp_path, [np.zeros((10, 1, 8, 8, 1), np.uint8)]) == {}


def test_pooling_averages_frames_colours_and_cells():
    media = np.zeros((2, 3, 16, 24, 3), np.uint8)
    media[1, :, :2, :3] = 255
    features = pooled(media)
    assert features.shape == (2, 64)
    assert features[1, 0] == pytest.approx(1.0) and features[1, 1:].max() == 0
    assert features[0].max() == 0
