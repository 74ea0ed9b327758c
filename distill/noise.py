"""Keyed noise of the distillation: a function of the sample, the step and what it is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.draws import keyed_generator


def gaussians(seeds: Sequence[int], shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal (n, *shape) on the CPU, row i keyed by (seeds[i], *key)."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=keyed_generator(seed, *key)) for seed in seeds]
    )


def logit_normals(seeds: Sequence[int], *key: int | str) -> Tensor:
    """Noise levels tau (n,) in (0, 1): sigmoid of a standard normal."""
    return gaussians(seeds, (), *key).sigmoid()


def uniforms(seeds: Sequence[int], low: float, high: float, *key: int | str) -> Tensor:
    """Uniform numbers (n,) in [low, high)."""
    unit = [torch.rand((), generator=keyed_generator(seed, *key)) for seed in seeds]
    return low + (high - low) * torch.stack(unit)
