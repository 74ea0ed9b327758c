"""Real samples for ``real: data``: what the embedded generators were trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rollout.draws import keyed_generator
from rollout.policies.digits import moving_digits, training_digits
from rollout.prompts import DIRECTIONS

# A real sample (C, F, H, W) that fits a prompt's columns, drawn by a key.
RealSamples = Callable[[Mapping[str, Any], int], Tensor]


def real_digits(moving: bool) -> RealSamples:
    """Draws a real digit (1, F, 8, 8) of a prompt's columns ``digit`` (and ``direction``), by key."""
    images, labels = training_digits()
    torch_images = torch.from_numpy(images)

    def draw(columns: Mapping[str, Any], seed: int) -> Tensor:
        own = torch.from_numpy(labels == columns["digit"]).nonzero()[:, 0]
        place = torch.randint(len(own), (), generator=keyed_generator(seed, "real"))
        image = torch_images[own[place]]
        if not moving:
            return image[None, None]
        ways = torch.tensor([DIRECTIONS.index(columns["direction"])]).numpy()
        return torch.from_numpy(moving_digits(image[None].numpy(), ways))

    return draw
