"""How pleasing a frame is: LAION's aesthetic predictor, a linear head on CLIP ViT-L/14."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from rewards.clip_score import Clip, ModelSettings
from rewards.contract import RewardFunction
from rewards.frames import FrameScoreSettings
from rewards.published import missing_weights, weights_file

if TYPE_CHECKING:
    from torch import Tensor

# Positions of the linear layers among dropouts, and there are no activations between them.
LAYERS = (0, 2, 4, 6, 7)


class Aesthetic(ModelSettings, FrameScoreSettings, frozen=True, extra="forbid"):
    """Predicted mean opinion of a frame, about 1 to 10, whatever the prompt.

    The head is ``sac+logos+ava1-l14-linearMSE`` of
    github.com/christophschuhmann/improved-aesthetic-predictor, as in DDPO (arXiv 2305.13301).
    """

    kind: Literal["aesthetic"] = "aesthetic"
    head: str = Field(
        default="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        description="Weights of the head, .pth or .safetensors with the keys layers.0.weight and so "
        "on: a file, or owner/name/file on the hub.",
    )

    def build(self) -> RewardFunction:
        """With its models.

        Raises:
            ValueError: one cannot be had, or the head is another one or for another CLIP model.
        """
        clip = Clip(self.model, self.model, self.device, self.dtype, self.frame_batch)
        return AestheticScores(self, clip, read_head(self.head, clip.width))

    def problem(self) -> str | None:
        """Whether a local ``model`` and a local ``head`` are there."""
        return super().problem() or missing_weights("head", self.head)


class AestheticScores:
    """See ``Aesthetic``; served of uint8 media, and differentiable of pixels."""

    def __init__(
        self, settings: FrameScoreSettings, clip: Clip, head: list[tuple[Tensor, Tensor]]
    ) -> None:
        """``head``: weight (out, in) and bias (out,) of each layer, fp32."""
        self.settings = settings
        self.clip = clip
        self.head = [(w.to(clip.model.device), b.to(clip.model.device)) for w, b in head]

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3).

        Raises:
            ValueError: other media.
        """
        images = self.clip.of_frames(self.settings.chosen_frames(completions))
        return [float(self._score(part)) for part in images]

    def differentiable(self, prompts: list[str], pixels: Tensor, **columns: Any) -> Tensor:
        """See ``rewards.contract.DifferentiableReward``."""
        images = self.clip.of_pixels(self.settings.chosen_pixels(pixels))
        return self._score(images).to(pixels.device)

    def _score(self, images: Tensor) -> Tensor:
        """(...) of unit vectors (..., frames, d)."""
        from torch.nn.functional import linear

        for weight, bias in self.head:
            images = linear(images, weight, bias)
        return self.settings.aggregated(images[..., 0])


def read_head(name: str, width: int) -> list[tuple[Tensor, Tensor]]:
    """The layers of a head for embeddings of ``width`` entries; nothing in the file is run.

    Raises:
        ValueError: it cannot be had, has other keys, or does not lead from ``width`` to 1.
    """
    import torch
    from safetensors.torch import load_file

    path = weights_file("head", name)
    if path.suffix == ".safetensors":
        state: Any = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    keys = {f"layers.{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError(f"{name!r} is no aesthetic head: it has not the keys {sorted(keys)}")
    head = [
        (state[f"layers.{layer}.weight"].float(), state[f"layers.{layer}.bias"].float())
        for layer in LAYERS
    ]
    leads = [width, *(len(weight) for weight, _ in head)]
    takes = [*(weight.shape[1] for weight, _ in head), 1]
    if leads != takes:
        raise ValueError(
            f"aesthetic head {name!r} takes {takes[0]} entries and its layers take {takes[1:-1]}, "
            f"but they are given {leads}: the CLIP model has to be the one it was trained on"
        )
    return head
