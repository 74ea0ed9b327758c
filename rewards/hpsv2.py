"""HPSv2 (arXiv 2306.09341): a CLIP ViT-H/14 trained on people's choices, served by open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rewards.contract import RewardFunction
from rewards.frames import FrameScoreSettings
from rewards.published import fetched, missing_file

if TYPE_CHECKING:
    from torch import Tensor

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
ARCHITECTURE = "ViT-H-14"


class HpsV2(FrameScoreSettings, frozen=True, extra="forbid"):
    """Cosine of frame and prompt under the model, about 0.2 to 0.35, as the authors publish it.

    It runs on a GPU where ``gpus`` is more than 0 (in fp16, as the authors'), else on the CPU.
    """

    environment: ClassVar[str | None] = "hpsv2"

    kind: Literal["hpsv2"] = "hpsv2"
    version: Literal["v2", "v2.1"] = Field(
        default="v2.1", description="Which of the two published checkpoints."
    )
    checkpoint: str = Field(
        default="xswu/HPSv2",
        description="A checkpoint file, a directory or hub id (owner/name) with "
        "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.",
    )

    def build(self) -> RewardFunction:
        """With its model; see ``HpsV2Scores``."""
        path = fetched("checkpoint", self.checkpoint, FILES[self.version])
        return HpsV2Scores(self, path, "cuda" if self.gpus > 0 else "cpu")

    def problem(self) -> str | None:
        """Whether its environment and a local ``checkpoint`` are there."""
        wanted = FILES[self.version]
        return super().problem() or missing_file("checkpoint", self.checkpoint, wanted)


class HpsV2Scores:
    """Scores of uint8 media by a checkpoint."""

    def __init__(self, settings: FrameScoreSettings, path: Path, device: str) -> None:
        """Nothing in the file is run.

        Raises:
            ValueError: it holds no weights of this architecture.
        """
        import open_clip  # pyright: ignore[reportMissingImports]
        import torch

        self.settings = settings
        self.device = device
        self.model: Any = open_clip.create_model(ARCHITECTURE, load_weights=False)
        self.tokenizer: Any = open_clip.get_tokenizer(ARCHITECTURE)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or "state_dict" not in loaded:
            raise ValueError(f"{path} is no HPSv2 checkpoint: it has no 'state_dict'")
        try:
            self.model.load_state_dict(loaded["state_dict"])
        except RuntimeError as error:
            first = str(error).split("\n", 2)[1].strip()
            raise ValueError(f"{path} is no HPSv2 checkpoint: {first[:300]}") from error
        self.model.to(device).eval().requires_grad_(False)

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3).

        Raises:
            ValueError: other media.
        """
        import torch

        media = self.settings.chosen_frames(completions)
        size: int = self.model.visual.image_size[0]
        inputs = torch.cat([fitted(frames, size) for frames in media])
        asked = list(dict.fromkeys(prompts))
        with torch.no_grad(), torch.autocast("cuda", enabled=self.device == "cuda"):
            texts: Tensor = self.model.encode_text(
                self.tokenizer(asked).to(self.device), normalize=True
            ).float()
            images = torch.cat(
                [self._embedded(part) for part in inputs.split(self.settings.frame_batch)]
            )
        own = images.split([len(frames) for frames in media])
        scores = [
            part @ texts[asked.index(prompt)] for part, prompt in zip(own, prompts, strict=True)
        ]
        return [float(self.settings.aggregated(frames)) for frames in scores]

    def _embedded(self, frames: Tensor) -> Tensor:
        """Unit vectors fp32 (k, d) of frames in [0, 1] (k, 3, size, size)."""
        mean, std = (
            frames.new_tensor(values)[:, None, None]
            for values in (self.model.visual.image_mean, self.model.visual.image_std)
        )
        inputs = ((frames - mean) / std).to(self.device)
        return self.model.encode_image(inputs, normalize=True).float()


def fitted(frames: np.ndarray, size: int) -> Tensor:
    """(k, 3, size, size) in [0, 1] of uint8 RGB (k, height, width, 3), as the authors resize.

    The longer side becomes ``size`` (bicubic, antialiased, in floating point and not clamped), and
    black is put around the middle. The authors forget that where the longer side is so already.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    pixels = torch.tensor(frames).permute(0, 3, 1, 2).float() / 255
    scale = size / max(pixels.shape[-2:])
    height, width = (round(side * scale) for side in pixels.shape[-2:])
    if scale != 1:
        pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pad(pixels, (left, size - width - left, top, size - height - top))
