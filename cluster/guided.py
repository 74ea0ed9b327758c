"""Inference-time methods in a rollout worker: the recipe's rewards bound to its policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.schema import Recipe
from rewards.calling import call_reward
from rewards.catalogue import RewardConfig
from rewards.contract import DifferentiableReward, RewardFunction
from rl.contracts import AnyMethod
from rl.tilt import FlowTilt, RewardSum, Score, Term
from rollout.draws import Group
from rollout.flow_sampler import FlowRollout
from rollout.guidance.contract import COUNTED, Counts
from rollout.guidance.sampler import GuidedSampler
from rollout.guidance.text import GuidedText
from rollout.masked import MaskedRollout
from rollout.policies.base import FlowPolicy


class Guide:
    """Samples under guidance towards the rewards that a recipe's comparison follows."""

    def __init__(
        self, recipe: Recipe, policy: Any, sampler: Any, served: Mapping[str, Score] | None
    ) -> None:
        """``sampler``: the policy's plain one; ``served``: see ``RolloutWorker``."""
        wanted = recipe.comparison.reward
        configs = [c for c in recipe.rewards if wanted in (None, c.name or c.kind)]
        rewards = RewardSum([term(config, served) for config in configs])
        self.sampler: Any
        if isinstance(policy, FlowPolicy):
            self.sampler = GuidedSampler(sampler.config, policy, FlowTilt(policy, rewards))
        else:
            self.sampler = GuidedText(sampler.config, policy, rewards.of)

    def sample(
        self, groups: Sequence[Group], method: AnyMethod
    ) -> tuple[list[FlowRollout] | list[MaskedRollout], list[dict[str, tuple[float, ...]]]]:
        """A rollout for each group, and ``work/...`` of its members."""
        rollouts, counts = self.sampler.sample(groups, method)
        return rollouts, _by_group(groups, counts)


def term(config: RewardConfig, served: Mapping[str, Score] | None) -> Term:
    """A reward that is asked where ``served`` says, else built here."""
    name = config.name or config.kind
    if served is not None:
        return Term(name, config, served[name], None)
    function: RewardFunction = config.build()

    def score(prompts: list[str], completions: list[Any], columns: Mapping[str, list[Any]]) -> Any:
        return call_reward(name, function, prompts, completions, columns, config.batch_size)

    gradient = function if isinstance(function, DifferentiableReward) else None
    return Term(name, config, score, gradient)


def _by_group(groups: Sequence[Group], counts: Counts) -> list[dict[str, tuple[float, ...]]]:
    facts: list[dict[str, tuple[float, ...]]] = []
    start = 0
    for group in groups:
        span = slice(start, start + group.size)
        start += group.size
        facts.append({f"work/{n}": tuple(map(float, counts.columns[n][span])) for n in COUNTED})
    return facts
