"""Diffusers' ``WanTransformer3DModel`` as every Wan policy uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rollout.policies.pipelines import CPU_BATCH, kept_states


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
    sizes = zip(x.shape[2:], network.config["patch_size"], strict=True)
    grid = [size // patch for size, patch in sizes]
    states = kept_states(network.blocks, layers, forward)
    tokens = [found[: len(x)].float() for found in states]
    return [hidden.transpose(1, 2).unflatten(2, grid) for hidden in tokens]
