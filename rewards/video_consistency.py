"""Whether a video stays the same scene from frame to frame, and whether anything moves in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from rewards.clip_score import Clip, ModelSettings
from rewards.contract import RewardFunction
from rewards.frames import FrameSettings

if TYPE_CHECKING:
    from torch import Tensor


class TemporalConsistency(ModelSettings, FrameSettings, frozen=True, extra="forbid"):
    """Mean cosine of successive frames under CLIP (Gen-1, arXiv 2302.03011), plus motion.

    The cosine alone is highest, 1, for a video that stands still: what is trained on it needs
    ``motion_weight`` or another reward that asks for motion.
    """

    kind: Literal["temporal_consistency"] = "temporal_consistency"
    motion_weight: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Times the motion, added: the mean absolute difference of successive frames, "
        "in [0, 1].",
    )

    def build(self) -> RewardFunction:
        """With its model; see ``Clip``."""
        clip = Clip(self.model, self.model, self.device, self.dtype, self.frame_batch)
        return ConsistencyScores(self, clip)


class ConsistencyScores:
    """See ``TemporalConsistency``; of the frames looked at, which ``frames`` may thin out."""

    def __init__(self, settings: TemporalConsistency, clip: Clip) -> None:
        self.settings = settings
        self.clip = clip

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3); None for a single frame.

        Raises:
            ValueError: other media.
        """
        weight = self.settings.motion_weight
        parts = self._parts(completions)
        return [None if part is None else part[0] + weight * part[1] for part in parts]

    def differentiable(self, prompts: list[str], pixels: Tensor, **columns: Any) -> Tensor:
        """See ``rewards.contract.DifferentiableReward``.

        Raises:
            ValueError: a single frame is looked at, or pixels have another shape.
        """
        chosen = self.settings.chosen_pixels(pixels)
        if chosen.shape[1] < 2:
            raise ValueError("temporal consistency is of two frames or more, not of 1")
        consistency = _consistency(self.clip.of_pixels(chosen)).to(pixels.device)
        motion = chosen.diff(dim=1).abs().flatten(1).mean(1)
        return consistency + self.settings.motion_weight * motion

    def describe_set(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> dict[str, float]:
        """consistency and motion, means over the videos; NaN where none has two frames.

        Raises:
            ValueError: see ``__call__``.
        """
        parts = [part for part in self._parts(completions) if part is not None]
        means = np.mean(parts, axis=0) if parts else (np.nan, np.nan)
        return {"consistency": float(means[0]), "motion": float(means[1])}

    def _parts(self, completions: list[np.ndarray]) -> list[tuple[float, float] | None]:
        """Consistency and motion of each."""
        media = self.settings.chosen_frames(completions)
        embedded = self.clip.of_frames(media)
        return [
            (float(_consistency(images)), _motion(frames)) if len(frames) > 1 else None
            for images, frames in zip(embedded, media, strict=True)
        ]


def _consistency(images: Tensor) -> Tensor:
    """(...) of unit vectors (..., frames, d)."""
    return (images[..., 1:, :] * images[..., :-1, :]).sum(-1).mean(-1)


def _motion(frames: np.ndarray) -> float:
    """Mean |difference| of successive frames uint8, as a share of the range of colours."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255)
