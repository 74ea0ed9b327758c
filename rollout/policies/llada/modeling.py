"""The LLaDA transformer in transformers' conventions, with the released tensor names.

    x = wte[tokens]
    per block:  x = x + attn_out(attention(q, k, v of attn_norm(x)))       bidirectional, RoPE on q and k
                x = x + ff_out(silu(ff_proj(h)) * up_proj(h)),  h = ff_norm(x)
    logits = ff_out(ln_f(x))                             the logits at position i predict token i

A looped model (R-MDM, arXiv 2606.18022) goes through the same blocks ``loops`` times, each time from
where it was; logits can be read after every loop, and inference may loop more often than training.

No biases, RMSNorm in fp32, RoPE (rotate-half) in fp32. Released revisions disagree on what an
attention mask means; here it is a key-padding mask, and positions count real tokens only, so that a
left-padded row is computed as it would be alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from rollout.policies.llada.configuration import LLaDAConfig


class KeyValueCache:
    """Keys and values of whole sequences, (B, kv heads, T, head size) per layer (of every loop).

    A forward over a span writes the span's keys and values in place and attends to all T: the rest
    are those of earlier forwards, stale by the tokens committed since.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write a span that begins at ``start``; returns keys and values of the whole length."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            span = slice(start, start + key.shape[2])
            self.layers[layer][0][:, :, span] = key
            self.layers[layer][1][:, :, span] = value
        return self.layers[layer]


class LLaDARMSNorm(nn.Module):
    """``x / rms(x)`` in fp32, cast back, then times the weight."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model)."""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class LLaDABlock(GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.layer, self.head_size = layer, width // config.n_heads
        kv_width = self.head_size * (config.n_kv_heads or config.n_heads)
        self.attn_norm = LLaDARMSNorm(config)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = LLaDARMSNorm(config)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
        before: int = 0,
    ) -> Tensor:
        """``x`` (B, S, d_model), a span from ``start``; ``mask`` (B, 1, 1, T) over all keys.

        ``before``: layers that earlier loops went through; each has its own place in the cache.
        """
        h = self.attn_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(before + self.layer, k, v, start)
        grouped = k.shape[1] != q.shape[1]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of (B, heads, S, head size) by (B, 1, S, head size), in fp32."""
    half = x.float()
    first, second = half.chunk(2, dim=-1)
    return (half * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LLaDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know."""

    config_class = LLaDAConfig
    config: LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, blocks, final norm; and the head, which the released layout keeps here."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        rows = config.embedding_size or config.vocab_size
        blocks = nn.ModuleList([LLaDABlock(config, layer) for layer in range(config.n_layers)])
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.d_model),
                "blocks": blocks,
                "ln_f": LLaDARMSNorm(config),
                "ff_out": nn.Linear(config.d_model, rows, bias=False),
            }
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        start: int = 0,
        every_loop: bool = False,
    ) -> Tensor:
        """Final hidden states (B, S, d_model) of a span of S tokens that begins at ``start``.

        Args:
            input_ids: (B, S).
            attention_mask: (B, T) over the *whole* sequence, nonzero at real tokens; None: all are.
            cache: keys and values of the whole sequence; without one, the span is all there is.
            start: first position of the span.
            every_loop: those after each loop, (loops, B, S, d_model).
        """
        stop = start + input_ids.shape[1]
        if attention_mask is None:
            position_ids = torch.arange(start, stop, device=input_ids.device)[None]
            mask = None
        else:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, start:stop]
            mask = attention_mask.bool()[:, None, None, :]
        rotary = self._rotary(position_ids)
        x = self.transformer["wte"](input_ids)
        states: list[Tensor] = []
        for loop in range(self.config.loops):
            before = loop * self.config.n_layers
            for block in self.transformer["blocks"]:  # pyright: ignore[reportGeneralTypeIssues]
                x = block(x, rotary, mask, cache, start, before)
            if every_loop:
                states.append(x)
        return self.transformer["ln_f"](torch.stack(states) if every_loop else x)

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.d_model // self.config.n_heads
        steps = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
        angles = position_ids[..., None].float() / self.config.rope_theta**steps
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos(), angles.sin()


class LLaDAModelLM(LLaDAPreTrainedModel):
    """LLaDA with its head; the class name stands in the released ``architectures``."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.transformer["ff_out"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Tensor | None = None,
        cache: KeyValueCache | None = None,
        start: int = 0,
        every_loop: bool = False,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, S, vocabulary), or (n, vocabulary) at the n True places of ``where`` (B, S).

        With ``every_loop`` those after each loop, (loops, ...). The head is most of a small step's
        cost and memory: name the places that are needed. Other arguments: see
        ``LLaDAModel.forward``; ``kwargs`` are what generic callers add, unused.
        """
        hidden = self.model(input_ids, attention_mask, cache, start, every_loop)
        chosen = hidden if where is None else hidden[..., where, :]
        return MaskedLMOutput(logits=self.model.transformer["ff_out"](chosen))


AutoModel.register(LLaDAConfig, LLaDAModelLM)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM)
