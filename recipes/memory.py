"""Memory of a recipe's processes: what a learner rank and a rollout actor hold at their peak.

Text policies' here, by arithmetic: a LLaDA's activations are in ``recipes/memory_llada.py``, what an
optimiser needs in ``recipes/memory_state.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from recipes.memory_llada import Lora, ModelSize, Network
from recipes.memory_state import BF16, FP32, state_memory
from rollout.policies.llada.quantization import Quantization

if TYPE_CHECKING:
    from recipes.schema import AnyRecipe, Recipe
    from rollout.masked import MaskedSamplerConfig
    from rollout.policies.llada.policy import LladaConfig


def learner_memory(
    size: ModelSize,
    *,
    lora: Lora | None,
    dtype: str,
    zero_stage: int,
    ranks: int,
    micro_batch: int,
    tokens: int,
    gradient_checkpointing: bool,
    scored_tokens: int,
    gpu: bool = True,
    reference: bool = False,
    quantization: Quantization | None = None,
) -> dict[str, int]:
    """Bytes that rank 0 of a text policy's learner holds while gradients are computed.

    The parts are alive together at the backward pass through the logits, except that a checkpointed
    layer is recomputed when these are gone: the sum is an upper bound. An optimiser step comes when
    both are, and takes up to 2 T/N more for a moment.

    Args:
        size: of the network.
        lora: None: everything trains.
        dtype: ``float32`` or ``bfloat16``, see ``LladaConfig``.
        zero_stage, ranks, gpu, reference: see ``state_memory``.
        micro_batch: rows of a forward; tokens: of a row, prompt and completion.
        gradient_checkpointing: recompute layers in the backward pass.
        scored_tokens: tokens of a row that are in the loss, at most; each has three fp32 rows of
            logits: the log-softmax, its gradient, and that of the logits.
        quantization: of the base below an adapter.
    """
    network = Network(size, lora, dtype == "bfloat16", quantization)
    state = state_memory(*network.frozen, network.trained, zero_stage, ranks, gpu, reference)
    rows, scored = micro_batch * tokens, micro_batch * scored_tokens
    return state | {
        "activations": network.activations(rows, scored, gradient_checkpointing),
        "logits": 3 * FP32 * scored * size.embedding_size,
        **network.dequantised,
    }


def worker_memory(
    size: ModelSize,
    *,
    lora: Lora | None,
    dtype: str,
    batch: int,
    tokens: int,
    block: int,
    cache: str,
    guidance: float,
    quantization: Quantization | None = None,
) -> dict[str, int]:
    """Bytes that a rollout actor of a text policy holds while it decodes.

    Activations and logits are not at their peaks together: the sum is an upper bound.

    Args:
        size, lora, dtype, quantization: see ``learner_memory``.
        batch: samples that are decoded together; tokens: of a row, prompt and completion.
        block: tokens of a block, which all need logits at its first step. A sampler holds three fp32
            rows for each: logits, exponential noise, and its logarithm. With guidance, while both
            branches are computed, each branch's head, fp32 and masked rows.
        cache: ``none``, or keys and values of whole rows are kept.
        guidance: a scale other than 1 doubles the rows.
    """
    network = Network(size, lora, dtype == "bfloat16", quantization)
    rows = batch if guidance == 1.0 else 2 * batch
    head = 2 * FP32 + (BF16 if network.half else 0)
    places = batch * block * size.embedding_size
    memory = {
        "parameters": math.prod(network.frozen) + FP32 * network.trained,
        "activations": network.inference(rows * tokens),
        "logits": places * (3 * FP32 if guidance == 1.0 else 2 * head),
        **network.dequantised,
    }
    if cache != "none":
        memory["kv"] = 2 * size.n_layers * rows * tokens * size.kv_width * network.compute
    return memory


def loading_memory(
    size: ModelSize, *, lora: Lora | None, dtype: str, quantization: Quantization | None
) -> dict[str, int]:
    """Bytes of the weights, and of what is read beside them, see ``rollout/policies/llada/loading.py``.

    The embedding, or together with the head and two matrices; as stored, at most in fp32. On a GPU
    ``read`` is CPU memory.
    """
    network = Network(size, lora, dtype == "bfloat16", quantization)
    embedding, matrix = size.embedding_size * size.d_model, size.mlp_hidden_size * size.d_model
    read = max(embedding, matrix) if quantization else 2 * (embedding + matrix)
    weights = math.prod(network.frozen) if lora else FP32 * network.trained
    return {"weights": weights, "read": network.residual * read}


def plan(recipe: AnyRecipe, prompt_tokens: int = 256) -> dict[str, dict[str, str]]:
    """Memory of a recipe's processes in words, with the total: ``learner rank``, ``rollout actor``.

    Args:
        recipe: what is planned.
        prompt_tokens: assumed length of a prompt.

    Raises:
        ValueError: the policy's checkpoint is neither here nor known.
    """
    from recipes.memory_distill import distillation_memory
    from recipes.memory_flow import flow_memory
    from recipes.schema import DistillRecipe

    if isinstance(recipe, DistillRecipe):
        rows = distillation_memory(recipe)
    elif recipe.policy.kind == "llada" and recipe.rollout.kind == "masked":
        rows = _text_rows(recipe, recipe.policy, recipe.rollout, prompt_tokens)
    elif recipe.policy.kind != "llada" and recipe.rollout.kind == "flow":
        rows = flow_memory(recipe, recipe.policy)
    else:
        raise ValueError(f"{recipe.policy.kind} policies have no {recipe.rollout.kind} rollouts")
    return {
        name: {part: readable(size) for part, size in row.items() if size}
        | {"total": readable(sum(row.values()))}
        for name, row in rows.items()
    }


def readable(size: int) -> str:
    """Bytes as GiB, or as MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def _text_rows(
    recipe: Recipe, policy: LladaConfig, rollout: MaskedSamplerConfig, prompt_tokens: int
) -> dict[str, dict[str, int]]:
    size, learner = ModelSize.of(policy.sizes()), recipe.learner
    lora = policy.lora and (policy.lora.rank, policy.lora.targets)
    tokens = prompt_tokens + rollout.length
    rank = learner_memory(
        size,
        lora=lora,
        dtype=policy.dtype,
        zero_stage=learner.zero_stage,
        ranks=learner.ranks,
        micro_batch=learner.micro_batch,
        tokens=tokens,
        gradient_checkpointing=policy.gradient_checkpointing,
        scored_tokens=rollout.length,
        gpu=learner.gpus > 0,
        reference=recipe.rl.kl_coefficient > 0,
        quantization=policy.quantization,
    )
    actor = worker_memory(
        size,
        lora=lora,
        dtype=policy.dtype,
        batch=rollout.batch_size,
        tokens=tokens,
        block=rollout.block_length,
        cache=rollout.cache,
        guidance=rollout.guidance_scale,
        quantization=policy.quantization,
    )
    loading = loading_memory(size, lora=lora, dtype=policy.dtype, quantization=policy.quantization)
    return {"learner rank": rank, "rollout actor": actor, "process while it loads": loading}
