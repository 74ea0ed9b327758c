"""Published text-to-media pipelines of diffusers as flow policies: their files and what is frozen.

A directory as the stock pipeline reads it: ``model_index.json`` and a folder for each component. The
transformers train; text encoder and VAE are frozen and read when first used. With stock's sigmas and
Euler steps, samples are stock's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.policies.adapters import LoraAdapter, set_trainable
from rollout.policies.base import FlowPolicy

if TYPE_CHECKING:
    from rollout.policies.prompt_embeddings import PromptEmbeddings

INDEX = "model_index.json"
COMPONENTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# diffusers' schedulers of a few-step pipeline: along the ODE, or through fresh noise.
STEPPING, RENOISING = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
# Below this batch size the CPU matrix kernels take another path and the last bits of a sample
# depend on its company; rows are repeated up to it so that they don't.
CPU_BATCH = 4


class TransformerConfig(BaseModel, frozen=True, extra="forbid"):
    """Options of every policy on a transformer of diffusers."""

    checkpoint: str
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


def is_pipeline(directory: Path) -> bool:
    """Whether it is a pipeline with a text encoder; class-conditional models have conditions.json."""
    return (directory / INDEX).is_file() and not (directory / "conditions.json").is_file()


def pipeline_index(
    directory: Path, kind: str, transformers: Sequence[str] = ("transformer",)
) -> dict[str, Any]:
    """``model_index.json`` of a pipeline of the class ``kind``, after a look at its components.

    Raises:
        ValueError: another pipeline, or one with a component missing.
    """
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    if index["_class_name"] != kind:
        raise ValueError(f"{directory} is a {index['_class_name']}, not a {kind}")
    parts = dict.fromkeys(transformers, "config.json") | COMPONENTS
    missing = [
        f"{name}/{file}" for name, file in parts.items() if not (directory / name / file).is_file()
    ]
    if missing:
        raise ValueError(
            f"{directory} has no {', '.join(missing)}; copy or download it again, whole"
        )
    return index


def frozen_bytes(index: Mapping[str, Any], configs: Mapping[str, Any], dtype: str) -> int:
    """Bytes of a pipeline's text encoder, in ``dtype``, and of its VAE, in fp32.

    Args:
        index: library and class of each, as ``model_index.json`` has them; configs: of each.
    """
    import diffusers
    import transformers

    encoder: Any = getattr(transformers, index["text_encoder"][1])
    vae: Any = getattr(diffusers, index["vae"][1])
    with torch.device("meta"):
        text = encoder(encoder.config_class(**configs["text_encoder"]))
        pixels = vae.from_config(configs["vae"])
    width = getattr(torch, dtype).itemsize
    counts = [sum(p.numel() for p in part.parameters()) for part in (text, pixels)]
    return width * counts[0] + torch.float32.itemsize * counts[1]


def component_configs(directory: Path) -> dict[str, Any]:
    """``config.json`` of text encoder and VAE of a pipeline."""
    return {
        part: json.loads((directory / part / COMPONENTS[part]).read_text())
        for part in ("text_encoder", "vae")
    }


def snapshot(name: str, download: bool) -> Path:
    """The directory of the hub's pipeline ``name``; without ``download`` only if it is here already.

    Raises:
        ValueError: it is not here, and was not to be or could not be downloaded.
    """
    from huggingface_hub import snapshot_download

    patterns = [INDEX, *(f"{part}/*" for part in (*COMPONENTS, "transformer_2"))]
    try:
        found = snapshot_download(name, allow_patterns=patterns, local_files_only=not download)
    except OSError as error:  # all of the hub's errors are
        raise ValueError(
            f"{name} is not on this machine: run 'hf download {name}' where the hub can be reached "
            f"(HF_HUB_OFFLINE unset), or give the directory of a copy ({error})"
        ) from error
    return Path(found)


def kept_states(blocks: Any, layers: Sequence[int], forward: Callable[[], Any]) -> list[Tensor]:
    """What the ``blocks`` at ``layers`` return while ``forward`` runs their network."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({layer: output})

    hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]


def prepare_transformer(transformer: Any, config: TransformerConfig, seed: int) -> Any:
    """Set what trains of a diffusers model: a Gaussian-initialised adapter, or everything.

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
    pipeline: str,
    adapter: bool,
    name: str = "transformer",
) -> None:
    """Write trained ``weights`` of ``transformer`` as diffusers' loaders read them, under ``name``.

    The values come from ``weights``, not from the module, whose parameters may be sharded.

    Args:
        pipeline: the class whose ``load_lora_weights`` is to read an adapter.
        adapter: an adapter trains, else everything.
    """
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if adapter:
        import diffusers
        from peft import get_peft_model_state_dict

        layers: Any = get_peft_model_state_dict(transformer, state_dict=values)
        # Without the adapter's own metadata a loader assumes alpha = rank: another scale.
        getattr(diffusers, pipeline).save_lora_weights(
            directory,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        return
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    transformer.save_config(directory / name)
    save_file(values, directory / name / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def save_two_steps(directory: Path, sigma: float, renoise: bool, index: Mapping[str, Any]) -> None:
    """A pipeline's ``index`` and a scheduler that steps at the sigmas (1, ``sigma``) when asked for two.

    With ``renoise`` it steps through fresh noise.
    """
    import diffusers

    kind = RENOISING if renoise else STEPPING
    scheduler: Any = getattr(diffusers, kind)(shift=1.0, shift_terminal=sigma)
    replace_link(directory / "scheduler", None)
    scheduler.save_pretrained(directory / "scheduler")
    changed = {**index, "scheduler": ["diffusers", kind]}
    (directory / INDEX).write_text(json.dumps(changed, indent=2))


def replace_link(place: Path, target: Path | None) -> None:
    """Make ``place`` a link to the directory ``target`` (None: no link), whatever link it was."""
    place.unlink(missing_ok=True) if place.is_symlink() else None
    if target is not None:
        place.symlink_to(target.resolve())


class PipelinePolicy(FlowPolicy):
    """A pipeline in ``directory``: conditions are (B, TEXT_TOKENS, width) embeddings of prompts.

    Attributes:
        pipeline: stock's class.
        index: its ``model_index.json``.
    """

    pipeline: str
    negative_prompt: str

    def __init__(
        self,
        directory: Path,
        index: Mapping[str, Any],
        module: Any,
        embeddings: PromptEmbeddings,
        adapted: bool,
        reference: bool,
    ) -> None:
        super().__init__(module, adapted=adapted, reference=reference)
        self.directory, self.index, self._embeddings = directory, dict(index), embeddings

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See ``FlowPolicy``; any text is a prompt."""
        return self._embeddings(prompts)

    def encode_null(self, count: int) -> Tensor:
        """The negative prompt's embedding."""
        return self._embeddings([self.negative_prompt]).expand(count, -1, -1)

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        """See ``FlowPolicy``; one sample's pixels are held at a time."""
        return np.concatenate([super(PipelinePolicy, self).decode(row) for row in x.split(1)])

    def save(
        self, directory: Path, weights: Mapping[str, Tensor], name: str = "transformer"
    ) -> None:
        """What trained, for the stock pipeline.

        An adapter is ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights(directory)``.
        A whole transformer is written with ``model_index.json`` and links to the components that did
        not train, where they are now: on this machine ``from_pretrained(directory)`` of the stock class
        is the whole pipeline; elsewhere copy with links followed (``cp -rL``).
        """
        directory.mkdir(parents=True, exist_ok=True)
        save_transformer(self.module, weights, directory, self.pipeline, self._adapted, name)
        if not self._adapted:
            self.link_components(directory)

    def link_components(self, directory: Path) -> None:
        """Make ``directory``, which holds what trained, a whole pipeline."""
        (directory / INDEX).write_text(json.dumps(self.index, indent=2))
        for part in sorted(set(COMPONENTS) - {"transformer"}):
            if (directory / part).is_symlink() or not (directory / part).exists():
                replace_link(directory / part, self.directory / part)
