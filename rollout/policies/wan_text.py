"""Prompt embeddings of published Wan pipelines: UMT5, as stock ``WanPipeline`` computes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tokens of an embedding; a longer prompt is cut, a shorter one filled with zeros.
TEXT_TOKENS = 512


class PromptEmbeddings:
    """Embeddings of prompts, each computed once.

    The encoder is read at the first prompt that is not known yet. It stays in CPU memory (11 GiB in
    bfloat16 for UMT5-XXL) and is on ``device`` only while it encodes. Prompts are encoded one by one,
    so that an embedding does not depend on the others of a call.
    """

    def __init__(self, pipeline: Path, dtype: str, device: torch.device) -> None:
        """``pipeline``: with ``model_index.json``, tokenizer and text encoder; ``dtype``: of that."""
        self._pipeline, self._dtype, self._device = pipeline, dtype, device
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """fp32 (B, TEXT_TOKENS, width) on the device, zero after a prompt's own tokens."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if missing:
            self._encode(missing)
        own = [self._known[prompt] for prompt in prompts]
        embeddings = torch.zeros(len(own), TEXT_TOKENS, own[0].shape[1])
        for row, embedding in zip(embeddings, own, strict=True):
            row[: len(embedding)] = embedding
        return embeddings.to(self._device)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        encoder = self._encoder.to(self._device)
        try:
            for prompt in prompts:
                tokens = self._tokens(prompt)
                ids, mask = (
                    tokens[key].to(self._device) for key in ("input_ids", "attention_mask")
                )
                states = encoder(ids, mask).last_hidden_state[0, : int(mask.sum())]
                self._known[prompt] = states.cpu()
        finally:
            encoder.to("cpu")

    def _tokens(self, prompt: str) -> Any:
        """As ``WanPipeline`` has them: its own cleaning (with ftfy, where that is installed)."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return self._tokenizer(
            prompt_clean(prompt),
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        index = json.loads((self._pipeline / "model_index.json").read_text())
        kind: Any = getattr(transformers, index["tokenizer"][1])
        return kind.from_pretrained(self._pipeline / "tokenizer")

    @cached_property
    def _encoder(self) -> Any:
        from transformers import UMT5EncoderModel

        encoder: Any = UMT5EncoderModel.from_pretrained(
            self._pipeline / "text_encoder", dtype=getattr(torch, self._dtype)
        )
        return encoder.eval().requires_grad_(False)
