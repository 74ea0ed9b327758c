"""What a soak says of its samples: slopes with errors that hold, leaks, names of processes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.soak import by_process, leaks, report, trend

MINUTES = np.arange(300) / 6 + 10


def noise(seed: int, follow: float) -> np.ndarray:
    """Gaussian, variance 1, each value following the one before."""
    white = np.random.default_rng(seed).normal(size=len(MINUTES))
    values = white.copy()
    for i in range(1, len(values)):
        values[i] = follow * values[i - 1] + np.sqrt(1 - follow**2) * white[i]
    return values


@pytest.mark.parametrize("follow", [0.0, 0.8])
def test_the_interval_holds_the_true_slope_as_often_as_it_says(follow: float):
    held = plain = 0
    for seed in range(400):
        values = noise(seed, follow) + 0.3 * MINUTES
        found, fit = trend(MINUTES, values), stats.linregress(MINUTES, values)
        held += found.low <= 0.3 <= found.high
        plain += abs(fit.slope - 0.3) <= 1.96 * fit.stderr
    assert 0.92 < held / 400 < 0.99
    assert (plain / 400 < 0.7) == (follow > 0)


def test_a_slow_leak_under_noise_grows_and_noise_alone_is_flat():
    leak = 100 * 1024 / (24 * 60)  # KiB a minute: 100 MiB a day
    jitter = 300 * noise(1, 0.5)
    assert trend(MINUTES, 4e5 + jitter).verdict == "flat"
    assert trend(MINUTES, 4e5 + jitter + leak * MINUTES).verdict == "grows"
    assert trend(MINUTES, 4e5 + jitter + leak / 4 * MINUTES).verdict == "flat"


def test_too_much_noise_is_not_called_flat():
    assert trend(MINUTES, 4e5 + 2e5 * noise(0, 0.9)).verdict == "unclear"


def test_a_count_leaks_when_floor_and_median_rise_not_when_it_swings():
    assert not leaks([40, 41, 40, 60, 40, 40] * 10)
    assert not leaks([43, 43, 77, 43, 43] * 6 + [43, 77, 77, 77, 77] * 6)
    assert not leaks([113, 75, 113, 113, 113] * 6 + [113, 82, 113, 113, 113] * 6)
    assert leaks([43 + 34 * (i % 3 > 0) + i // 12 for i in range(60)])


def test_a_process_is_called_by_its_last_title_and_brief_ones_are_counted():
    process = {"kind": "process", "memory": 2**20, "files": 3, "threads": 1}
    rows = [
        process | {"pid": pid, "name": name, "minute": minute}
        for minute in range(30)
        for pid, name in ((7, "IDLE" if minute < 2 else "Worker"), (5, "Worker"), (9, "x"))
        if pid != 9 or minute < 4
    ]
    store = {"kind": "store", "bytes": 2**20, "objects": 2, "references": 4, "step": 8}
    rows += [store | {"minute": minute} for minute in range(30)]
    assert list(by_process(rows)) == ["Worker 0", "Worker 1", "x 0"]
    text = report(rows, warm_up=10)
    assert (
        "| Worker 1 | 1.0 | 1.0 | 1.0 | +0.0 (+0.0…+0.0) | +0 | 3 / 3 / 3 | 1 / 1 / 1 | flat |"
        in text
    )
    assert "29 minutes, 8 steps; 1 processes lived too briefly" in text
