"""The contract between a flow-matching model and everything that samples or trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class FlowPolicy(ABC):
    """A trainable flow-matching model.

    Algorithms and samplers know nothing else of a model. The network lives in ``module``, which is
    what an engine wraps, shards and checkpoints.

    Attributes:
        module: the network; exactly its trainable parameters require grad.
        latent_shape: (channels, frames, height, width) of one sample in the space of the flow.
    """

    module: Any
    latent_shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(iter(self.module.parameters())).device

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
    def decode(self, x: Tensor) -> np.ndarray:
        """Media uint8 (B, frames, height, width, channels) of final states ``x``."""

    @abstractmethod
    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained ``weights`` (all of ``trainable``, whole) in their library's layout."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Inside, ``velocity`` is that of the weights before any training."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the module's order."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

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
