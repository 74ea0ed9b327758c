"""Published Z-Image text-to-image pipelines as flow policies, on diffusers' ``ZImageTransformer2DModel``.

The network is told ``1 - t`` and answers with minus the velocity, on lists of single-frame latents and
of embeddings without padding. Stock's ``guidance_scale`` is 1 less than that of this platform: it adds
``scale (v - v_null)`` to ``v``, so that 0 is no guidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rollout.policies.pipelines import (
    CPU_BATCH,
    PipelinePolicy,
    TransformerConfig,
    component_configs,
    frozen_bytes,
    kept_states,
    pipeline_index,
    prepare_transformer,
    save_two_steps,
    snapshot,
)
from rollout.policies.prompt_embeddings import TEXT_TOKENS, Qwen3Embeddings, shared_embeddings

PIPELINE = "ZImagePipeline"
# The architecture of the published pipelines, as their transformer/config.json has it, and the keys of
# the configs of text encoder and VAE that sizes depend on.
T2I: dict[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Tongyi-MAI/Z-Image": T2I,
    "Tongyi-MAI/Z-Image-Turbo": T2I,
}
PUBLISHED_PARTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
PUBLISHED_CLASSES = {
    "text_encoder": ("transformers", "Qwen3Model"),
    "vae": ("diffusers", "AutoencoderKL"),
}


class ZImageConfig(TransformerConfig, frozen=True, extra="forbid"):
    """A Z-Image: a directory of a pipeline, or a published one."""

    kind: Literal["z_image"] = "z_image"
    checkpoint: str = Field(
        default="Tongyi-MAI/Z-Image",
        description="A directory, or a hub id: Tongyi-MAI/Z-Image or Tongyi-MAI/Z-Image-Turbo.",
    )
    height: int = Field(default=1024, gt=0, multiple_of=16, description="In pixels.")
    width: int = Field(default=1024, gt=0, multiple_of=16, description="In pixels.")

    @property
    def published(self) -> bool:
        """Whether ``checkpoint`` is a published pipeline's hub id and no directory here."""
        return self.checkpoint in PUBLISHED and not Path(self.checkpoint).is_dir()

    @property
    def pipeline(self) -> bool:
        """Whether it is a text-to-media pipeline."""
        return True

    @property
    def networks(self) -> int:
        """Transformers that train."""
        return 1

    def directory(self) -> Path:
        """Where the weights are.

        Raises:
            ValueError: a path that is no whole Z-Image pipeline, or a published one that is not on this
                machine yet.
        """
        path = (
            snapshot(self.checkpoint, download=False) if self.published else Path(self.checkpoint)
        )
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"{path} has no model_index.json; give the directory of a whole pipeline in "
                f"diffusers' layout, or the hub id {' or '.join(PUBLISHED)}"
            )
        pipeline_index(path, PIPELINE)
        return path

    def sizes(self) -> dict[str, Any]:
        """The keys of ``transformer/config.json``, without the weights.

        Raises:
            ValueError: the checkpoint is neither here nor known.
        """
        if self.published:
            return PUBLISHED[self.checkpoint]
        return json.loads((self.directory() / "transformer" / "config.json").read_text())

    def latent(self) -> tuple[int, int, int, int]:
        """(channels, 1, height, width) of a sample in the VAE's latents.

        Raises:
            ValueError: see ``sizes``; or the VAE does not divide height or width.
        """
        vae = PUBLISHED_PARTS["vae"]
        if not self.published:
            vae = json.loads((self.directory() / "vae" / "config.json").read_text())
        space = 2 ** (len(vae["block_out_channels"]) - 1)
        if self.height % (2 * space) or self.width % (2 * space):
            raise ValueError(
                f"{self.width} x {self.height} does not fit {self.checkpoint}: width and height must be "
                f"multiples of {2 * space}"
            )
        return self.sizes()["in_channels"], 1, self.height // space, self.width // space

    @property
    def layers(self) -> int:
        """The network's blocks."""
        return self.sizes()["n_layers"]

    @property
    def channels(self) -> int:
        """Channels of the network's hidden states."""
        return self.sizes()["dim"]

    def frozen_bytes(self) -> int:
        """Bytes of what a process holds beside the transformer: text encoder and VAE.

        Raises:
            ValueError: see ``sizes``.
        """
        if self.published:
            return frozen_bytes(PUBLISHED_CLASSES, PUBLISHED_PARTS, self.dtype)
        directory = self.directory()
        index = pipeline_index(directory, PIPELINE)
        return frozen_bytes(index, component_configs(directory), self.dtype)

    def tokens(self) -> int:
        """Tokens of the network's sequence for a sample, one a patch, without the text's."""
        _, _, height, width = self.latent()
        return height * width // 4

    def network(self, layers: int | None = None) -> Any:
        """A transformer of its sizes (of ``layers`` blocks), without its weights."""
        from diffusers import ZImageTransformer2DModel

        changed = {} if layers is None else {"n_layers": layers}
        return ZImageTransformer2DModel.from_config(self.sizes() | changed)

    def example(self, rows: int) -> dict[str, Any]:
        """Arguments of the network's forward on ``rows`` samples with the longest texts."""
        width = self.sizes()["cap_feat_dim"]
        return {
            "x": [torch.zeros(*self.latent()) for _ in range(rows)],
            "t": torch.zeros(rows),
            "cap_feats": [torch.zeros(TEXT_TOKENS, width) for _ in range(rows)],
            "return_dict": False,
        }

    def linear_names(self) -> list[str]:
        """Names of the linear layers of the main blocks, which the refiners' are like.

        Raises:
            ValueError: see ``sizes``.
        """
        block = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        block += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")] + ["adaLN_modulation.0"]
        layers = self.sizes()["n_layers"]
        return [f"layers.{layer}.{name}" for layer in range(layers) for name in block]

    def prepare(self) -> Path:
        """Make the weights available on this machine: download a published pipeline.

        Raises:
            ValueError: see ``directory``; or it cannot be downloaded.
        """
        return snapshot(self.checkpoint, download=True) if self.published else self.directory()

    def build(self, device: str = "cpu", seed: int = 0, reference: bool = False) -> ZImagePolicy:
        """The policy on ``device``.

        Args:
            device: torch device.
            seed: starts a new adapter.
            reference: keep what ``FlowPolicy.reference`` needs (a frozen copy, if all trains).

        Raises:
            ValueError: see ``prepare``.
        """
        return ZImagePolicy(self, self.prepare(), device, seed, reference)

    def student(self, device: str = "cpu", seed: int = 0) -> ZImagePolicy:
        """The policy that a few-step student's networks are.

        Raises:
            ValueError: see ``prepare``.
        """
        return self.build(device, seed)


class ZImagePolicy(PipelinePolicy):
    """A text-to-image pipeline; samples are videos of one frame."""

    pipeline = PIPELINE

    def __init__(
        self, config: ZImageConfig, directory: Path, device: str, seed: int, reference: bool
    ) -> None:
        from diffusers import ZImageTransformer2DModel

        index = pipeline_index(directory, PIPELINE)
        self.config, self.negative_prompt = config, config.negative_prompt
        self.latent_shape = config.latent()
        network: Any = ZImageTransformer2DModel.from_pretrained(
            directory / "transformer", use_safetensors=True
        )
        module = prepare_transformer(network, config, seed).to(device)
        embeddings = shared_embeddings(
            Qwen3Embeddings, directory.resolve(), config.dtype, torch.device(device)
        )
        adapted = config.lora is not None
        super().__init__(directory, index, module, embeddings, adapted, reference)
        self.blocks, self.width = len(network.layers), network.dim

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``FlowPolicy``; rows of zeros at the end of a condition are no tokens."""
        batch, kind = len(x), x.device.type
        if kind == "cpu" and batch < CPU_BATCH:
            repeat = torch.arange(CPU_BATCH) % batch
            x, t, condition = x[repeat], t[repeat], condition[repeat]
        tokens = condition.any(-1).sum(1).tolist()
        texts = [row[:count] for row, count in zip(condition, tokens, strict=True)]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            (found,) = self.network(list(x), 1 - t, texts, return_dict=False)
        return -torch.stack(found)[:batch].float()

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """See ``FlowPolicy``; one place a patch of 2 x 2, which come before the text's."""
        grid = (1, x.shape[3] // 2, x.shape[4] // 2)
        places = grid[1] * grid[2]
        states = kept_states(self.network.layers, layers, lambda: self.velocity(x, t, condition))
        hidden = [found[: len(x), :places].float() for found in states]
        return [tokens.transpose(1, 2).unflatten(2, grid) for tokens in hidden]

    @cached_property
    def _vae(self) -> Any:
        """In fp32; decoded one sample at a time, above 1024 pixels in tiles."""
        from diffusers import AutoencoderKL

        vae: Any = AutoencoderKL.from_pretrained(self.directory / "vae", use_safetensors=True)
        vae.enable_slicing()
        vae.enable_tiling()
        return vae.eval().requires_grad_(False).to(self.device)

    def pixels(self, x: Tensor) -> Tensor:
        """See ``FlowPolicy``."""
        config = self._vae.config
        latents = x[:, :, 0].float() / config.scaling_factor + config.shift_factor
        image = self._vae.decode(latents, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)[:, None]

    def save_pipeline(
        self,
        directory: Path,
        sigma: float,
        boundary: float,
        networks: Sequence[str],
        renoise: bool,
    ) -> None:
        """Make saved ``networks`` a two-step pipeline of stock ``ZImagePipeline``.

        Asked for two steps, its scheduler steps at the sigmas (1, ``sigma``), with ``renoise`` through
        fresh noise. Stock knows one transformer; that of the second step is in ``transformer_2/``, to be
        put in its place by ``callback_on_step_end`` after the first.
        """
        save_two_steps(directory, sigma, renoise, self.index)
