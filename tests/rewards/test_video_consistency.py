"""Temporal consistency on a small random CLIP: cosines of successive frames, and motion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_score import ROUNDING, in_torch, save_clip, slopes, videos
from transformers import CLIPModel, CLIPProcessor

from rewards.calling import call_reward
from rewards.contract import DifferentiableReward, SetMetric
from rewards.video_consistency import TemporalConsistency


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def reward(model: Path, **options: Any) -> Any:
    return TemporalConsistency(model=str(model), **options).build()


def published(model: Path, frames: np.ndarray) -> float:
    """Mean cosine of successive frames by transformers."""
    clip: Any = CLIPModel.from_pretrained(model).eval()
    processor: Any = CLIPProcessor.from_pretrained(model)
    inputs = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    with torch.no_grad():
        embedded = clip.get_image_features(**inputs).pooler_output
    return float(torch.cosine_similarity(embedded[1:], embedded[:-1]).mean())


def test_consistency_is_the_mean_cosine_of_successive_frames(model: Path):
    media = videos((5, 40, 61, 3))
    want = [published(model, frames) for frames in media]
    assert max(want) < 0.95
    assert reward(model)(["", ""], media) == pytest.approx(want, abs=1e-5)
    thinned = [published(model, frames[[0, 2, 4]]) for frames in media]
    assert reward(model, frames=3)(["", ""], media) == pytest.approx(thinned, abs=1e-5)


def test_order_counts(model: Path):
    a, b = videos((2, 28, 28, 3))[0]
    steady, flicker = reward(model)(["", ""], [np.stack([a, a, b, b]), np.stack([a, b, a, b])])
    assert steady == pytest.approx((2 + published(model, np.stack([a, b]))) / 3, abs=1e-5)
    assert steady > flicker + 0.02


def test_a_still_video_is_consistent_and_motion_weight_asks_for_more(model: Path):
    still = np.repeat(videos((1, 28, 28, 3))[0], 3, axis=0)
    step = np.zeros((3, 28, 28, 3), np.uint8)
    step[1:] = 51
    assert reward(model)([""], [still]) == pytest.approx([1], abs=1e-5)
    assert reward(model, motion_weight=2.0)([""], [still]) == pytest.approx([1], abs=1e-5)
    (plain,), (weighted,) = (reward(model, motion_weight=w)([""], [step]) for w in (0.0, 2.0))
    # One of two changes is of 51 of 255 levels, in all pixels; uint8 does not wrap around.
    assert weighted - plain == pytest.approx(2 * 0.1, abs=1e-6)
    assert reward(model, motion_weight=1.0)([""], [step[::-1]]) == pytest.approx(
        [plain + 0.1], abs=1e-5
    )


def test_a_single_frame_is_not_scored(model: Path):
    media = [videos()[0], videos()[1][:1]]
    scores = call_reward("steady", reward(model), ["", ""], media, {}, 64)
    assert scores.failures == () and scores.not_scored == 1
    assert np.isfinite(scores.values[0]) and np.isnan(scores.values[1])
    with pytest.raises(ValueError, match="two frames or more"):
        reward(model).differentiable([""], in_torch(media[1:]))


@pytest.mark.parametrize(
    ("shape", "tolerance"), [((3, 28, 28, 3), 1e-5), ((3, 40, 61, 1), ROUNDING)]
)
def test_both_forms_agree(model: Path, shape: tuple[int, ...], tolerance: float):
    both = reward(model, motion_weight=3.0, frames=2)
    media = videos(shape)
    served = both(["", ""], media)
    assert isinstance(both, DifferentiableReward) and isinstance(both, SetMetric)
    got = both.differentiable(["", ""], in_torch(media))
    assert got.tolist() == pytest.approx(served, abs=tolerance)


def test_gradients_are_those_of_finite_differences(model: Path):
    score = reward(model, motion_weight=3.0).differentiable
    pixels = 0.25 + 0.5 * in_torch(videos((3, 33, 40, 3)))
    by_autograd, measured = slopes(lambda x: score(["", ""], x), pixels)
    assert (by_autograd > 0.01).all()
    np.testing.assert_allclose(measured, by_autograd, rtol=0.02)


def test_a_set_has_both_parts(model: Path):
    media = videos()
    found = reward(model, motion_weight=5.0).describe_set(["", ""], media)
    assert found["consistency"] == pytest.approx(
        np.mean([published(model, frames) for frames in media]), abs=1e-5
    )
    moved = [np.abs(np.diff(frames / 255, axis=0)).mean() for frames in media]
    assert found["motion"] == pytest.approx(np.mean(moved), abs=1e-6)
    none = reward(model).describe_set([""], [media[0][:1]])
    assert math.isnan(none["consistency"]) and math.isnan(none["motion"])
