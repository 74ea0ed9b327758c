"""The algorithms a recipe can name. A new one is its file, a line in the union and one in build."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rl.algorithm import Algorithm
from rl.diffu_grpo import DiffuGRPO, DiffuGRPOConfig
from rl.espo import ESPO, ESPOConfig
from rl.flash_grpo import FlashGRPO, FlashGRPOConfig
from rl.flow_grpo import FlowGRPO, FlowGRPOConfig
from rl.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastConfig
from rl.fpo import FPO, FPOConfig
from rl.nft import NFT, NFTConfig
from rl.sft import SFT, SFTConfig
from rl.spg import SPG, SPGConfig
from rl.text import TextAlgorithm, TextSettings
from rl.trace_rl import TraceRL, TraceRLConfig
from rl.wd1 import WD1, WD1Config
from rollout.flow_sampler import FlowSamplerConfig
from rollout.masked import MaskedSamplerConfig

FlowAlgorithmConfig = FlashGRPOConfig | FlowGRPOConfig | FlowGRPOFastConfig | NFTConfig
TextAlgorithmConfig = (
    SPGConfig | DiffuGRPOConfig | FPOConfig | ESPOConfig | WD1Config | TraceRLConfig | SFTConfig
)
AlgorithmConfig = Annotated[FlowAlgorithmConfig | TextAlgorithmConfig, Field(discriminator="kind")]


def build_algorithm(
    config: FlowAlgorithmConfig | TextAlgorithmConfig,
    sampler: FlowSamplerConfig | MaskedSamplerConfig,
    seed: int,
    stale: bool = False,
) -> Algorithm[Any]:
    """The algorithm of a config with a sampler of its kind.

    ``stale``: rollouts may be trained on by newer weights than sampled them (``schedule.mode``).

    Raises:
        ValueError: an algorithm on flows with a text sampler, or the other way round.
    """
    if isinstance(config, FlowAlgorithmConfig) and isinstance(sampler, FlowSamplerConfig):
        algorithm = _on_flows(config, sampler, seed)
    elif isinstance(config, TextSettings) and isinstance(sampler, MaskedSamplerConfig):
        algorithm = _on_text(config, sampler, seed)
    else:
        raise ValueError(f"rl.kind {config.kind} does not go with rollout.kind {sampler.kind}")
    algorithm.stale = stale
    return algorithm


def _on_flows(config: FlowAlgorithmConfig, sampler: FlowSamplerConfig, seed: int) -> Algorithm[Any]:
    grid, scale = sampler.grid(), sampler.guidance_scale
    match config:
        case FlashGRPOConfig():
            return FlashGRPO(config, grid, scale, seed)
        case FlowGRPOFastConfig():
            return FlowGRPOFast(config, grid, scale, seed)
        case FlowGRPOConfig():
            return FlowGRPO(config, grid, scale, seed)
        case NFTConfig():
            return NFT(config, grid, scale)


def _on_text(config: TextAlgorithmConfig, sampler: MaskedSamplerConfig, seed: int) -> TextAlgorithm:
    match config:
        case SPGConfig():
            return SPG(config, sampler, seed)
        case DiffuGRPOConfig():
            return DiffuGRPO(config, sampler, seed)
        case FPOConfig():
            return FPO(config, sampler, seed)
        case ESPOConfig():
            return ESPO(config, sampler, seed)
        case WD1Config():
            return WD1(config, sampler, seed)
        case TraceRLConfig():
            return TraceRL(config, sampler, seed)
        case SFTConfig():
            return SFT(config, sampler, seed)
