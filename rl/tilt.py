"""The reward that inference-time methods tilt samples towards: a weighted sum of a recipe's rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.calling import Scores, check_failures
from rewards.contract import DifferentiableReward, RewardSettings
from rollout.draws import Group
from rollout.policies.base import FlowPolicy

Score = Callable[[list[str], list[Any], Mapping[str, list[Any]]], Scores]


@dataclass(frozen=True)
class Term:
    """One reward of the sum.

    Attributes:
        name: in messages. settings: weight and how often it may fail.
        score: (prompts, completions, columns) -> scores, here or in an actor.
        function: its differentiable form, where it has one and it is here.
    """

    name: str
    settings: RewardSettings
    score: Score
    function: DifferentiableReward | None


class RewardSum:
    """``sum_i weight_i r_i``, raw: a sum over methods has no group to normalise in."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = [term for term in terms if term.settings.weight != 0]
        self.differentiable = all(term.function is not None for term in self.terms)

    def of(self, completions: Sequence[Any], samples: Sequence[Group]) -> np.ndarray:
        """fp64 (n,) of media or texts; NaN where a reward gave none.

        Raises:
            RewardFailed: a reward fails on more of them than it may.
        """
        prompts, columns = _asked(samples)
        total = np.zeros(len(samples))
        for term in self.terms:
            scores = term.score(prompts, list(completions), columns)
            check_failures(scores, term.settings, term.name)
            total += term.settings.weight * scores.values
        return total

    def slope_of(self, pixels: Tensor, samples: Sequence[Group]) -> Tensor:
        """Differentiable (n,) of pixels (n, frames, height, width, channels) in [0, 1]."""
        prompts, columns = _asked(samples)
        total = torch.zeros(len(samples), device=pixels.device)
        for term in self.terms:
            assert term.function is not None
            value = term.function.differentiable(prompts, pixels, **columns)
            total = total + term.settings.weight * value
        return total


class FlowTilt:
    """A reward sum on the states of a flow; see ``rollout.guidance.contract.Tilt``."""

    def __init__(self, policy: FlowPolicy, rewards: RewardSum) -> None:
        self.policy, self.rewards = policy, rewards
        self.differentiable = rewards.differentiable

    def scores(self, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        """Of the decoded states, as samples are scored."""
        return torch.from_numpy(self.rewards.of(list(self.policy.decode(clean)), samples))

    def potential(self, x: Tensor, t: float, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        """Of the prediction's pixels."""
        return self.rewards.slope_of(self.policy.pixels(clean), samples)


def _asked(samples: Sequence[Group]) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts and reward columns, one entry a sample."""
    names = sorted({name for group in samples for name in group.columns})
    columns = {name: [group.columns.get(name) for group in samples] for name in names}
    return [group.prompt for group in samples], columns
