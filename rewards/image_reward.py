"""ImageReward (arXiv 2304.05977): BLIP trained on people's rankings, by the authors' package."""

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

WEIGHTS, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
# What scoring uses of the model, and has to be in the checkpoint.
USED = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
TEXT_TOKENS = 35


class ImageReward(FrameScoreSettings, frozen=True, extra="forbid"):
    """The authors' score of frame and prompt: mean 0 and deviation 1 over their training set.

    It runs on a GPU where ``gpus`` is more than 0, else on the CPU.
    """

    environment: ClassVar[str | None] = "image-reward"

    kind: Literal["image_reward"] = "image_reward"
    model: str = Field(
        default="THUDM/ImageReward",
        description="A directory or hub id (owner/name) with ImageReward.pt and med_config.json.",
    )
    tokenizer: str = Field(
        default="google-bert/bert-base-uncased",
        description="A directory or hub id with vocab.txt, the words of uncased BERT.",
    )

    def build(self) -> RewardFunction:
        """With its model; see ``ImageRewardScores``."""
        weights, config = (fetched("model", self.model, file) for file in (WEIGHTS, CONFIG))
        words = fetched("tokenizer", self.tokenizer, VOCABULARY)
        device = "cuda" if self.gpus > 0 else "cpu"
        return ImageRewardScores(self, weights, config, words, device)

    def problem(self) -> str | None:
        """Whether its environment, a local ``model`` and a local ``tokenizer`` are there."""
        return (
            super().problem()
            or missing_file("model", self.model, WEIGHTS)
            or missing_file("model", self.model, CONFIG)
            or missing_file("tokenizer", self.tokenizer, VOCABULARY)
        )


class ImageRewardScores:
    """Scores of uint8 media by the package's model."""

    def __init__(
        self, settings: FrameScoreSettings, weights: Path, config: Path, words: Path, device: str
    ) -> None:
        """Nothing in the files is run.

        Raises:
            ValueError: ``weights`` are not all there, or of another shape.
        """
        import ImageReward as package  # pyright: ignore[reportMissingImports]
        import torch
        from ImageReward.models.BLIP import (  # pyright: ignore[reportMissingImports]
            blip_pretrain,
        )
        from transformers import BertTokenizer

        self.settings = settings
        self.device = device
        tokenizer: Any = BertTokenizer(str(words))
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        # The package asks the hub for these words by a name of its own, wherever they are.
        blip_pretrain.init_tokenizer = lambda: tokenizer
        self.model: Any = package.ImageReward(med_config=str(config), device=device)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            missing: list[str] = self.model.load_state_dict(state, strict=False).missing_keys
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{weights} is no checkpoint of ImageReward: {error}") from error
        lost = [k for k in missing if k.startswith(USED) and not k.endswith("position_ids")]
        if lost:
            raise ValueError(f"{weights} lacks {lost[0]} and {len(lost) - 1} more of ImageReward")
        self.model.to(device).eval().requires_grad_(False)

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3), preprocessed by the package.

        Raises:
            ValueError: other media.
        """
        import torch
        from PIL import Image

        media = self.settings.chosen_frames(completions)
        texts = [p for p, part in zip(prompts, media, strict=True) for _ in part]
        frames = [Image.fromarray(frame) for part in media for frame in part]
        step = self.settings.frame_batch
        scores = torch.cat(
            [
                self._scores(texts[start : start + step], frames[start : start + step])
                for start in range(0, len(frames), step)
            ]
        )
        split = scores.split([len(part) for part in media])
        return [float(self.settings.aggregated(part)) for part in split]

    def _scores(self, texts: list[str], frames: list[Any]) -> Tensor:
        """fp32 (k,) of as many texts and PIL images."""
        import torch

        tokens = self.model.blip.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        images = torch.stack([self.model.preprocess(frame) for frame in frames]).to(self.device)
        with torch.no_grad():
            scores = self.model.score_gard(tokens.input_ids, tokens.attention_mask, images)
        return scores[:, 0].float().cpu()
