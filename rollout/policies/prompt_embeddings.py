"""Prompt embeddings of published pipelines, as their stock classes compute them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tokens of an embedding; a longer prompt is cut, a shorter one filled with zeros.
TEXT_TOKENS = 512


class PromptEmbeddings(ABC):
    """Embeddings of prompts, each computed once.

    The encoder is read at the first prompt that is not known yet. It stays in CPU memory (in bfloat16
    11 GiB for Wan's UMT5-XXL, 8 GiB for Z-Image's Qwen3-4B) and is on ``device`` only while it encodes.
    Prompts are encoded one by one, so that an embedding does not depend on the others of a call.
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

    @abstractmethod
    def _tokens(self, prompt: str) -> Any:
        """Ids and mask of a prompt, as the stock pipeline has them."""

    @abstractmethod
    def _states(self, encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The hidden states (1, tokens, width) that condition the transformer."""

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        encoder = self._encoder.to(self._device)
        try:
            for prompt in prompts:
                tokens = self._tokens(prompt)
                ids, mask = (
                    tokens[key].to(self._device) for key in ("input_ids", "attention_mask")
                )
                self._known[prompt] = self._states(encoder, ids, mask)[0, mask[0].bool()].cpu()
        finally:
            encoder.to("cpu")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._component("tokenizer")

    @cached_property
    def _encoder(self) -> Any:
        encoder = self._component(
            "text_encoder", dtype=getattr(torch, self._dtype), use_safetensors=True
        )
        return encoder.eval().requires_grad_(False)

    def _component(self, name: str, **options: Any) -> Any:
        """Of the class that the pipeline names."""
        import transformers

        index = json.loads((self._pipeline / "model_index.json").read_text())
        kind: Any = getattr(transformers, index[name][1])
        return kind.from_pretrained(self._pipeline / name, **options)


class UMT5Embeddings(PromptEmbeddings):
    """As ``WanPipeline`` has them: the encoder's last states."""

    def _tokens(self, prompt: str) -> Any:
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

    def _states(self, encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(ids, mask).last_hidden_state


class Qwen3Embeddings(PromptEmbeddings):
    """As ``ZImagePipeline`` has them: the last states but one of a chat turn that asks for the prompt."""

    def _tokens(self, prompt: str) -> Any:
        turn = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return self._tokenizer(
            turn,
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )

    def _states(self, encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        found = encoder(input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True)
        return found.hidden_states[-2]


@cache
def shared_embeddings(
    kind: type[PromptEmbeddings], pipeline: Path, dtype: str, device: torch.device
) -> PromptEmbeddings:
    """One of a kind for a pipeline: a teacher and its student read one text encoder in a process."""
    return kind(pipeline, dtype, device)
