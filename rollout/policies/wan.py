"""Flow policies on diffusers' own ``WanTransformer3DModel``.

The published layout is read and written: ``transformer/config.json`` with its safetensors. This page
holds the class-conditional form, whose conditions are one-hot words (``conditions.json`` beside the
transformer names the vocabulary and the latent shape); it needs no text encoder and no VAE, and it
is what the embedded digit models are. The network is the same class at every size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.policies.adapters import LoraAdapter, set_trainable
from rollout.policies.base import FlowPolicy

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

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
UNREAD = "the text encoder and VAE of published Wan pipelines are not read yet"
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": T2V
    | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": T2V
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
# Below this batch size the CPU matrix kernels take another path and the last bits of a sample
# depend on its company; rows are repeated up to it so that they don't.
CPU_BATCH = 4
# diffusers' schedulers of a few-step pipeline: along the ODE, or through fresh noise.
STEPPING, RENOISING = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"


class WanConfig(BaseModel, frozen=True, extra="forbid"):
    """A Wan transformer: an embedded digit model or a directory in diffusers' layout.

    A published pipeline, by its hub id, is known by its sizes alone: it is planned, not yet run.
    """

    kind: Literal["wan"] = "wan"
    checkpoint: str = Field(
        default="digits",
        description="digits, moving-digits (embedded, trained once and cached), or a directory; to "
        "plan a run also a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
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

    def directory(self) -> Path:
        """Where the weights are, or for an embedded model will be after ``prepare``.

        Raises:
            ValueError: a path that is not a transformer in the layout read here, or a published
                pipeline.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import cached_directory

            return cached_directory(self.checkpoint)
        if self.published:
            raise ValueError(f"{self.checkpoint} can be planned, not run: {UNREAD}")
        path = Path(self.checkpoint)
        for part in ("transformer/config.json", "conditions.json"):
            if not (path / part).is_file():
                raise ValueError(
                    f"{path} has no {part}; give {' or '.join(EMBEDDED)}, or a directory with "
                    "transformer/ in diffusers' layout and conditions.json"
                )
        return path

    @property
    def published(self) -> bool:
        """Whether ``checkpoint`` is a published pipeline's hub id and no directory here."""
        return self.checkpoint in PUBLISHED and not Path(self.checkpoint).is_dir()

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

    def linear_names(self) -> list[str]:
        """Names of the linear layers an adapter can go on, without building the network.

        Raises:
            ValueError: see ``sizes``.
        """
        return wan_linear_names(self.sizes()["num_layers"])

    def prepare(self) -> Path:
        """Make the weights available on this machine (trains an embedded model once)."""
        if self.checkpoint in EMBEDDED:
            from rollout.policies.digits import ensure_base

            return ensure_base(self.checkpoint)
        return self.directory()

    def build(self, device: str = "cpu", seed: int = 0, reference: bool = False) -> WanPolicy:
        """The policy on ``device``.

        Args:
            device: torch device.
            seed: starts a new adapter.
            reference: keep what ``FlowPolicy.reference`` needs (a frozen copy, if all trains).
        """
        return WanPolicy(self, self.prepare(), device, seed, reference)


def wan_linear_names(num_layers: int) -> list[str]:
    """The names of all linear layers of a text-to-video ``WanTransformer3DModel``."""
    heads = ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"]
    heads += ["text_embedder.linear_1", "text_embedder.linear_2"]
    block = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
    block += ["ffn.net.0.proj", "ffn.net.2"]
    return (
        [f"condition_embedder.{name}" for name in heads]
        + [f"blocks.{i}.{name}" for i in range(num_layers) for name in block]
        + ["proj_out"]
    )


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
        batch = len(x)
        if self.device.type == "cpu" and batch < CPU_BATCH:
            repeat = torch.arange(CPU_BATCH) % batch
            x, t, condition = x[repeat], t[repeat], condition[repeat]
        half = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            (velocity,) = self.network(
                hidden_states=x,
                timestep=(t * 1000).floor() if self.whole_timesteps else t * 1000,
                encoder_hidden_states=condition,
                return_dict=False,
            )
        return velocity[:batch].float()

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """See ``FlowPolicy``; one place a patch."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda module, inputs, output: found.update({layer: output})

        hooks = [
            self.network.blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)
        ]
        try:
            self.velocity(x, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
        sizes = zip(x.shape[2:], self.network.config["patch_size"], strict=True)
        grid = [size // patch for size, patch in sizes]
        tokens = [found[layer][: len(x)].float() for layer in layers]
        return [hidden.transpose(1, 2).unflatten(2, grid) for hidden in tokens]

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


def prepare_transformer(transformer: WanTransformer3DModel, config: WanConfig, seed: int) -> Any:
    """Set what trains: a Gaussian-initialised adapter, or everything.

    Raises:
        ValueError: an adapter target that matches no layer.
    """
    transformer.train()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return set_trainable(transformer, config.lora, config.dtype, config.checkpoint, seed)


def save_transformer(
    transformer: Any,
    weights: Mapping[str, Tensor],
    directory: Path,
    adapter: bool,
    name: str = "transformer",
) -> None:
    """Write trained ``weights`` of ``transformer`` as diffusers' loaders read them, under ``name``.

    The values come from ``weights``, not from the module, whose parameters may be sharded.
    """
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if adapter:
        from diffusers import WanPipeline
        from peft import get_peft_model_state_dict

        layers: Any = get_peft_model_state_dict(transformer, state_dict=values)
        # Without the adapter's own metadata a loader assumes alpha = rank: another scale.
        WanPipeline.save_lora_weights(
            directory,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        return
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    transformer.save_config(directory / name)
    save_file(values, directory / name / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


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
