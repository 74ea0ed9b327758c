"""Diagnostics of distillation: their numbers, what they must catch, what must not alarm them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.diagnostics import (
    collapse_began,
    discriminator_metrics,
    mismatch,
    statistics_drift,
)
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy

RATIOS = ("contrast_ratio", "sharpness_ratio", "motion_ratio")


def logits(seed: int, n: int, mean: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 2, n)


def test_discriminator_numbers_by_hand():
    metrics = discriminator_metrics(np.array([[3.0, -1.0], [5.0, 1.0]]), np.array([-9.0, 1.0]))
    assert metrics == pytest.approx(
        {
            "accuracy": 0.625,
            "accuracy/real": 0.75,
            "accuracy/fake": 0.5,
            "logit_gap": 2.0 + 4.0,
            "saturated": (0.25 + 0.5) / 2,
            "nonfinite": 0.0,
        }
    )


def test_accuracy_is_balanced_between_unequal_numbers_of_real_and_fake():
    always_real = discriminator_metrics(np.full(900, 2.0), np.full(100, 2.0))
    assert always_real["accuracy"] == 0.5
    assert always_real["logit_gap"] == 0


def test_a_discriminator_that_starts_at_zero_is_undecided_not_wrong():
    assert discriminator_metrics(np.zeros(4), np.zeros(4))["accuracy"] == 0.5


def test_logits_far_on_the_wrong_side_are_not_saturated():
    metrics = discriminator_metrics(np.full(5, -50.0), np.full(5, 50.0))
    assert metrics["saturated"] == 0 and metrics["accuracy"] == 0
    won = discriminator_metrics(np.full(5, 50.0), np.full(5, -50.0))
    assert won["saturated"] == 1 and won["accuracy"] == 1


def test_logits_that_are_not_finite_are_counted_and_leave_the_rest_alone():
    real, fake = logits(0, 50, 1), logits(1, 30, -1)
    clean = discriminator_metrics(real, fake)
    broken = discriminator_metrics(np.append(real, [np.nan, np.inf]), fake)
    assert broken["nonfinite"] == pytest.approx(2 / 82)
    assert {**broken, "nonfinite": 0.0} == pytest.approx(clean)


def test_a_side_without_finite_logits_is_nan_not_an_accuracy():
    for fake in (np.full(3, np.nan), np.zeros(0)):
        metrics = discriminator_metrics(np.ones(3), fake)
        assert math.isnan(metrics["accuracy"]) and math.isnan(metrics["logit_gap"])
        assert metrics["accuracy/real"] == 1
    assert math.isnan(discriminator_metrics(np.zeros(0), np.zeros(0))["nonfinite"])


def test_discriminator_metrics_ignore_order_and_turn_around_when_the_sides_swap():
    real, fake = logits(2, 40, 1), logits(3, 60, -1)
    metrics = discriminator_metrics(real, fake)
    assert discriminator_metrics(real[::-1], fake[::-1]) == pytest.approx(metrics)
    swapped = discriminator_metrics(fake, real)
    assert swapped["accuracy"] == pytest.approx(1 - metrics["accuracy"])
    assert swapped["logit_gap"] == pytest.approx(-metrics["logit_gap"])


def videos(seed: int, n: int = 24, frames: int = 5, channels: int = 3) -> np.ndarray:
    """Smooth waves of random phase that move, in 25 % to 75 % of the range."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16] / 16
    phase = generator.uniform(0, 2 * np.pi, (n, 1, 1, 1, channels))
    time = np.arange(frames)[None, :, None, None, None] / 4
    wave = np.sin(2 * np.pi * (x + y)[None, None, :, :, None] + phase + time)
    noise = 0.01 * generator.standard_normal((n, frames, 16, 16, channels))
    return to_media(0.5 + 0.25 * wave + noise)


def to_media(x: np.ndarray) -> np.ndarray:
    return (x * 255).round().clip(0, 255).astype(np.uint8)


def test_media_statistics_by_hand():
    # Channel 0: columns 0 and 255; channel 1: 51 everywhere. Teacher: 102 everywhere.
    student = np.zeros((2, 1, 2, 2, 2), np.uint8)
    student[..., 1, 0] = 255
    student[..., 1] = 51
    metrics = statistics_drift(student, np.full((3, 1, 4, 4, 2), 102, np.uint8))
    assert metrics["mean/0"] == pytest.approx(0.5 - 0.4)
    assert metrics["mean/1"] == pytest.approx(0.2 - 0.4)
    assert metrics["std/0"] == pytest.approx(0.5)
    assert metrics["std/1"] == pytest.approx(0)
    assert metrics["black/student"] == metrics["white/student"] == 0.25
    assert metrics["black/teacher"] == metrics["white/teacher"] == 0
    assert metrics["contrast_ratio"] == math.inf
    assert math.isnan(metrics["sharpness_ratio"])
    assert "motion_ratio" not in metrics


def test_media_equal_to_the_teacher_s_drift_by_nothing():
    media = videos(0)
    metrics = statistics_drift(media[::-1], media)
    assert [metrics[name] for name in RATIOS] == pytest.approx([1, 1, 1])
    assert max(abs(metrics[f"{kind}/{c}"]) for kind in ("mean", "std") for c in range(3)) < 1e-9


def test_other_samples_of_the_same_kind_do_not_alarm():
    metrics = statistics_drift(videos(1, n=40, frames=3), videos(2))
    assert [metrics[name] for name in RATIOS] == pytest.approx([1, 1, 1], abs=0.03)
    assert max(abs(metrics[f"{kind}/{c}"]) for kind in ("mean", "std") for c in range(3)) < 0.01


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_colour_cast_shows_in_its_channel_only(channels: int):
    teacher = videos(0, channels=channels)
    student = teacher.copy()
    student[..., -1] += 26
    metrics = statistics_drift(student, teacher)
    drift = [metrics[f"mean/{c}"] for c in range(channels)]
    assert drift == pytest.approx([0.0] * (channels - 1) + [26 / 255])
    assert [metrics[name] for name in RATIOS] == pytest.approx([1, 1, 1])


def test_washed_out_colours_lower_contrast_but_not_sharpness():
    teacher = videos(0)
    metrics = statistics_drift(to_media(0.5 + 0.5 * (teacher / 255 - 0.5)), teacher)
    assert metrics["contrast_ratio"] == pytest.approx(0.5, abs=0.01)
    assert metrics["motion_ratio"] == pytest.approx(0.25, abs=0.02)
    assert metrics["sharpness_ratio"] == pytest.approx(1, abs=0.02)
    assert metrics["std/0"] == pytest.approx(-0.25 / math.sqrt(8), abs=0.003)
    assert metrics["mean/0"] == pytest.approx(0, abs=0.005)


def test_sharpening_shows_beyond_contrast_and_blur_below():
    teacher = videos(0)
    x = teacher / 255
    blurred = (x + sum(np.roll(x, s, axis) for s in (1, -1) for axis in (2, 3))) / 5
    sharp = statistics_drift(to_media(x + 4 * (x - blurred)), teacher)
    assert sharp["sharpness_ratio"] > 1.2
    assert statistics_drift(to_media(blurred), teacher)["sharpness_ratio"] < 0.97
    stripes = np.zeros((1, 1, 8, 8, 1), np.uint8)
    stripes[:, :, ::2] = 200
    assert statistics_drift(stripes, stripes.swapaxes(2, 3))["sharpness_ratio"] == 1


def test_over_saturation_shows_as_clipped_pixels_of_the_student_only():
    teacher = videos(0)
    metrics = statistics_drift(to_media(0.5 + 3 * (teacher / 255 - 0.5)), teacher)
    assert metrics["black/student"] > 0.2 and metrics["white/student"] > 0.2
    assert metrics["black/teacher"] == metrics["white/teacher"] == 0
    assert metrics["contrast_ratio"] > 1.5


def test_a_frozen_video_has_no_motion_though_every_frame_is_right():
    teacher = videos(0)
    frozen = np.repeat(teacher[:, :1], teacher.shape[1], axis=1)
    metrics = statistics_drift(frozen, teacher)
    assert metrics["motion_ratio"] == 0
    assert metrics["contrast_ratio"] == pytest.approx(1, abs=0.01)
    assert statistics_drift(teacher, frozen)["motion_ratio"] == math.inf
    assert math.isnan(statistics_drift(frozen, frozen)["motion_ratio"])


def test_media_that_cannot_be_compared_are_refused():
    good = videos(0, n=2)
    for bad in (good / 255, good[0], good[:0]):
        with pytest.raises(ValueError, match="teacher media must be uint8"):
            statistics_drift(good, bad)
    with pytest.raises(ValueError, match="channels"):
        statistics_drift(good, good[..., :1])


def history(values: list[float]) -> list[tuple[int, float]]:
    return [(10 * i, value) for i, value in enumerate(values)]


def test_collapse_begins_at_the_first_of_the_low_evaluations():
    fallen = [0.5, 0.7, 0.8, 0.8, 0.78, 0.7, 0.6, 0.4, 0.2]
    # Best 0.8, line 0.72: 0.7 at step 50 is the first below.
    assert collapse_began(history(fallen)) == 50
    assert collapse_began(history([-v for v in fallen]), rising=False) == 50
    assert collapse_began(history([10 * v for v in fallen])) == 50
    assert collapse_began(history(fallen[:7])) is None  # two low ones are not three
    assert collapse_began(history(fallen[:7]), patience=2) == 50


def test_a_plateau_after_learning_is_no_collapse():
    assert collapse_began(history([0.1, 0.4, 0.7, *[0.8] * 50])) is None
    assert collapse_began(history([0.8] * 5)) is None
    assert collapse_began([]) is None


def test_noise_within_the_drop_never_alarms():
    for seed in range(50):
        noise = 0.02 * np.random.default_rng(seed).standard_normal(200)
        values = 0.8 - 0.5 * np.exp(-np.arange(200) / 10) + noise
        assert collapse_began(history(values.tolist())) is None


def test_a_collapse_under_noise_is_dated_to_within_a_few_evaluations():
    for seed in range(50):
        noise = 0.02 * np.random.default_rng(seed).standard_normal(60)
        values = 0.8 + noise - 0.03 * np.maximum(np.arange(60) - 30, 0)
        found = collapse_began(history(values.tolist()))
        # The line is 0.08 to 0.1 under 0.8 plus what the noise adds to the best.
        assert found is not None and 300 < found <= 370


def test_a_spike_up_or_down_is_no_collapse():
    level = [0.5] * 10
    assert collapse_began(history([*level, 0.9, *level])) is None
    assert collapse_began(history([*level, 0.1, 0.1, *level])) is None
    assert collapse_began(history([0.5, 0.9, *level])) is None
    assert collapse_began(history([*level, 0.9, 0.9, *level])) == 120  # held: it counts


def test_a_late_recovery_ends_the_collapse_and_one_good_evaluation_does_not():
    fall = [0.8] * 5 + [0.3] * 20
    assert collapse_began(history(fall)) == 50
    assert collapse_began(history([*fall, 0.8, 0.3, 0.3, 0.3])) == 50
    assert collapse_began(history([*fall, 0.8, 0.8])) == 50
    assert collapse_began(history([*fall, 0.8, 0.8, 0.8])) is None
    assert collapse_began(history([*fall, *[0.8] * 3, *[0.2] * 3])) == 280


def test_near_zero_the_absolute_drop_decides():
    log_prob = [-2.0, -0.5, -0.02, -0.01, -0.015, -0.02, -0.018, -0.02]
    assert collapse_began(history(log_prob)) is not None
    assert collapse_began(history(log_prob), absolute=0.05) is None
    assert collapse_began(history([*log_prob, -1.0, -1.5, -2.0]), absolute=0.05) == 80


def test_numbers_that_turn_into_nan_are_a_collapse_and_those_that_never_were_are_not():
    nan = math.nan
    assert collapse_began(history([0.5, 0.6, 0.6, nan, nan, nan])) == 30
    assert collapse_began(history([0.5, 0.6, nan, 0.6, 0.6])) is None
    assert collapse_began(history([nan] * 6)) is None
    assert collapse_began(history([1.0, 1.0, *[-math.inf] * 3])) == 20
    assert collapse_began(history([math.inf, *[5.0] * 6]), rising=False) is None


def test_a_history_out_of_order_is_refused():
    with pytest.raises(ValueError, match="ascend"):
        collapse_began([(0, 1.0), (20, 1.0), (10, 1.0)])
    with pytest.raises(ValueError, match="patience"):
        collapse_began([(0, 1.0)], patience=0)


@torch.no_grad()
def two_steps(
    policy: WanPolicy, noise: torch.Tensor, middle: float = 0.75, late: float = 0.0, batch: int = 16
) -> np.ndarray:
    """Two Euler steps over times 1, ``middle``, 0; the network is told times ``late`` too small."""
    condition = policy.encode([f"a handwritten {i % 10}" for i in range(len(noise))])
    parts: list[torch.Tensor] = []
    for x, asked in zip(noise.split(batch), condition.split(batch), strict=True):
        for time, end in ((1.0, middle), (middle, 0.0)):
            x = x + (end - time) * policy.velocity(x, torch.full((len(x),), time - late), asked)
        parts.append(x)
    return torch.cat(parts).numpy()


def test_rounding_agrees_and_a_wrong_time_or_other_noise_does_not(base_policy: WanPolicy):
    noise = torch.randn(16, *base_policy.latent_shape, generator=torch.Generator().manual_seed(1))
    policies = {"float32": base_policy, "bfloat16": WanConfig(dtype="bfloat16").build()}
    right = {dtype: two_steps(policy, noise) for dtype, policy in policies.items()}

    def agrees(training: np.ndarray, dtype: str) -> bool:
        return mismatch(training, right[dtype], dtype)["mismatch/agrees"] == 1

    for dtype, policy in policies.items():
        assert agrees(two_steps(policy, noise, batch=5), dtype)
        assert not agrees(two_steps(policy, noise, middle=0.6), dtype)
        assert not agrees(two_steps(policy, noise, late=0.02), dtype)
        assert not agrees(two_steps(policy, noise.flip(0)), dtype)
    assert mismatch(right["bfloat16"], right["float32"], "bfloat16")["mismatch/agrees"] == 1
    assert not agrees(right["bfloat16"], "float32")


def test_mismatch_numbers_follow_the_scale_and_not_the_order():
    inference = np.array([[3.0, -3.0], [3.0, 3.0]])
    training = inference + np.array([[0.0, 0.1], [-0.2, 0.0]])
    metrics = mismatch(training, inference, "bfloat16")
    assert metrics == pytest.approx(
        {
            "mismatch/max": 0.2,
            "mismatch/mean": 0.075,
            "mismatch/tolerance": 0.15,
            "mismatch/agrees": 0.0,
        }
    )
    assert mismatch(training[::-1], inference[::-1], "bfloat16") == pytest.approx(metrics)
    scaled = mismatch(100 * training, 100 * inference, "bfloat16")
    assert scaled["mismatch/max"] == pytest.approx(20) and scaled["mismatch/agrees"] == 0
    near = inference + (training - inference) / 2
    assert mismatch(near, inference, "bfloat16")["mismatch/agrees"] == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_one_value_that_is_not_finite_never_agrees(broken: float):
    good = np.ones((4, 3), np.float32)
    bad = good.copy()
    bad[2, 1] = broken
    for training, inference in ((bad, good), (good, bad), (bad, bad)):
        metrics = mismatch(training, inference, "float32")
        assert metrics["mismatch/agrees"] == 0 and metrics["mismatch/max"] == math.inf


def test_mismatch_refuses_other_shapes_and_unknown_dtypes():
    with pytest.raises(ValueError, match="one shape"):
        mismatch(np.ones((4, 3)), np.ones((1, 3)), "float32")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        mismatch(np.ones(3), np.ones(3), "fp32")
