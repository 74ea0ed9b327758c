"""What trains of a network: a low-rank adapter through peft, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, Field


class LoraAdapter(BaseModel, frozen=True, extra="forbid"):
    """A low-rank adapter through peft, on the modules whose names end in one of ``targets``."""

    rank: int = Field(default=16, gt=0, description="Rank r.")
    alpha: int = Field(default=32, gt=0, description="Scale; the update is alpha/rank B A.")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="Name endings of the linear layers that get an adapter.",
    )


def unmatched_targets(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The adapter targets that match no module name, by peft's own rule (whole-part suffix)."""
    return [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]


def set_trainable(
    network: Any,
    lora: LoraAdapter | None,
    dtype: str,
    checkpoint: str,
    seed: int,
    exclude: Sequence[str] = (),
) -> Any:
    """Give ``network`` a Gaussian-initialised adapter that alone trains, or let all of it train.

    Args:
        network: a model with peft's mixin (diffusers and transformers models are).
        lora: the adapter; None: everything trains, in fp32.
        dtype: a frozen base is kept in it, quantised weights apart, the adapter in fp32.
        checkpoint: for messages.
        seed: starts the adapter.
        exclude: name endings of linear layers that a target would match and must not.

    Raises:
        ValueError: an adapter target that matches no layer.
    """
    if lora is None:
        return network.requires_grad_(True)
    from peft import LoraConfig

    names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    if missing := unmatched_targets(lora.targets, names):
        raise ValueError(f"LoRA targets {missing} match no linear layer of {checkpoint}")
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=list(lora.targets),
                exclude_modules=list(exclude) or None,
                init_lora_weights="gaussian",
            )
        )
    for parameter in network.parameters():
        # peft gives an adapter the dtype of the layer it goes on.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif dtype == "bfloat16" and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    return network
