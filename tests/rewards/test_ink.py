"""Compressibility: minus the kilobytes of the PNG."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.calling import call_reward
from rewards.ink import Ink, compressibility, png_bytes

NOISE = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def test_a_blank_image_is_worth_more_than_noise_in_grey_and_colour():
    for channels in (1, 3):
        noise = NOISE[:1, ..., :channels]
        blank, noisy = compressibility([], [np.zeros_like(noise), noise])
        assert blank is not None and noisy is not None
        assert noisy < -noise.size / 1024 < blank < 0


def test_the_unit_is_kilobytes_and_frames_are_averaged():
    clip = np.stack([NOISE[0], np.zeros_like(NOISE[0])])
    (got,) = compressibility([], [clip])
    assert png_bytes(clip[1]) < png_bytes(clip[0]) / 10
    assert got == pytest.approx(-(png_bytes(clip[0]) + png_bytes(clip[1])) / 2 / 1024)


def test_it_serves_as_a_reward():
    media = [NOISE[:1], NOISE[:1] // 255]
    scores = call_reward("ink", Ink().build(), ["a", "b"], media, {"digit": [1, 2]}, 64)
    assert scores.failures == ()
    assert scores.values[1] > scores.values[0]
