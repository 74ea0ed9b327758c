"""What every algorithm is to the loop, the learner ranks and the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, Field
from torch import Tensor

from rl.advantages import AdvantageConfig, group_advantages
from rl.contracts import Metrics, PlainPlan, Plan, Sampled
from rl.dipod import DipodConfig
from rl.items import Item
from rollout.draws import Group

# Per row (a branch of a flow, a completion of a text): what the driver makes metrics from. Arrays,
# not means, so that percentiles are exact whatever the micro-batches and ranks were.
Table = dict[str, Tensor]


class AlgorithmSettings(BaseModel, frozen=True, extra="forbid"):
    """Options of every algorithm."""

    advantages: AdvantageConfig = Field(
        default=AdvantageConfig(), description="Rewards to advantages."
    )
    minibatches: int = Field(
        default=1,
        ge=1,
        description="Optimiser steps per rollout set, each on its share of the groups.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over a rollout set.")
    kl_coefficient: float = Field(
        default=0.0, ge=0, description="beta of the KL to the weights before training; 0: none."
    )
    dipod: DipodConfig | None = Field(
        default=None, description="Self-distillation on the policy's own samples."
    )

    @property
    def on_policy(self) -> bool:
        """Whether every rollout is used once, before anything was updated."""
        return self.minibatches * self.epochs == 1


Settings = TypeVar("Settings", bound=AlgorithmSettings)


class Algorithm(ABC, Generic[Settings]):
    """An algorithm of a recipe. Pure: it holds no state that changes.

    Attributes:
        config: its options.
        stale: what trains may be newer than what sampled (``build_algorithm``). A ratio is then always
            that to the weights that sampled.
        needs_old: the objective compares with scores under older weights (``scores``): those at the
            start of the update, which a rank computes before the first optimiser step, or with
            ``stale`` those that sampled, which the worker computes right after sampling.
        lags: rollouts are drawn by weights that follow the trained ones, one step of an average
            (``old_decay``) after each rollout set.
        constant_groups: a group of equal rewards has a gradient of its own.
    """

    config: Settings
    stale = False
    needs_old = False
    lags = False
    constant_groups = False

    @property
    def on_policy(self) -> bool:
        """Whether every rollout is used once, by the very weights that sampled it."""
        return self.config.on_policy and not self.stale

    @property
    def records_old(self) -> bool:
        """Whether rollouts come with the scores that the objective compares with."""
        return self.needs_old and self.stale

    @abstractmethod
    def plans(self, step: int, groups: Sequence[Group]) -> Sequence[Plan]:
        """How each group of a step is drawn: a function of (seed, step, group)."""

    @abstractmethod
    def evaluation_plan(self, steps: int | None, orders: int = 0) -> PlainPlan:
        """How an evaluation sample is drawn, in ``steps`` (None: the rollout's own number).

        ``orders``: estimate the variational gap from so many orders, where the policy has one.
        """

    def advantages(
        self, rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]
    ) -> np.ndarray:
        """Advantages (groups, size) from rewards; see ``rl/advantages.py``."""
        return group_advantages(rewards, weights, self.config.advantages)

    @abstractmethod
    def shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """What each row of a sample weighs in the loss of an optimiser step, (groups, size).

        ``valid`` (groups, size) is False at samples without a score; those get 0.
        """

    @abstractmethod
    def distillation_shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """What each sample weighs in DiPOD's term, (groups, size), summing to 1."""

    @abstractmethod
    def evaluations(self, sample: Sampled) -> int:
        """Network evaluations that one pass over a group takes on a learner."""

    @abstractmethod
    def batches(
        self, policy: Any, items: Sequence[Item], fetch: Callable[[Any], Any], size: int, count: int
    ) -> Iterator[Any]:
        """Exactly ``count`` micro-batches of ``size`` evaluations over ``items``, the rest padding."""

    @abstractmethod
    def loss(self, policy: Any, batch: Any) -> tuple[Tensor, Table]:
        """The micro-batch's part of the loss, and a row of the table for each of its rows."""

    def scores(self, policy: Any, batch: Any) -> Tensor:
        """What ``loss`` compares with, under the policy's weights; only with ``needs_old``."""
        raise NotImplementedError

    def old_decay(self, steps: int) -> float:
        """What the weights that sample keep of themselves after ``steps`` optimiser steps of the run,
        the rest being the trained ones'; only with ``lags``."""
        raise NotImplementedError

    @abstractmethod
    def metrics(self, table: Mapping[str, np.ndarray]) -> Metrics:
        """Metrics of an update from its whole table."""

    @abstractmethod
    def check_drift(self, table: Mapping[str, np.ndarray], dtype: str) -> Metrics:
        """Refuse to train when old and new scores differ before anything was updated.

        Raises:
            DriftError: naming the likely cause.
        """
