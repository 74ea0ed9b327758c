"""The contracts between a generative model and everything that samples or trains it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Policy(ABC):
    """A trainable model.

    Algorithms and samplers know nothing else of a model. The network lives in ``module``, which is
    what an engine wraps, shards and checkpoints.

    Attributes:
        module: the network; exactly its trainable parameters require grad.
        network: what forwards go through: ``module``, or inside ``reference`` a frozen copy of it.
    """

    def __init__(self, module: Any, adapted: bool, reference: bool) -> None:
        """``adapted``: an adapter trains; ``reference``: keep what ``reference`` needs."""
        self.module = module
        self.network = module
        self._adapted = adapted
        self._frozen: Any = None
        if reference and not adapted:
            self._frozen = copy.deepcopy(module).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(iter(self.module.parameters())).device

    @abstractmethod
    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained ``weights`` (all of ``trainable``, whole) in their library's layout."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the module's order."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside, the policy is the one before any training: its base, or the frozen copy."""
        if self._adapted:
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
            return
        if self._frozen is None:
            raise ValueError("the policy was built without reference=True")
        self.network = self._frozen
        try:
            yield
        finally:
            self.network = self.module


class MaskedDiffusionPolicy(Policy):
    """A trainable masked-diffusion language model.

    Attributes:
        mask_token_id, eos_token_id: ids of the mask, and of the token that ends (and pads) answers.
        vocab_size: rows of logits.
    """

    mask_token_id: int
    eos_token_id: int
    vocab_size: int

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (n,) of each prompt, chat template applied, on the CPU.

        Raises:
            ValueError: a prompt that the policy cannot take.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of completions (B, L), each up to its first EOS, without special tokens."""

    @abstractmethod
    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        where: Tensor,
        cache: Any = None,
        start: int = 0,
    ) -> Tensor:
        """fp32 logits (n, vocabulary) at the n True places of ``where`` (B, S).

        Args:
            tokens: (B, S) with masks; logits at a place are those of the token at that place.
            attention_mask: (B, T), 0 at padding; None: no padding.
            cache: what ``new_cache`` returned; the forward then is over a span of S tokens from
                ``start`` and attends to all T, the others as the cache holds them.
        """

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty cache of keys and values."""


class FlowPolicy(Policy):
    """A trainable flow-matching model.

    Attributes:
        latent_shape: (channels, frames, height, width) of one sample in the space of the flow.
        blocks, width: number of the network's blocks, and of channels of their hidden states.
    """

    latent_shape: tuple[int, ...]
    blocks: int
    width: int

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditions (B, tokens, width) of prompts.

        Raises:
            ValueError: a prompt that the policy cannot express.
        """

    @abstractmethod
    def encode_null(self, count: int) -> Tensor:
        """The condition of classifier-free guidance's unconditional branch, (count, ...)."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The predicted ``eps - x0`` in fp32; ``x`` (B, C, F, H, W), ``t`` (B,) in [0, 1]."""

    @abstractmethod
    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """Hidden states (B, width, F', H', W') after the blocks ``layers`` of such a forward."""

    @abstractmethod
    def pixels(self, x: Tensor) -> Tensor:
        """Final states ``x`` as fp32 (B, frames, height, width, channels) in [0, 1], differentiable."""

    def decode(self, x: Tensor) -> np.ndarray:
        """Media uint8 (B, frames, height, width, channels) of final states ``x``."""
        return (self.pixels(x) * 255).round().to(torch.uint8).cpu().numpy()

    def guided_velocity(
        self, x: Tensor, t: Tensor, condition: Tensor, guidance_scale: float
    ) -> Tensor:
        """Velocity under classifier-free guidance, ``v_null + scale (v - v_null)``.

        Rollout and training both come through here: one forward over the concatenated branches, so
        that both see the same shapes, and the gradient flows through both branches. A scale of 1
        needs no unconditional branch and computes none.
        """
        if guidance_scale == 1.0:
            return self.velocity(x, t, condition)
        null = self.encode_null(len(x))
        both = self.velocity(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null.to(condition)])
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)


def forwards_per_sample(guidance_scale: float) -> int:
    """Network evaluations behind one guided velocity."""
    return 1 if guidance_scale == 1.0 else 2
