"""Flow policies on diffusers' own ``WanTransformer3DModel``.

The published layout is read and written: ``transformer/config.json`` with its safetensors. This page
holds the configuration of all, and the class-conditional form, whose conditions are one-hot words
(``conditions.json`` beside the transformer names the vocabulary and the latent shape); it needs no
text encoder and no VAE, and it is what the embedded digit models are. Text-to-video pipelines are in
``wan_pipeline.py``. The network is the same class at every size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from rollout.policies.adapters import LoraAdapter
from rollout.policies.base import FlowPolicy
from rollout.policies.wan_network import (
    network_features,
    network_times,
    network_velocity,
    prepare_transformer,
    save_transformer,
    wan_linear_names,
)

EMBEDDED = ("digits", "moving-digits")
# Architectures of published text-to-video pipelines, as their transformer/config.json has them.
T2V: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
UNDISTILLED = (
    "a text-to-video pipeline can be planned as a teacher; it has no student that runs yet"
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": T2V
    | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": T2V
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": T2V
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
TWO_NETWORKS = ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",)
# diffusers' schedulers of a few-step pipeline: along the ODE, or through fresh noise.
STEPPING, RENOISING = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"


class WanConfig(BaseModel, frozen=True, extra="forbid"):
    """A Wan: an embedded digit model, a directory in diffusers' layout, or a published pipeline.

    Height, width, frames and negative prompt are of text-to-video pipelines; class-conditional models
    know their own.
    """

    kind: Literal["wan"] = "wan"
    checkpoint: str = Field(
        default="digits",
        description="digits, moving-digits (embedded, trained once and cached), a directory, or a hub "
        "id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
    )
    height: int = Field(default=480, gt=0, multiple_of=16, description="Of a video, in pixels.")
    width: int = Field(default=832, gt=0, multiple_of=16, description="Of a video, in pixels.")
    frames: int = Field(default=81, ge=1, description="Of a video: 1, 5, 9, ... 81.")
    negative_prompt: str = Field(
        default="", description="The prompt of the unconditional branch of guidance."
    )
    lora: LoraAdapter | None = Field(
        default=None, description="Train an adapter; without it all parameters train."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Compute type of the forward; trained parameters stay fp32."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass."
    )

    @field_validator("frames")
    @classmethod
    def _whole_latent_frames(cls, frames: int) -> int:
        if frames % 4 != 1:
            raise ValueError(f"{frames} is not 1 more than a multiple of 4, as 81 is")
        return frames

    def directory(self) -> Path:
        """Where the weights are, or for an embedded model will be after ``prepare``.

        Raises:
            ValueError: a path that is not a model in a layout read here, or a published pipeline that
                is not on this machine yet.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import cached_directory

            return cached_directory(self.checkpoint)
        from rollout.policies.wan_pipeline import is_pipeline, pipeline_index, snapshot

        path = (
            snapshot(self.checkpoint, download=False) if self.published else Path(self.checkpoint)
        )
        if is_pipeline(path):
            pipeline_index(path)
            return path
        for part in ("transformer/config.json", "conditions.json"):
            if not (path / part).is_file():
                raise ValueError(
                    f"{path} has no {part}; give {' or '.join(EMBEDDED)}, or a directory with "
                    "transformer/ in diffusers' layout and conditions.json, or of a whole pipeline "
                    f"with model_index.json; or the hub id {' or '.join(PUBLISHED)}"
                )
        return path

    @property
    def published(self) -> bool:
        """Whether ``checkpoint`` is a published pipeline's hub id and no directory here."""
        return self.checkpoint in PUBLISHED and not Path(self.checkpoint).is_dir()

    @property
    def pipeline(self) -> bool:
        """Whether it is a text-to-video pipeline, published or a directory here."""
        from rollout.policies.wan_pipeline import is_pipeline

        own = self.checkpoint not in EMBEDDED and is_pipeline(Path(self.checkpoint))
        return self.published or own

    @property
    def networks(self) -> int:
        """Transformers that train: of Wan2.2's pipelines 2.

        Raises:
            ValueError: see ``sizes``.
        """
        if self.published:
            return 2 if self.checkpoint in TWO_NETWORKS else 1
        from rollout.policies.wan_pipeline import network_names, pipeline_index

        return len(network_names(pipeline_index(self.directory()))) if self.pipeline else 1

    def sizes(self) -> dict[str, Any]:
        """The keys of ``transformer/config.json``, without the weights.

        Raises:
            ValueError: the checkpoint is neither here nor known.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import TRANSFORMER

            return TRANSFORMER
        if self.published:
            return PUBLISHED[self.checkpoint]
        return json.loads((self.directory() / "transformer" / "config.json").read_text())

    def video_latent(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of a pipeline's sample in its VAE's latents.

        Raises:
            ValueError: see ``sizes``; or its VAE does not divide height, width or frames.
        """
        from rollout.policies.wan_pipeline import PUBLISHED_VAE, latent_shape

        if self.published:
            return latent_shape(PUBLISHED_VAE, self)
        vae = self.directory() / "vae" / "config.json"
        return latent_shape(json.loads(vae.read_text()), self)

    def linear_names(self) -> list[str]:
        """Names of the linear layers an adapter can go on, without building the network.

        Raises:
            ValueError: see ``sizes``.
        """
        return wan_linear_names(self.sizes()["num_layers"])

    def prepare(self) -> Path:
        """Make the weights available on this machine: train an embedded model, download a published.

        Raises:
            ValueError: see ``directory``; or a pipeline that cannot be downloaded.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import ensure_base

            return ensure_base(self.checkpoint)
        if self.published:
            from rollout.policies.wan_pipeline import snapshot

            return snapshot(self.checkpoint, download=True)
        return self.directory()

    def build(self, device: str = "cpu", seed: int = 0, reference: bool = False) -> FlowPolicy:
        """The policy on ``device``.

        Args:
            device: torch device.
            seed: starts a new adapter.
            reference: keep what ``FlowPolicy.reference`` needs (a frozen copy, if all trains).

        Raises:
            ValueError: see ``prepare``.
        """
        if self.pipeline:
            from rollout.policies.wan_pipeline import WanPipelinePolicy

            return WanPipelinePolicy(self, self.prepare(), device, seed, reference)
        return WanPolicy(self, self.prepare(), device, seed, reference)

    def conditional(self, device: str = "cpu", seed: int = 0) -> WanPolicy:
        """The policy of a class-conditional model, which students are made of.

        Raises:
            ValueError: a text-to-video pipeline; see ``directory``.
        """
        if self.pipeline:
            raise ValueError(f"{self.checkpoint}: {UNDISTILLED}")
        return WanPolicy(self, self.prepare(), device, seed, reference=False)


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
        transformer: Any = WanTransformer3DModel.from_pretrained(directory / "transformer")
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
        save_transformer(self.module, weights, directory, self.config.lora is not None, name)
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
