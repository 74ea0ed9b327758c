"""What image rewards on video share: which frames count, their pixels, and one score from many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field

from rewards.contract import RewardSettings

if TYPE_CHECKING:
    from torch import Tensor

# PIL's number of a filter, and torch's name of it.
FILTERS = {2: "bilinear", 3: "bicubic"}


class FrameSettings(RewardSettings, frozen=True, extra="forbid"):
    """Options of a reward that looks at frames one by one."""

    frames: int | None = Field(
        default=None,
        ge=1,
        description="Frames looked at, evenly spaced; default all, as where a video has fewer.",
    )
    frame_batch: int = Field(default=64, ge=1, description="Frames per forward of the model.")

    def choose(self, count: int) -> list[int]:
        """The frames looked at of ``count``: the middles of as many equal parts of the video."""
        wanted = min(self.frames or count, count)
        return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]

    def chosen_frames(self, completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 RGB (chosen, height, width, 3) of each completion; grayscale is repeated.

        Raises:
            ValueError: a completion is not uint8 (frames, height, width, 1 or 3) with a frame.
        """
        for media in completions:
            if media.dtype != np.uint8 or media.ndim != 4 or media.shape[-1] not in (1, 3):
                raise ValueError(
                    "image rewards take uint8 (frames, height, width, 1 or 3), not "
                    f"{media.dtype} {media.shape}"
                )
            if 0 in media.shape:
                raise ValueError(f"a completion is empty: {media.shape}")
        chosen = [media[self.choose(len(media))] for media in completions]
        return [np.repeat(m, 3, axis=-1) if m.shape[-1] == 1 else m for m in chosen]

    def chosen_pixels(self, pixels: Tensor) -> Tensor:
        """(n, chosen, 3, height, width) of pixels (n, frames, height, width, 1 or 3).

        Raises:
            ValueError: pixels have another shape.
        """
        if pixels.ndim != 5 or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                "image rewards take pixels (n, frames, height, width, 1 or 3), not "
                f"{tuple(pixels.shape)}"
            )
        chosen = pixels[:, self.choose(pixels.shape[1])].movedim(-1, 2)
        return chosen.expand(-1, -1, 3, -1, -1)


class FrameScoreSettings(FrameSettings, frozen=True, extra="forbid"):
    """Options of a reward that has a score for every frame."""

    aggregate: Literal["mean", "top"] = Field(
        default="mean",
        description="The mean over frames, or over the best of them (see top_fraction).",
    )
    top_fraction: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Share of the frames, rounded up, that count with aggregate: top; one frame "
        "is the maximum.",
    )

    def aggregated(self, scores: Tensor) -> Tensor:
        """(...) of scores (..., frames)."""
        if self.aggregate == "mean":
            return scores.mean(-1)
        # 0.1 of 30 frames is 3.0000000000000004 in floating point and has to stay 3.
        count = math.ceil(self.top_fraction * scores.shape[-1] - 1e-9)
        return scores.topk(count, dim=-1).values.mean(-1)


@dataclass(frozen=True)
class Preprocessing:
    """What a CLIP image processor does, in torch, so that gradients flow.

    The resize is PIL's, which filters columns after rows and keeps to the range of colours after
    each, but does not round to 256 grey levels. A resized pixel so differs from the processor's by
    at most about one level (1/255 before normalisation); without a resize they are equal.

    Attributes:
        shortest_edge: of the resized frame; None where ``size`` (height, width) is given.
        crop: (height, width) of the centre that is kept; None keeps all.
        mode: of the resize; None does none.
        mean, std: of a channel of pixels in [0, 1].
    """

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> Self:
        """Of a transformers image processor.

        Raises:
            ValueError: it does something that is not written here.
        """
        size, crop = processor.size, processor.crop_size
        mode = FILTERS.get(int(processor.resample)) if processor.do_resize else None
        if processor.do_resize and (mode is None or size["longest_edge"]):
            raise ValueError(
                f"the image processor resizes to {size} with filter {processor.resample}; known are "
                "a shortest edge or a height and width, with filter 2 (bilinear) or 3 (bicubic)"
            )
        if not processor.do_rescale or not math.isclose(processor.rescale_factor * 255, 1):
            raise ValueError("the image processor does not rescale by 1/255")
        normalises = processor.do_normalize
        return cls(
            shortest_edge=size["shortest_edge"],
            size=(size["height"], size["width"]) if size["height"] else None,
            crop=(crop["height"], crop["width"]) if processor.do_center_crop else None,
            mode=mode,
            mean=tuple(processor.image_mean) if normalises else (0.0,) * 3,
            std=tuple(processor.image_std) if normalises else (1.0,) * 3,
        )

    def __call__(self, frames: Tensor) -> Tensor:
        """Model inputs (k, 3, crop) of RGB frames (k, 3, height, width) in [0, 1].

        Raises:
            ValueError: the resized frame is smaller than the crop.
        """
        resized = self._resized(frames)
        if self.crop is not None:
            top, left = (
                (have - keep) // 2 for have, keep in zip(resized.shape[-2:], self.crop, strict=True)
            )
            if min(top, left) < 0:
                raise ValueError(
                    f"frames of {tuple(resized.shape[-2:])} are smaller than the crop {self.crop}"
                )
            resized = resized[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (resized.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (resized - mean) / std

    def _resized(self, frames: Tensor) -> Tensor:
        if self.mode is None:
            return frames
        from torch.nn.functional import interpolate

        height, width = self._target(*frames.shape[-2:])
        for size in ((frames.shape[-2], width), (height, width)):
            if tuple(frames.shape[-2:]) != size:
                frames = interpolate(frames, size, mode=self.mode, antialias=True).clamp(0, 1)
        return frames

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        assert self.shortest_edge is not None
        # Rounded down: transformers.image_transforms.get_resize_output_image_size.
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)
