"""Memory of one process, by arithmetic: what a learner rank and a rollout actor hold at their peak.

Bytes of tensors. Not in them: the CUDA context, workspaces of kernels, and what an allocator keeps
unused. T are the trained parameters, N the ranks, all fp32. DeepSpeed 0.19 as configured in
``cluster/deepspeed_engine.py``, measured on one rank and two:

    stage  parameters  gradients  optimiser                    buffers while gradients arrive
    0      whole       T          2 T, AdamW's moments         none
    1      whole       T          2 T/N, and T/N fp32 weights  the bucket
    2      whole       T/N        2 T/N, and T/N fp32 weights  the bucket, its copy, T/N arriving
    3      1/N         T/N        2 T/N, and T/N fp32 weights  the bucket, its copy, gathered weights

A LLaDA's activations follow ``rollout/policies/llada/modeling.py``. With d = d_model, k the width of
keys, m = mlp_hidden_size, c bytes of compute (2 in bfloat16) and x bytes of the residual stream (2 on a
bfloat16 base, else 4), autograd saves for a token of a layer

    norms      2 (4 d + 4)            inputs, in fp32; + 2 x d normalised, where everything trains
    inputs     c d                    of q, k, v and of ff, up, where one of them trains
    attention  c (2 d + 2 k) + 4 h    q, k, v, output and log-sum-exp of h heads: SDPA keeps no matrix
    mlp        3 c m                  gate, its silu, up; + c m, their product, where ff_out trains
    adapters   c r                    each

In bfloat16, inputs of fp32 weights are cast for each of them alone: without adapters five of d, with
adapters one for each, as wide as its layer's input.

With gradient checkpointing: x d for a token of a layer, and one layer as above with the gradients at
its widest place, x d + c m (8 m where an adapter on ff_out casts its own to fp32 and back).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.schema import AnyRecipe, Recipe
    from rollout.masked import MaskedSamplerConfig
    from rollout.policies.llada.policy import LladaConfig
    from rollout.policies.wan import WanConfig

# Rank and targets of an adapter.
Lora = tuple[int, Sequence[str]]
FP32, BF16 = 4, 2
# Elements, DeepSpeed's defaults: reduce_bucket_size and stage3_max_live_parameters.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a LLaDA, by the keys of its ``config.json``."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    embedding_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSize:
        """From ``config.json``, where key/value heads and embedding rows may be left out."""
        return cls(
            d_model=config["d_model"],
            n_heads=config["n_heads"],
            n_kv_heads=config.get("n_kv_heads") or config["n_heads"],
            n_layers=config["n_layers"],
            mlp_hidden_size=config["mlp_hidden_size"],
            embedding_size=config.get("embedding_size") or config["vocab_size"],
        )

    @property
    def kv_width(self) -> int:
        """Width of the keys of a token, and of its values."""
        return self.d_model // self.n_heads * self.n_kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a block's linear layers."""
        d, k, m = self.d_model, self.kv_width, self.mlp_hidden_size
        return {
            "q_proj": (d, d),
            "k_proj": (d, k),
            "v_proj": (d, k),
            "attn_out": (d, d),
            "ff_proj": (d, m),
            "up_proj": (d, m),
            "ff_out": (m, d),
        }

    def parameters(self) -> int:
        """All parameters: embedding and head, projections, norms."""
        block = sum(rows * columns for rows, columns in self.linears.values()) + 2 * self.d_model
        return 2 * self.embedding_size * self.d_model + self.n_layers * block + self.d_model

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of an adapter: rank (inputs + outputs) of each layer it is on."""
        return rank * sum(sum(self.linears[name]) for name in self.adapted(targets))

    def adapted(self, targets: Sequence[str]) -> list[str]:
        """The linear layers that get an adapter, over all blocks: a target is a name's last parts."""
        return [
            name
            for layer in range(self.n_layers)
            for name in self.linears
            if any(f".model.transformer.blocks.{layer}.{name}".endswith(f".{t}") for t in targets)
        ]


@dataclass(frozen=True)
class _Network:
    """A LLaDA as it is trained."""

    size: ModelSize
    lora: Lora | None
    half: bool

    @property
    def compute(self) -> int:
        return BF16 if self.half else FP32

    @property
    def residual(self) -> int:
        return BF16 if self.half and self.lora else FP32

    @property
    def trained(self) -> int:
        return self.size.lora_parameters(*self.lora) if self.lora else self.size.parameters()

    @property
    def frozen(self) -> int:
        return self.size.parameters() if self.lora else 0

    @property
    def casts(self) -> int:
        """Bytes of the bfloat16 copies that autocast makes of fp32 weights, and keeps."""
        if not self.half:
            return 0
        vectors = (2 * self.size.n_layers + 1) * self.size.d_model
        looked_up = self.size.embedding_size * self.size.d_model + vectors
        return BF16 * (self.trained if self.lora else self.trained - looked_up)

    @property
    def adapted(self) -> set[str]:
        return set(self.size.adapted(self.lora[1])) if self.lora else set()

    def saved(self) -> int:
        """Bytes that autograd saves for a token of a layer, see the module's docstring."""
        d, m, c = self.size.d_model, self.size.mlp_hidden_size, self.compute
        norms = 2 * (FP32 * d + FP32)
        attention = c * (2 * d + 2 * self.size.kv_width) + FP32 * self.size.n_heads
        common = norms + attention + 3 * c * m
        if self.lora is None:
            return common + 2 * self.residual * d + (5 if self.half else 2) * c * d + c * m
        return common + c * (self._adapter_inputs() + self.lora[0] * len(self.adapted))

    def _adapter_inputs(self) -> int:
        d, names = self.size.d_model, self.adapted
        if self.half:
            return sum(self.size.linears[name][0] for name in names)
        inputs = bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"ff_proj", "up_proj"})
        return inputs * d + (self.size.mlp_hidden_size if "ff_out" in names else 0)

    def activations(self, tokens: int, scored: int, checkpointing: bool) -> int:
        """Bytes alive when the backward pass of ``tokens`` begins, the logits' apart."""
        d, size = self.size.d_model, self.size
        end = tokens * FP32 * d
        if self.lora is None:
            end += tokens * self.residual * d + scored * self.compute * d
        if not checkpointing:
            return end + tokens * size.n_layers * self.saved() + self.casts
        inputs = tokens * size.n_layers * self.residual * d
        cast_back = self.half and "ff_out" in self.adapted
        widest = (8 if cast_back else self.compute) * size.mlp_hidden_size + self.residual * d
        layer = tokens * (self.saved() + widest) + self.casts // size.n_layers
        return end + inputs + max(layer, self.casts)

    def inference(self, tokens: int) -> int:
        """Bytes alive at the widest place of a layer's forward, and the weights' copies.

        Two residuals, a norm's output (and in fp32, for an adapter), queries, keys, values and the
        attention's output; silu, up and their product, or while an adapter on up_proj is added, silu
        and three of up's size.
        """
        wide = 4 if "up_proj" in self.adapted else 3
        narrow = (3 * self.residual + (FP32 if self.half and self.lora else 0)) * self.size.d_model
        attention = self.compute * 2 * (self.size.d_model + self.size.kv_width)
        token = narrow + attention + wide * self.compute * self.size.mlp_hidden_size
        return tokens * token + self.casts


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
    """
    network = _Network(size, lora, dtype == "bfloat16")
    state = state_memory(
        network.frozen, network.residual, network.trained, zero_stage, ranks, gpu, reference
    )
    rows, scored = micro_batch * tokens, micro_batch * scored_tokens
    return state | {
        "activations": network.activations(rows, scored, gradient_checkpointing),
        "logits": 3 * FP32 * scored * size.embedding_size,
    }


def state_memory(
    frozen: int, width: int, trained: int, zero_stage: int, ranks: int, gpu: bool, reference: bool
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimiser on rank 0, see the module's docstring.

    Args:
        frozen: number of parameters that do not train, of ``width`` bytes each.
        trained: number of parameters that do, in fp32.
        zero_stage: DeepSpeed's; ranks: over which it shards.
        gpu: its bucket takes its whole size; on a CPU only the pages that gradients were written to.
        reference: there is a KL to the weights before training, which takes a copy if all trains.

    Returns:
        ``average`` is rank 0's exponential average; other ranks have none.
    """
    whole, share = FP32 * trained, FP32 * -(-trained // ranks)
    parameters = width * frozen + whole if zero_stage < 3 else width * -(-frozen // ranks) + share
    written = FP32 * min(trained, REDUCE_BUCKET)
    sent = written if ranks > 1 else 0
    bucket = FP32 * REDUCE_BUCKET if gpu else written
    live = min(trained, LIVE_PARAMETERS)
    gathered = FP32 * live + width * min(frozen, LIVE_PARAMETERS - live)
    buffers = (0, bucket, bucket + sent + share, bucket + written + gathered)
    return {
        "parameters": parameters + (whole if reference and not frozen else 0),
        "gradients": whole if zero_stage < 2 else share,
        "optimiser": 3 * share if zero_stage else 2 * whole,
        "average": whole,
        "buffers": buffers[zero_stage],
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
) -> dict[str, int]:
    """Bytes that a rollout actor of a text policy holds while it decodes.

    Activations and logits are not at their peaks together: the sum is an upper bound.

    Args:
        size, lora, dtype: see ``learner_memory``.
        batch: samples that are decoded together; tokens: of a row, prompt and completion.
        block: tokens of a block, which all need logits at its first step. A sampler holds three fp32
            rows for each: logits, exponential noise, and its logarithm. With guidance, while both
            branches are computed, each branch's head, fp32 and masked rows.
        cache: ``none``, or keys and values of whole rows are kept.
        guidance: a scale other than 1 doubles the rows.
    """
    network = _Network(size, lora, dtype == "bfloat16")
    rows = batch if guidance == 1.0 else 2 * batch
    head = 2 * FP32 + (BF16 if network.half else 0)
    places = batch * block * size.embedding_size
    memory = {
        "parameters": network.residual * network.frozen + FP32 * network.trained,
        "activations": network.inference(rows * tokens),
        "logits": places * (3 * FP32 if guidance == 1.0 else 2 * head),
    }
    if cache != "none":
        memory["kv"] = 2 * size.n_layers * rows * tokens * size.kv_width * network.compute
    return memory


def plan(recipe: AnyRecipe, prompt_tokens: int = 256) -> dict[str, dict[str, str]]:
    """Memory of a recipe's processes in words, with the total: ``learner rank``, ``rollout actor``.

    Args:
        recipe: of a text policy; of a flow, only parameters and what the optimiser needs are known.
        prompt_tokens: assumed length of a prompt.

    Raises:
        ValueError: the policy's checkpoint is neither here nor known.
    """
    from recipes.memory_distill import distillation_memory
    from recipes.schema import DistillRecipe

    if isinstance(recipe, DistillRecipe):
        rows = distillation_memory(recipe)
    elif recipe.policy.kind == "llada" and recipe.rollout.kind == "masked":
        rows = _text_rows(recipe, recipe.policy, recipe.rollout, prompt_tokens)
    elif recipe.policy.kind == "wan":
        rows = _flow_rows(recipe, recipe.policy)
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
    )
    return {"learner rank": rank, "rollout actor": actor}


def _flow_rows(recipe: Recipe, policy: WanConfig) -> dict[str, dict[str, int]]:
    """Counted on a network without storage; a pipeline's text encoder and VAE are not in it."""
    import torch
    from diffusers import WanTransformer3DModel

    from rollout.policies.wan_network import prepare_transformer

    with torch.device("meta"):
        transformer: Any = WanTransformer3DModel.from_config(policy.sizes())
        network = prepare_transformer(transformer, policy, seed=0)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    trained, frozen = policy.networks * trained, policy.networks * frozen
    width = BF16 if frozen and policy.dtype == "bfloat16" else FP32
    learner, reference = recipe.learner, recipe.rl.kl_coefficient > 0
    rank = state_memory(
        frozen, width, trained, learner.zero_stage, learner.ranks, learner.gpus > 0, reference
    )
    return {"learner rank": rank, "rollout actor": {"parameters": width * frozen + FP32 * trained}}
