"""The algorithms a recipe can name. A new one is its file, a line in the union and one in build."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rl.flash_grpo import FlashGRPO, FlashGRPOConfig
from rl.flow_grpo import FlowGRPO, FlowGRPOConfig
from rl.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastConfig
from rl.grpo import GRPO
from rollout.flow import FlowGrid

AlgorithmConfig = Annotated[
    FlashGRPOConfig | FlowGRPOConfig | FlowGRPOFastConfig, Field(discriminator="kind")
]


def build_algorithm(
    config: FlashGRPOConfig | FlowGRPOConfig | FlowGRPOFastConfig,
    grid: FlowGrid,
    guidance_scale: float,
    seed: int,
) -> GRPO:
    """The algorithm of a config on a sampling grid."""
    match config:
        case FlashGRPOConfig():
            return FlashGRPO(config, grid, guidance_scale, seed)
        case FlowGRPOFastConfig():
            return FlowGRPOFast(config, grid, guidance_scale, seed)
        case FlowGRPOConfig():
            return FlowGRPO(config, grid, guidance_scale, seed)
