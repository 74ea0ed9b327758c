"""Flow policies on diffusers' own ``WanTransformer3DModel``.

The published layout is read and written: ``transformer/config.json`` with its safetensors. This page
holds the configuration of all. The conditions of a class-conditional model are one-hot words
(``conditions.json`` beside the transformer names the vocabulary and the latent shape); it needs no
text encoder and no VAE, and it is what the embedded digit models are: ``wan_conditional.py``.
Text-to-video pipelines are in ``wan_pipeline.py``. The network is the same class at every size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator

from rollout.policies.pipelines import (
    TransformerConfig,
    component_configs,
    frozen_bytes,
    is_pipeline,
    snapshot,
)
from rollout.policies.prompt_embeddings import TEXT_TOKENS
from rollout.policies.wan_network import wan_linear_names

if TYPE_CHECKING:
    from rollout.policies.base import FlowPolicy
    from rollout.policies.wan_conditional import WanPolicy
    from rollout.policies.wan_pipeline import WanPipelinePolicy

# Embedded models, and the shape of their samples.
EMBEDDED: dict[str, tuple[int, ...]] = {"digits": (1, 1, 8, 8), "moving-digits": (1, 4, 8, 8)}
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
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": T2V
    | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": T2V
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": T2V
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
UNDISTILLED = "a pipeline of two transformers has no student; distil one of a single transformer"
TWO_NETWORKS = ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",)


class WanConfig(TransformerConfig, frozen=True, extra="forbid"):
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
        from rollout.policies.wan_pipeline import wan_index

        path = (
            snapshot(self.checkpoint, download=False) if self.published else Path(self.checkpoint)
        )
        if is_pipeline(path):
            wan_index(path)
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
        from rollout.policies.wan_pipeline import network_names, wan_index

        return len(network_names(wan_index(self.directory()))) if self.pipeline else 1

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

    def latent(self) -> tuple[int, ...]:
        """(channels, frames, height, width) of a sample in the space of the flow.

        Raises:
            ValueError: see ``sizes``; or its VAE does not divide height, width or frames.
        """
        from rollout.policies.wan_pipeline import PUBLISHED_PARTS, latent_shape

        if self.checkpoint in EMBEDDED:
            return EMBEDDED[self.checkpoint]
        if self.published:
            return latent_shape(PUBLISHED_PARTS["vae"], self)
        if not self.pipeline:
            return tuple(self._conditions()["latent_shape"])
        vae = self.directory() / "vae" / "config.json"
        return latent_shape(json.loads(vae.read_text()), self)

    @property
    def layers(self) -> int:
        """The network's blocks."""
        return self.sizes()["num_layers"]

    @property
    def channels(self) -> int:
        """Channels of the network's hidden states."""
        sizes = self.sizes()
        return sizes["num_attention_heads"] * sizes["attention_head_dim"]

    def frozen_bytes(self) -> int:
        """Bytes of what a process holds beside the transformers: a pipeline's text encoder and VAE.

        Raises:
            ValueError: see ``sizes``.
        """
        from rollout.policies import wan_pipeline

        if not self.pipeline:
            return 0
        if self.published:
            parts = wan_pipeline.PUBLISHED_CLASSES, wan_pipeline.PUBLISHED_PARTS
            return frozen_bytes(*parts, self.dtype)
        directory = self.directory()
        index = wan_pipeline.wan_index(directory)
        return frozen_bytes(index, component_configs(directory), self.dtype)

    def tokens(self) -> int:
        """Tokens of the network's sequence for a sample, one a patch."""
        sizes = zip(self.latent()[1:], self.sizes()["patch_size"], strict=True)
        return math.prod(size // patch for size, patch in sizes)

    def network(self, layers: int | None = None) -> Any:
        """A transformer of its sizes (of ``layers`` blocks), without its weights."""
        from diffusers import WanTransformer3DModel

        changed = {} if layers is None else {"num_layers": layers}
        return WanTransformer3DModel.from_config(self.sizes() | changed)

    def example(self, rows: int) -> dict[str, Any]:
        """Arguments of the network's forward on ``rows`` samples, of any values."""
        words = TEXT_TOKENS
        if not self.pipeline:
            words = len(self._conditions()["vocabulary"])
        return {
            "hidden_states": torch.zeros(rows, *self.latent()),
            "timestep": torch.zeros(rows),
            "encoder_hidden_states": torch.zeros(rows, words, self.sizes()["text_dim"]),
            "return_dict": False,
        }

    def _conditions(self) -> dict[str, Any]:
        """Of a class-conditional model: vocabulary and latent shape."""
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import vocabulary

            return {"vocabulary": vocabulary(self.checkpoint)}
        return json.loads((self.directory() / "conditions.json").read_text())

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
        from rollout.policies.wan_conditional import WanPolicy

        return WanPolicy(self, self.prepare(), device, seed, reference)

    def student(self, device: str = "cpu", seed: int = 0) -> WanPolicy | WanPipelinePolicy:
        """The policy that a few-step student's networks are: fed ``1000 t``, as its scheduler does.

        Raises:
            ValueError: two transformers, which serve the steps of the teacher already; see ``prepare``.
        """
        if self.networks > 1:
            raise ValueError(f"{self.checkpoint}: {UNDISTILLED}")
        policy: Any = self.build(device, seed)
        policy.whole_timesteps = False
        return policy
