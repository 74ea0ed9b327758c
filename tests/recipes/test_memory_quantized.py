"""Memory estimates of a quantised base against what is really held, alive and read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.memory import loading_memory, plan, worker_memory
from recipes.memory_llada import ModelSize
from rl.text_batches import token_log_probs
from rollout.policies.llada.loading import stored_tensors
from rollout.policies.llada.policy import LladaAdapter, LladaConfig, LladaPolicy
from rollout.policies.llada.quantization import Quantization, installed
from tests.recipes.test_memory import (
    ALL,
    SMALL,
    Alive,
    batch,
    checkpoints,  # noqa: F401  a fixture
    estimate,
    text_recipe,
)

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
TOKENS = 64
needs_package = pytest.mark.skipif(not installed(), reason="bitsandbytes is not installed")


def build(
    directory: Path, kind: Quantization | None, dtype: str = "bfloat16", **options: Any
) -> LladaPolicy:
    adapter = LladaAdapter(rank=ALL[0], alpha=8, targets=ALL[1])
    given = {"dtype": dtype, "quantization": kind, "lora": adapter, **options}
    return LladaConfig.model_validate({"checkpoint": str(directory), **given}).build()


def held(policy: LladaPolicy) -> Iterator[Tensor]:
    """Parameters, and the scales and tables beside quantised ones."""
    for module in policy.module.modules():
        yield from module.parameters(recurse=False)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (getattr(module, "state", None), state, getattr(state, "state2", None)):
            for value in vars(part).values() if part is not None else ():
                if isinstance(value, Tensor):
                    yield value


def bytes_of(tensors: list[Tensor]) -> int:
    """Of their storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_what_a_process_holds(
    checkpoints: Callable[[ModelSize], Path],  # noqa: F811
    kind: Quantization,
    dtype: str,
):
    policy = build(checkpoints(SMALL), kind, dtype)
    with torch.no_grad():
        token_log_probs(policy, batch())
    memory = worker_memory(
        SMALL, lora=ALL, dtype=dtype, batch=1, tokens=TOKENS, block=8, cache="none", guidance=1.0,
        quantization=kind,
    )  # fmt: skip
    assert memory["parameters"] == bytes_of(list(held(policy)))
    loading = loading_memory(SMALL, lora=ALL, dtype=dtype, quantization=kind)
    adapter = sum(p.nbytes for p in policy.trainable().values())
    assert loading["weights"] == memory["parameters"] - adapter


@needs_package
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_is_alive(
    checkpoints: Callable[[ModelSize], Path],  # noqa: F811
    kind: Quantization,
    checkpointing: bool,
):
    policy = build(checkpoints(SMALL), kind, gradient_checkpointing=checkpointing)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    with Alive([*held(policy), *gradients]) as alive:
        token_log_probs(policy, batch(2)).sum().backward()
    assert any(gradient.any() for gradient in gradients)
    memory = estimate(SMALL, ALL, "bfloat16", checkpointing, 2, quantization=kind)
    counted = memory["activations"] + memory["logits"] + memory["dequantised"]
    assert counted == pytest.approx(alive.peak, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_beside_the_weights_are_the_four_largest_tensors(
    checkpoints: Callable[[ModelSize], Path],  # noqa: F811
    dtype: str,
):
    stored = stored_tensors(checkpoints(SMALL)).values()
    sizes = sorted((tensor[...].numel() for tensor in stored), reverse=True)
    width = 2 if dtype == "bfloat16" else 4
    whole = loading_memory(SMALL, lora=ALL, dtype=dtype, quantization=None)
    assert whole == {"weights": width * SMALL.parameters(), "read": width * sum(sizes[:4])}
    one = loading_memory(SMALL, lora=ALL, dtype=dtype, quantization="nf4")
    assert one["read"] == width * sizes[0]
    all_trains = loading_memory(SMALL, lora=None, dtype=dtype, quantization=None)
    assert all_trains == {"weights": 4 * SMALL.parameters(), "read": 4 * sum(sizes[:4])}


@pytest.mark.parametrize(("kind", "shown"), [(None, "14.93"), ("int8", "8.44"), ("nf4", "5.28")])
def test_the_plan_of_a_released_model_counts_its_base(kind: Quantization | None, shown: str):
    policy = {"kind": "llada", "checkpoint": "GSAI-ML/LLaDA-8B-Instruct", "dtype": "bfloat16"}
    lora = {"rank": 128, "alpha": 64}
    rows = plan(text_recipe(policy=policy | {"lora": lora, "quantization": kind}))
    assert rows["process while it loads"]["weights"] == f"{shown} GiB"
    # Of 6.98 G weights of projections, bits for each; 1.04 G others and 335.5 M of the adapter.
    bits = {None: 16, "int8": 8.005, "nf4": 4.127}[kind]
    whole = (6_979_321_856 * bits / 8 + 2 * 1_036_259_328 + 4 * 335_544_320) / 2**30
    for process in ("learner rank", "rollout actor"):
        assert float(rows[process]["parameters"].split()[0]) == pytest.approx(whole, abs=0.01)
        assert ("dequantised" in rows[process]) == (kind is not None)
