"""Frames of image rewards: which count, their pixels in torch, and one score from many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import CLIPImageProcessorPil

from rewards.frames import Preprocessing
from rewards.ocr import Ocr

NOISE = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
LEVEL = 1 / 255


def processor(**options: Any) -> CLIPImageProcessorPil:
    small: Any = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return CLIPImageProcessorPil(**{**small, **options})


@pytest.mark.parametrize(
    ("wanted", "count", "chosen"),
    [
        (None, 3, [0, 1, 2]),
        (9, 3, [0, 1, 2]),
        (1, 9, [4]),
        (3, 9, [1, 4, 7]),
        (4, 81, [10, 30, 50, 70]),
    ],
)
def test_frames_are_evenly_spaced(wanted: int | None, count: int, chosen: list[int]):
    assert Ocr(frames=wanted).choose(count) == chosen


def test_chosen_frames_and_pixels_are_the_same_rgb_frames():
    for media in (NOISE, NOISE[..., :1]):
        (frames,) = Ocr(frames=2).chosen_frames([media])
        np.testing.assert_array_equal(frames, np.broadcast_to(media[[1, 3]], (2, 12, 10, 3)))
        pixels = Ocr(frames=2).chosen_pixels(torch.from_numpy(media[None]).float())
        assert pixels.shape == (1, 2, 3, 12, 10)
        np.testing.assert_array_equal(pixels[0].movedim(1, -1).numpy(), frames)


def test_videos_may_differ_in_size_and_length():
    got = Ocr().chosen_frames([NOISE, NOISE[:1, :4]])
    assert [part.shape for part in got] == [(5, 12, 10, 3), (1, 4, 10, 3)]


@pytest.mark.parametrize(
    "media", [NOISE.astype(np.float32), NOISE[0], NOISE[..., :2], NOISE[:0], NOISE[:, :0]]
)
def test_other_media_are_refused(media: np.ndarray):
    with pytest.raises(ValueError, match=r"uint8 \(frames, height, width, 1 or 3\)|empty"):
        Ocr().chosen_frames([media])


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"not \(5, 12, 10, 3\)"):
        Ocr().chosen_pixels(torch.from_numpy(NOISE))


def test_scores_of_frames_become_their_mean_or_the_mean_of_the_best():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 8.0, 0.0]])
    assert Ocr().aggregated(scores).tolist() == [2.5, 2.0]
    assert Ocr(aggregate="top", top_fraction=0.5).aggregated(scores).tolist() == [3.5, 4.0]
    assert Ocr(aggregate="top", top_fraction=0.01).aggregated(scores).tolist() == [4.0, 8.0]
    thirty = torch.arange(30.0)
    assert Ocr(aggregate="top", top_fraction=0.1).aggregated(thirty) == 28.0
    with pytest.raises(ValidationError):
        Ocr(top_fraction=0.0)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (28, 28), (16, 16), (9, 30)])
@pytest.mark.parametrize("resample", [2, 3])
def test_torch_preprocessing_is_the_processor_s_up_to_a_grey_level(
    shape: tuple[int, int], resample: int
):
    frame = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    kind = processor(resample=resample)
    want: Any = kind(images=frame, return_tensors="pt", input_data_format="channels_last")
    pixels = torch.from_numpy(frame).float().div(255).movedim(-1, 0)[None]
    got = Preprocessing.of(kind)(pixels)
    assert got.shape == want["pixel_values"].shape == (1, 3, 28, 28)
    error = (got - want["pixel_values"]).abs().amax((0, 2, 3)) * torch.tensor(kind.image_std)
    assert error.max() < (1e-6 if shape == (28, 28) else 1.2 * LEVEL)


def test_a_fixed_size_without_crop_or_normalisation_is_followed():
    kind = processor(size={"height": 20, "width": 30}, do_center_crop=False, do_normalize=False)
    want: Any = kind(images=NOISE[0], return_tensors="pt", input_data_format="channels_last")
    pixels = torch.from_numpy(NOISE[:1]).float().div(255).movedim(-1, 1)
    got = Preprocessing.of(kind)(pixels)
    assert got.shape == (1, 3, 20, 30)
    assert (got - want["pixel_values"]).abs().max() < 1.2 * LEVEL


def test_gradients_flow_through_resize_crop_and_normalisation():
    frames = (0.3 + 0.4 * torch.rand(1, 3, 9, 12)).double().requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing.of(processor()), (frames,))


def test_processors_that_do_something_else_are_refused():
    with pytest.raises(ValueError, match="filter 1"):
        Preprocessing.of(processor(resample=1))
    with pytest.raises(ValueError, match="1/255"):
        Preprocessing.of(processor(do_rescale=False))
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocessing.of(processor(do_resize=False))(torch.zeros(1, 3, 30, 20))
