"""A preference score by a vision-language model with a regression head: HPSv3 (arXiv 2508.03789).

Qwen2-VL reads a frame and an instruction that holds the prompt and ends with a reward token; the
head maps that token's last hidden state to the mean and the spread of a score, and the mean counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rewards.clip_score import ModelSettings
from rewards.contract import RewardFunction
from rewards.frames import FrameScoreSettings
from rewards.published import missing_model, missing_weights, pretrained, weights_file

if TYPE_CHECKING:
    from torch import Tensor

PLACE = "{text_prompt}"
HEAD = "rm_head."
WEIGHT = re.compile(r"(rm_head\.(?:(\d+)\.)?)weight")


class VlmScore(ModelSettings, FrameScoreSettings, frozen=True, extra="forbid"):
    """HPSv3's score of a frame for a prompt; larger is better.

    ``checkpoint`` holds the whole model as transformers 4.45 named it (visual, model, lm_head) and
    the head: ``rm_head.weight``, or layers ``rm_head.<n>.weight`` and ``.bias`` with ReLU between
    them. As there, every token's position is its plain index, image tokens' too, and not Qwen2-VL's
    three-dimensional one: the model was trained so.

    VideoReward (KwaiVGI/VideoReward) has three reward tokens, a video as input and LoRA weights that
    are not merged; it is not read here.
    """

    differentiable: ClassVar[bool] = False

    kind: Literal["vlm_score"] = "vlm_score"
    model: str = Field(
        default="Qwen/Qwen2-VL-7B-Instruct",
        description="The Qwen2-VL that was trained, for its configuration, tokenizer, chat template "
        "and image processor: a directory, or a hub id. Its weights are not read.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Precision of the model; its head is fp32 always."
    )
    checkpoint: str = Field(
        default="MizzenAI/HPSv3/HPSv3.safetensors",
        description="Weights of model and head, .safetensors or .pth: a file, or owner/name/file on "
        "the hub.",
    )
    template: Path = Field(
        description="A text file: the instruction, with {text_prompt} where the prompt goes and the "
        "reward token. HPSv3's is INSTRUCTION + prompt_with_special_token of "
        "hpsv3/dataset/data_collator_qwen.py in the package hpsv3 on PyPI, line ends included.",
    )
    reward_token: str = Field(
        default="<|Reward|>", min_length=1, description="Added to the tokenizer, as its last word."
    )
    pixels: int = Field(
        default=256 * 28 * 28,
        ge=28 * 28,
        description="Of a frame as the model sees it: it is resized to about as many, its shape kept.",
    )
    frame_batch: int = Field(default=8, ge=1, description="Frames per forward of the model.")

    def build(self) -> RewardFunction:
        """With its model.

        Raises:
            ValueError: a part cannot be had, or does not fit the others.
        """
        return VlmScores(self, Regressor(self))

    def problem(self) -> str | None:
        """Whether a local ``model``, a local ``checkpoint`` and the ``template`` are there."""
        found = missing_model("model", self.model)
        found = found or missing_weights("checkpoint", self.checkpoint)
        if found is None and not self.template.is_file():
            found = f"{str(self.template)!r} is no file; give field 'template' the instruction's"
        return found


class VlmScores:
    """See ``VlmScore``."""

    def __init__(self, settings: VlmScore, regressor: Regressor) -> None:
        self.settings = settings
        self.regressor = regressor

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3).

        Raises:
            ValueError: other media, or a prompt with one of the tokenizer's special tokens.
        """
        import torch

        media = self.settings.chosen_frames(completions)
        texts = [self.regressor.text(prompt) for prompt in prompts]
        pairs = [(frame, text) for part, text in zip(media, texts, strict=True) for frame in part]
        batch = self.settings.frame_batch
        scores = torch.cat(
            [
                self.regressor.outputs(*zip(*pairs[start : start + batch], strict=True))[:, 0]
                for start in range(0, len(pairs), batch)
            ]
        )
        return [
            float(self.settings.aggregated(part))
            for part in scores.split([len(part) for part in media])
        ]


class Regressor:
    """The model, its head and what makes their inputs."""

    def __init__(self, settings: VlmScore) -> None:
        """Raises ValueError where a part cannot be had, or does not fit the others."""
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil

        self.instruction = read_template(settings.template, settings.reward_token)
        self.images: Any = pretrained(Qwen2VLImageProcessorPil, settings.model)
        self.tokenizer: Any = pretrained(AutoTokenizer, settings.model, padding_side="right")
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {settings.model!r} has no chat template")
        self.tokenizer.add_tokens([settings.reward_token], special_tokens=True)
        self.reward_token: int = self.tokenizer.convert_tokens_to_ids(settings.reward_token)
        self.size = {"shortest_edge": settings.pixels, "longest_edge": settings.pixels}
        config: Any = pretrained(Qwen2VLConfig, settings.model)
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        state = read_weights(settings.checkpoint)
        self.head = [
            (weight.to(settings.device), bias if bias is None else bias.to(settings.device))
            for weight, bias in read_head(state, config.text_config.hidden_size)
        ]
        self.model: Any = read_model(state, config, len(self.tokenizer), settings)

    def text(self, prompt: str) -> str:
        """What the model reads, with one image token.

        Raises:
            ValueError: a special token is in the prompt, which the model would take for its own.
        """
        for token in self.tokenizer.added_tokens_encoder:
            if token in prompt:
                raise ValueError(
                    f"prompt {prompt!r} has {token!r}, which is a token of the model's"
                )
        content = [
            {"type": "image"},
            {"type": "text", "text": self.instruction.replace(PLACE, prompt)},
        ]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def outputs(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """fp32 (n, outputs of the head) of frames uint8 RGB (height, width, 3), on the CPU."""
        import torch
        from PIL import Image
        from torch.nn.functional import linear

        images = self.images(
            images=[Image.fromarray(frame) for frame in frames],
            size=self.size,
            return_tensors="pt",
        )
        counts = images["image_grid_thw"].prod(-1) // self.images.merge_size**2
        filled = [
            text.replace(self.image_token, self.image_token * int(count))
            for text, count in zip(texts, counts, strict=True)
        ]
        tokens = self.tokenizer(filled, padding=True, return_tensors="pt")
        ids = tokens["input_ids"].to(self.model.device)
        places = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        with torch.no_grad():
            hidden = self.model(
                input_ids=ids,
                attention_mask=tokens["attention_mask"].to(ids.device),
                position_ids=places,
                pixel_values=images["pixel_values"].to(ids.device, self.model.dtype),
                image_grid_thw=images["image_grid_thw"].to(ids.device),
                use_cache=False,
            ).last_hidden_state
        found = hidden[ids == self.reward_token].float()
        for index, (weight, bias) in enumerate(self.head):
            found = linear(found.relu() if index else found, weight, bias)
        return found.cpu()


def read_template(path: Path, reward_token: str) -> str:
    """The instruction, as it is in the file.

    Raises:
        ValueError: it cannot be read, or has not the prompt's place and then the reward token once.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {str(path)!r} cannot be read: {error}") from error
    _, found, rest = text.partition(PLACE)
    if not found or text.count(reward_token) != 1 or reward_token not in rest:
        raise ValueError(
            f"template {str(path)!r} needs {PLACE} and after it, once, the reward token {reward_token}"
        )
    return text


def read_weights(name: str) -> dict[str, Tensor]:
    """What a checkpoint holds; nothing in the file is run.

    Raises:
        ValueError: it cannot be had, or holds something else than tensors by name.
    """
    import torch
    from safetensors.torch import load_file

    path = weights_file("checkpoint", name)
    if path.suffix == ".safetensors":
        return load_file(path)
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"checkpoint {name!r} does not hold tensors by name")
    return state


def read_head(state: Mapping[str, Tensor], width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight (out, in) and bias (out,) of each layer in order, fp32.

    Raises:
        ValueError: there is no head, or its layers do not lead on from ``width`` entries.
    """
    keys = [key for key in state if key.startswith(HEAD)]
    layers = {found[1]: int(found[2] or 0) for found in map(WEIGHT.fullmatch, keys) if found}
    strange = set(keys) - {layer + part for layer in layers for part in ("weight", "bias")}
    if not layers or strange:
        raise ValueError(
            f"the checkpoint has no head: of its {len(state)} keys {sorted(keys)[:3]} begin with "
            f"{HEAD!r}, and known are {HEAD}weight, and {HEAD}<n>.weight and .bias"
        )
    head: list[tuple[Tensor, Tensor | None]] = []
    for layer in sorted(layers, key=layers.__getitem__):
        weight, bias = state[layer + "weight"].float(), state.get(layer + "bias")
        if weight.shape[1] != width:
            raise ValueError(
                f"{layer}weight of the checkpoint takes {weight.shape[1]} entries and is given {width}"
            )
        head.append((weight, bias if bias is None else bias.float()))
        width = len(weight)
    return head


def read_model(state: Mapping[str, Tensor], config: Any, words: int, settings: VlmScore) -> Any:
    """The model without its heads; transformers renames what has been renamed since 4.45.

    Raises:
        ValueError: a weight is missing or unknown, or the checkpoint is for another tokenizer.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    rows = {len(v) for k, v in state.items() if k.endswith("embed_tokens.weight")}
    if rows != {words}:
        raise ValueError(
            f"the checkpoint has embeddings of {sorted(rows)} words, and the tokenizer of "
            f"{settings.model!r} with {settings.reward_token} has {words}: 'model' has to be the one "
            "that was trained, and 'reward_token' the one that was added"
        )
    config.text_config.vocab_size = words
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict={k: v for k, v in state.items() if not k.startswith(HEAD)},
        dtype=getattr(torch, settings.dtype),
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys"):
        if loaded[1][what]:
            raise ValueError(
                f"checkpoint {settings.checkpoint!r} is not of {settings.model!r}: "
                f"{what.replace('_', ' ')} {sorted(loaded[1][what])[0]} and "
                f"{len(loaded[1][what]) - 1} more"
            )
    return loaded[0].model.to(settings.device).eval().requires_grad_(False)
