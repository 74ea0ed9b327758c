"""Compressibility: how few bytes an image takes, the field's reward that needs no model."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np

from rewards.contract import RewardFunction, RewardSettings


class Ink(RewardSettings, frozen=True, extra="forbid"):
    """Minus the size of the PNG, averaged over frames: less ink, higher reward."""

    kind: Literal["ink"] = "ink"

    def build(self) -> RewardFunction:
        """The function."""
        return compressibility


def compressibility(
    prompts: list[str], completions: list[np.ndarray], **columns: Any
) -> list[float | None]:
    """Minus kilobytes of PNG per frame, for media uint8 (frames, height, width, channels)."""
    return [-float(np.mean([png_bytes(frame) for frame in media])) / 1024 for media in completions]


def png_bytes(frame: np.ndarray) -> int:
    """Size of one frame (height, width, channels) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).save(buffer, "PNG")
    return buffer.tell()
