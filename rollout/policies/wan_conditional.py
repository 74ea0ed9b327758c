"""Class-conditional Wan transformers: one-hot words are their conditions, pixels their latents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.policies.base import FlowPolicy
from rollout.policies.pipelines import (
    RENOISING,
    STEPPING,
    prepare_transformer,
    save_transformer,
)
from rollout.policies.wan_network import network_features, network_times, network_velocity

if TYPE_CHECKING:
    from rollout.policies.wan import WanConfig


class WanPolicy(FlowPolicy):
    """A class-conditional Wan transformer.

    Attributes:
        whole_timesteps: the network is fed ``floor(1000 t)``, as Wan's own pipeline and scheduler do;
            else ``1000 t``, as that pipeline does with an Euler scheduler.
    """

    whole_timesteps = True

    def __init__(
        self, config: WanConfig, directory: Path, device: str, seed: int, reference: bool
    ) -> None:
        from diffusers import WanTransformer3DModel

        self.config = config
        self.conditions: dict[str, Any] = json.loads((directory / "conditions.json").read_text())
        transformer: Any = WanTransformer3DModel.from_pretrained(
            directory / "transformer", use_safetensors=True
        )
        module = prepare_transformer(transformer, config, seed).to(device)
        super().__init__(module, adapted=config.lora is not None, reference=reference)
        self.latent_shape = tuple(self.conditions["latent_shape"])
        self._width: int = transformer.config["text_dim"]
        self.blocks = len(transformer.blocks)
        self.width = (
            transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
        )

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """One-hot conditions (B, words, width) of the vocabulary words found in each prompt."""
        return encode_words(prompts, self.conditions["vocabulary"], self._width).to(self.device)

    def encode_null(self, count: int) -> Tensor:
        """The condition that training dropped prompts to."""
        slots = len(self.conditions["vocabulary"])
        return null_words(count, slots, self._width).to(self.device)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``FlowPolicy``."""
        times = network_times(t, self.whole_timesteps)
        return network_velocity(self.network, x, times, condition, self.config.dtype)

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """See ``FlowPolicy``; one place a patch."""
        return network_features(self.network, x, layers, lambda: self.velocity(x, t, condition))

    def pixels(self, x: Tensor) -> Tensor:
        """Pixels are the latents: [-1, 1] to [0, 1], channels last."""
        return ((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)

    def save(
        self, directory: Path, weights: Mapping[str, Tensor], name: str = "transformer"
    ) -> None:
        """Adapter as ``pytorch_lora_weights.safetensors`` (diffusers' layout), or the whole."""
        directory.mkdir(parents=True, exist_ok=True)
        adapter = self.config.lora is not None
        save_transformer(self.module, weights, directory, "WanPipeline", adapter, name)
        (directory / "conditions.json").write_text(json.dumps(self.conditions))

    def save_pipeline(
        self,
        directory: Path,
        sigma: float,
        boundary: float,
        networks: Sequence[str],
        renoise: bool,
    ) -> None:
        """What makes saved ``networks`` a pipeline that stock ``WanPipeline`` loads.

        Its scheduler steps at the sigmas (1, ``sigma``) when asked for two steps, with ``renoise``
        through fresh noise; the first network serves sigmas from ``boundary`` up. A
        class-conditional model has no text encoder and no VAE: it is loaded by
        ``from_pretrained(directory, tokenizer=None, text_encoder=None, vae=None)`` and called with
        ``prompt_embeds`` and ``output_type="latent"``.
        """
        import diffusers

        kind: Any = getattr(diffusers, RENOISING if renoise else STEPPING)
        scheduler = kind(shift=1.0, shift_terminal=sigma)
        parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
        two = len(networks) > 1
        pipeline: Any = diffusers.WanPipeline(
            **parts,  # pyright: ignore[reportArgumentType]
            scheduler=scheduler,
            transformer=self.module,
            transformer_2=self.module if two else None,
            boundary_ratio=boundary if two else None,
        )
        pipeline.save_config(directory)
        scheduler.save_pretrained(directory / "scheduler")


def encode_words(prompts: Sequence[str], vocabulary: Sequence[Sequence[str]], width: int) -> Tensor:
    """One-hot tokens (B, slots, width): slot s says which word of ``vocabulary[s]`` was asked for.

    An empty prompt asks for nothing: the dropped condition, a sample of any class.

    Raises:
        ValueError: a prompt with no word, or several, of a slot.
    """
    condition = torch.zeros(len(prompts), len(vocabulary), width)
    for row, prompt in enumerate(prompts):
        words = re.findall(r"\w+", prompt.lower())
        offset = 0
        if not prompt.strip():
            condition[row] = null_words(1, len(vocabulary), width)[0]
            continue
        for slot, choices in enumerate(vocabulary):
            found = [choice for choice in choices if choice in words]
            if len(found) != 1:
                raise ValueError(
                    f"prompt {prompt!r} names {len(found)} of {', '.join(choices)}; this model "
                    "needs exactly one"
                )
            condition[row, slot, offset + choices.index(found[0])] = 1.0
            offset += len(choices)
    return condition


def null_words(count: int, slots: int, width: int) -> Tensor:
    """The dropped condition: the last one-hot position, which no word uses."""
    null = torch.zeros(count, slots, width)
    null[:, :, -1] = 1.0
    return null
