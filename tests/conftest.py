"""What several packages' tests need: the embedded policy and the digits recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.schema import Recipe
from recipes.source import load
from rollout.policies.wan import LoraAdapter, WanConfig, WanPolicy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_policy() -> WanPolicy:
    """The embedded digits model, all parameters trainable; treat as read-only."""
    return WanConfig().build(reference=True)


@pytest.fixture
def lora_policy() -> WanPolicy:
    """The embedded digits model with an adapter whose B is no longer zero."""
    policy = WanConfig(lora=LoraAdapter(rank=4, alpha=8)).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="session")
def digits_recipe() -> Callable[..., Recipe]:
    """The packaged digits recipe, small, with ``--set`` overrides."""
    small = [
        "steps=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.batch_size=8",
        "learner.micro_batch=4",
        "evaluation.samples=20",
        "evaluation.every=2",
        "checkpoints.every=2",
        "tracking=[]",
    ]

    def make(*overrides: str) -> Recipe:
        return copy.deepcopy(load(Path("digits/flash_grpo"), Recipe, [*small, *overrides]).value)

    return make
