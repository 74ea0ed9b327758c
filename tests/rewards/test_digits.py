"""The digit classifiers and the distance to real digits."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.digits import (
    FIRST_HELD_OUT,
    DigitHeldOutReward,
    DigitLogProbReward,
    asked_digits,
    real_digits,
)
from rewards.frechet import frechet_distance
from rewards.ink import compressibility
from rollout.policies.digits import training_digits


def media(images: np.ndarray) -> list[np.ndarray]:
    return list((images * 255).round().astype(np.uint8).reshape(-1, 1, 8, 8, 1))


@pytest.fixture(scope="module")
def unseen() -> tuple[list[np.ndarray], list[int]]:
    images, labels = real_digits()
    return media(images[:FIRST_HELD_OUT]), labels[:FIRST_HELD_OUT].tolist()


def test_generator_and_classifiers_learn_from_different_digits():
    generated, labels = training_digits()
    images, real = real_digits()
    np.testing.assert_array_equal((generated + 1) / 2, images[:FIRST_HELD_OUT])
    np.testing.assert_array_equal(labels, real[:FIRST_HELD_OUT])
    assert len(images) - FIRST_HELD_OUT == 900


def test_both_classifiers_know_digits_they_have_not_seen(unseen):
    images, labels = unseen
    trained = DigitLogProbReward().log_probs(images).argmax(1)
    assert (trained == labels).mean() >= 0.975
    held_out = DigitHeldOutReward()(["x"] * len(labels), images, digit=labels)
    assert np.mean(held_out) >= 0.98


def test_log_probability_is_of_the_asked_digit(unseen):
    images, labels = unseen
    reward = DigitLogProbReward()
    right = reward(["x"] * 20, images[:20], digit=labels[:20])
    wrong = reward(["x"] * 20, images[:20], digit=[(d + 1) % 10 for d in labels[:20]])
    assert max(right) <= 0
    assert np.mean(right) > np.mean(wrong) + 5
    assert reward([f"a handwritten {labels[0]}"], images[:1]) == pytest.approx(right[:1], abs=1e-5)


def test_frames_of_a_video_are_averaged(unseen):
    images, _ = unseen
    reward = DigitLogProbReward()
    clip = np.concatenate([images[0], images[1]])
    both = reward(["3", "3"], images[:2])
    assert reward(["3"], [clip]) == pytest.approx([np.mean(both)], abs=1e-5)


def test_a_prompt_without_a_digit_is_an_error():
    with pytest.raises(ValueError, match="names no digit"):
        asked_digits(["a cat"], None)


def test_real_digits_are_near_themselves_and_noise_is_far(unseen):
    images, labels = unseen
    reward = DigitHeldOutReward()
    near = reward.describe_set(["x"] * len(labels), images, digit=labels)
    assert near["frechet"] < 0.1
    assert near["diversity"] == pytest.approx(1.0, abs=0.05)
    assert near["recall/3"] > 0.95
    noise = np.random.default_rng(0).random((200, 8, 8))
    far = reward.describe_set(["x"] * 200, media(noise), digit=labels[:200])
    assert far["frechet"] > 10 * near["frechet"]
    one_face = reward.describe_set(["x"] * 50, [images[0]] * 50, digit=[labels[0]] * 50)
    assert one_face["diversity"] == pytest.approx(0.0, abs=1e-6)


def test_frechet_of_gaussians_is_the_closed_form():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(200_000, 2)) * [1.0, 2.0]
    b = generator.normal(size=(200_000, 2)) * [3.0, 2.0] + [1.0, -1.0]
    assert frechet_distance(a, b) == pytest.approx(2 + (3 - 1) ** 2, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_less_ink_is_more_reward():
    blank, dense = (
        np.zeros((1, 16, 16, 1), np.uint8),
        np.random.default_rng(0).integers(0, 255, (1, 16, 16, 1), np.uint8),
    )
    first, second = compressibility(["", ""], [blank, dense])
    assert first is not None and second is not None
    assert 0 > first > second
