"""A LLaDA in numbers: its parameters, and what a forward and its backward pass keep alive.

Follows ``rollout/policies/llada/modeling.py``, in bytes of tensors. With d = d_model, k the width of
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

A quantised base computes as a bfloat16 one, with one matrix at a time brought back to the compute type.
int8 layers keep their inputs until the backward pass, with checkpointing too: c (3 d + m), or what is
not saved anyway, c (2 d + m).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.memory_state import BF16, FP32
from rollout.policies.llada.quantization import Quantization, quantized_bytes

# Rank and targets of an adapter.
Lora = tuple[int, Sequence[str]]


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
class Network:
    """A LLaDA as it is trained."""

    size: ModelSize
    lora: Lora | None
    half: bool
    quantization: Quantization | None

    @property
    def compute(self) -> int:
        """Bytes of a number where matrices are multiplied."""
        return BF16 if self.half else FP32

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream."""
        return BF16 if self.half and self.lora else FP32

    @property
    def trained(self) -> int:
        """Number of parameters that train."""
        return self.size.lora_parameters(*self.lora) if self.lora else self.size.parameters()

    @property
    def frozen(self) -> tuple[int, int]:
        """Number of parameters and bytes of each; of a quantised base, all its bytes."""
        count, kind = self.size.parameters() if self.lora else 0, self.quantization
        if kind is None:
            return count, self.residual
        linears, layers = self.size.linears.values(), self.size.n_layers
        whole = count - layers * sum(rows * columns for rows, columns in linears)
        packed = layers * sum(quantized_bytes(kind, *sides) for sides in linears)
        return self.residual * whole + packed, 1

    @property
    def dequantised(self) -> dict[str, int]:
        """Bytes of the widest matrix that a product brings back to the compute type, if any is."""
        widest = self.compute * self.size.d_model * self.size.mlp_hidden_size
        return {"dequantised": widest} if self.quantization else {}

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
        """Names of a block's layers that get an adapter."""
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
        if self.quantization == "int8":
            wide = (3 if checkpointing else 2) * d + size.mlp_hidden_size
            end += tokens * size.n_layers * self.compute * wide
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
