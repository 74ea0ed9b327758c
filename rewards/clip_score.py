"""Scores by a CLIP model: how well frames show what the prompt says, CLIPScore and PickScore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rewards.contract import RewardFunction, RewardSettings
from rewards.frames import FrameScoreSettings, Preprocessing
from rewards.published import missing_model, pretrained

if TYPE_CHECKING:
    from torch import Tensor

CLIP_L = "openai/clip-vit-large-patch14"
CLIPSCORE_WEIGHT = 2.5
FLOW_GRPO_PICK = 26.0


class ModelSettings(RewardSettings, frozen=True, extra="forbid"):
    """Options of a reward that stands on a CLIP model.

    It runs on a GPU where ``gpus`` is more than 0, else on the CPU.
    """

    differentiable: ClassVar[bool] = True

    model: str = Field(
        default=CLIP_L,
        description="A CLIP model with its tokenizer and image processor: a directory, or a hub id.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of the model; scores are fp32 always."
    )

    def problem(self) -> str | None:
        """Whether a local ``model`` is there; of a hub id nothing is asked before it is loaded."""
        return missing_model("model", self.model)

    @property
    def device(self) -> str:
        """Of the model."""
        return "cuda" if self.gpus > 0 else "cpu"


class ClipScore(ModelSettings, FrameScoreSettings, frozen=True, extra="forbid"):
    """Cosine of frame and prompt under CLIP: CLIPScore (arXiv 2104.08718)."""

    kind: Literal["clip_score"] = "clip_score"
    scale: Literal["clipscore", "logits", "cosine"] = Field(
        default="clipscore",
        description="clipscore: 2.5 max(cosine, 0), the paper's; logits: exp(logit_scale) cosine, "
        "about 100 times the cosine (Flow-GRPO divides it by 30); cosine: itself.",
    )
    prefix: str = Field(
        default="",
        description="Put before every prompt; the paper has 'A photo depicts '.",
    )

    def build(self) -> RewardFunction:
        """With its model; see ``Clip``."""
        clip = Clip(self.model, self.model, self.device, self.dtype, self.frame_batch)
        scales = {"clipscore": CLIPSCORE_WEIGHT, "logits": clip.logit_scale, "cosine": 1.0}
        floor = 0.0 if self.scale == "clipscore" else -1.0
        return TextScores(self, clip, scales[self.scale], floor, self.prefix)


class PickScore(ModelSettings, FrameScoreSettings, frozen=True, extra="forbid"):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cosine of frame and prompt."""

    kind: Literal["pick_score"] = "pick_score"
    model: str = Field(
        default="yuvalkirstain/PickScore_v1",
        description="A CLIP model trained on preferences: a directory, or a hub id.",
    )
    processor: str = Field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        description="Where its tokenizer and image processor are: a directory, or a hub id.",
    )
    scale: Literal["logits", "flow_grpo"] = Field(
        default="logits",
        description="logits: as published, about 16 to 26; flow_grpo: that divided by 26.",
    )

    def build(self) -> RewardFunction:
        """With its model; see ``Clip``."""
        clip = Clip(self.model, self.processor, self.device, self.dtype, self.frame_batch)
        scale = clip.logit_scale / (FLOW_GRPO_PICK if self.scale == "flow_grpo" else 1)
        return TextScores(self, clip, scale)

    def problem(self) -> str | None:
        """Whether a local ``model`` and a local ``processor`` are there."""
        return super().problem() or missing_model("processor", self.processor)


class TextScores:
    """``scale`` times the cosine, not below ``floor``, of frames and prompts."""

    def __init__(
        self,
        settings: FrameScoreSettings,
        clip: Clip,
        scale: float,
        floor: float = -1.0,
        prefix: str = "",
    ) -> None:
        self.settings = settings
        self.clip = clip
        self.scale = scale
        self.floor = floor
        self.prefix = prefix

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3), preprocessed by the library.

        Raises:
            ValueError: other media.
        """
        images = self.clip.of_frames(self.settings.chosen_frames(completions))
        texts = self._texts(prompts)
        return [float(self._score(i, t)) for i, t in zip(images, texts, strict=True)]

    def differentiable(self, prompts: list[str], pixels: Tensor, **columns: Any) -> Tensor:
        """See ``rewards.contract.DifferentiableReward``."""
        images = self.clip.of_pixels(self.settings.chosen_pixels(pixels))
        return self._score(images, self._texts(prompts)).to(pixels.device)

    def _texts(self, prompts: list[str]) -> Tensor:
        return self.clip.of_texts([self.prefix + prompt for prompt in prompts])

    def _score(self, images: Tensor, texts: Tensor) -> Tensor:
        """(...) of unit vectors (..., frames, d) and (..., d)."""
        cosines = (images @ texts[..., None])[..., 0]
        return self.settings.aggregated(self.scale * cosines.clamp(min=self.floor))


class Clip:
    """A CLIP model and its processor; embeddings of length 1, fp32."""

    def __init__(
        self, model: str, processor: str, device: str, dtype: str, frame_batch: int
    ) -> None:
        """``model`` and ``processor``: a directory or a hub id each.

        Raises:
            ValueError: one can be had from neither, or is none of CLIP.
        """
        import torch
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.frame_batch = frame_batch
        loaded: Any = pretrained(
            CLIPModel, model, dtype=getattr(torch, dtype), output_loading_info=True
        )
        # A directory of another architecture would be filled with random weights.
        if loaded[1]["missing_keys"]:
            raise ValueError(
                f"{model!r} is no CLIP model: it lacks {sorted(loaded[1]['missing_keys'])[0]} and "
                f"{len(loaded[1]['missing_keys']) - 1} more"
            )
        self.model: Any = loaded[0].to(device).eval().requires_grad_(False)
        self.processor: Any = pretrained(CLIPImageProcessorPil, processor)
        self.tokenizer: Any = pretrained(CLIPTokenizer, processor)
        # Where there are no files of one, transformers makes a tokenizer without words.
        words = self.model.config.text_config.vocab_size
        if len(self.tokenizer) != words:
            raise ValueError(
                f"CLIPTokenizer of {processor!r} has {len(self.tokenizer)} words and the model "
                f"{model!r} has {words}: tokenizer files are missing, or of another model"
            )
        self.preprocessing = Preprocessing.of(self.processor)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with."""
        return math.exp(float(self.model.logit_scale))

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return self.model.config.projection_dim

    def of_frames(self, media: Sequence[np.ndarray]) -> list[Tensor]:
        """(frames, d) of each of uint8 RGB (frames, height, width, 3), by the image processor."""
        import torch
        from PIL import Image

        frames = [Image.fromarray(frame) for part in media for frame in part]
        embedded: list[Tensor] = []
        for start in range(0, len(frames), self.frame_batch):
            inputs = self.processor(
                images=frames[start : start + self.frame_batch], return_tensors="pt"
            )
            with torch.no_grad():
                embedded.append(self._embedded(inputs["pixel_values"]))
        return list(torch.cat(embedded).split([len(part) for part in media]))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Differentiable (n, frames, d) of RGB pixels (n, frames, 3, height, width) in [0, 1]."""
        import torch

        batches = pixels.flatten(0, 1).split(self.frame_batch)
        embedded = torch.cat([self._embedded(self.preprocessing(batch)) for batch in batches])
        return embedded.unflatten(0, pixels.shape[:2])

    def of_texts(self, texts: list[str]) -> Tensor:
        """(n, d); a text longer than the model reads is cut."""
        import torch

        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            features = self.model.get_text_features(**tokens.to(self.model.device))
        return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1)

    def _embedded(self, inputs: Tensor) -> Tensor:
        from torch.nn.functional import normalize

        features = self.model.get_image_features(
            pixel_values=inputs.to(self.model.device, self.model.dtype)
        )
        return normalize(features.pooler_output.float(), dim=-1)
