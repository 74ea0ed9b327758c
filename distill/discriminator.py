"""The discriminator: small heads on the hidden features of the frozen teacher, and its losses.

Features of a noised sample ``x_tau`` come from several depths of the teacher, so that the heads judge
texture and layout alike; heads' logits are averaged. Losses are those of non-saturating GANs (softplus)
or hinge; the approximate R1 penalty is a finite difference (arXiv 2501.08316), here over sigma^2:

    aR1 = E[(D(x + sigma delta) - D(x))^2] / sigma^2  ->  E|grad D|^2  as sigma -> 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.functional import softplus

AdversarialLoss = Literal["softplus", "hinge"]
GROUPS = 8


class DiscriminatorConfig(BaseModel, frozen=True, extra="forbid"):
    """Heads on the teacher's features."""

    depths: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0),
        min_length=1,
        description="Where features are taken, as shares of the teacher's blocks.",
    )
    channels: int = Field(
        default=64, ge=GROUPS, multiple_of=GROUPS, description="Channels of a head."
    )
    loss: AdversarialLoss = Field(default="softplus", description="Form of the adversarial losses.")
    r1_weight: float = Field(default=0.1, ge=0, description="r of the approximate R1 penalty.")
    r1_sigma: float = Field(default=0.05, gt=0, description="Size of its perturbation.")
    updates: int = Field(default=2, ge=1, description="Discriminator steps per student step.")
    learning_rate: float = Field(default=1e-5, gt=0, description="AdamW's, for the heads.")
    betas: tuple[float, float] = Field(default=(0.0, 0.99), description="AdamW's moments.")


def layers_at(depths: Sequence[float], blocks: int) -> list[int]:
    """Block indices of shares of a network's depth; a share of 1 is the last block."""
    return [min(blocks, max(1, math.ceil(depth * blocks))) - 1 for depth in depths]


class Heads(nn.Module):
    """Logits from features, with a set of heads for each of the samples judged (y1, y2)."""

    def __init__(self, widths: Sequence[int], channels: int, names: Sequence[str]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.ModuleList(_head(width, channels) for width in widths) for name in names}
        )

    def forward(self, name: str, features: Sequence[Tensor]) -> Tensor:
        """Logits (B,) from ``features``, each (B, width, F, H, W): the mean over heads and places."""
        logits = [
            head(hidden.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(hidden), -1)).flatten(1)
            for head, hidden in zip(self._of(name), features, strict=True)
        ]
        return torch.stack([logit.mean(1) for logit in logits]).mean(0)

    def _of(self, name: str) -> nn.ModuleList:
        heads = self.heads[name]
        assert isinstance(heads, nn.ModuleList)
        return heads


def _head(width: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, channels, 4, stride=2, padding=1),
        nn.GroupNorm(GROUPS, channels),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 1, 1),
    )


def discriminator_losses(real: Tensor, fake: Tensor, form: AdversarialLoss) -> Tensor:
    """(B,) from logits (B,); at equality of the laws its least value is 2 ln 2, for hinge 2."""
    if form == "hinge":
        return torch.relu(1 - real) + torch.relu(1 + fake)
    return softplus(-real) + softplus(fake)


def generator_losses(fake: Tensor, form: AdversarialLoss) -> Tensor:
    """(B,) from logits (B,) of the student's samples."""
    return -fake if form == "hinge" else softplus(-fake)


def approximate_r1(logits: Tensor, perturbed: Tensor, sigma: float) -> Tensor:
    """(B,) from logits of samples and of ``samples + sigma delta``."""
    return (perturbed - logits).square() / sigma**2
