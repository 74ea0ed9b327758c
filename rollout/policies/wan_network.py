"""Diffusers' ``WanTransformer3DModel`` as every Wan policy uses it: forwards, what trains, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.policies.adapters import set_trainable

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

    from rollout.policies.wan import WanConfig

# Below this batch size the CPU matrix kernels take another path and the last bits of a sample
# depend on its company; rows are repeated up to it so that they don't.
CPU_BATCH = 4


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


def network_times(t: Tensor, whole: bool) -> Tensor:
    """What the network is fed for ``t`` (B,) in [0, 1]: ``1000 t``, where ``whole`` its floor."""
    return (t * 1000).floor() if whole else t * 1000


def network_velocity(
    network: Any, x: Tensor, times: Tensor, condition: Tensor, dtype: str
) -> Tensor:
    """One forward of ``network`` in fp32 or autocast to bfloat16: fp32 (B, C, F, H, W).

    Args:
        x: (B, C, F, H, W); times: (B,) of ``network_times``; condition: (B, tokens, text_dim).
        dtype: ``float32`` or ``bfloat16``.
    """
    batch, kind = len(x), x.device.type
    if kind == "cpu" and batch < CPU_BATCH:
        repeat = torch.arange(CPU_BATCH) % batch
        x, times, condition = x[repeat], times[repeat], condition[repeat]
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        (velocity,) = network(
            hidden_states=x, timestep=times, encoder_hidden_states=condition, return_dict=False
        )
    return velocity[:batch].float()


def network_features(
    network: Any, x: Tensor, layers: Sequence[int], forward: Callable[[], Any]
) -> list[Tensor]:
    """Hidden states (B, width, F', H', W') after the blocks ``layers``, one place a patch.

    ``forward`` runs ``network`` on ``x``.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({layer: output})

    hooks = [network.blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    sizes = zip(x.shape[2:], network.config["patch_size"], strict=True)
    grid = [size // patch for size, patch in sizes]
    tokens = [found[layer][: len(x)].float() for layer in layers]
    return [hidden.transpose(1, 2).unflatten(2, grid) for hidden in tokens]


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
