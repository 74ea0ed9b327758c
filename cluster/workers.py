"""What a rollout worker and a reward worker do; plain classes that a Ray actor or a test holds."""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from cluster.guided import Guide
from cluster.logs import log_to
from cluster.weights import Weights, bind
from distill.catalogue import PairSampler, build_student, build_teacher
from recipes.derived import text_algorithm
from recipes.schema import AnyRecipe, DistillRecipe, Recipe, recipe_from_json
from rewards.catalogue import RewardConfig
from rewards.serving import RewardServer
from rl.contracts import GuidancePlan, Plan
from rl.gap import variational_gap
from rl.old_scores import with_old
from rl.sft import given
from rl.tilt import Score
from rollout.draws import Group
from rollout.flow_sampler import FlowRollout, FlowSummary
from rollout.guidance.contract import GuidanceError
from rollout.masked import DecodePlan, MaskedRollout, TextSummary
from rollout.policies.base import Policy

Rollout = FlowRollout | MaskedRollout
Facts = dict[str, tuple[float, ...]]


def sampler_of(recipe: AnyRecipe, device: str) -> tuple[Policy, Any]:
    """The policy that a run trains, before training, and what samples it."""
    if isinstance(recipe, DistillRecipe):
        student = build_student(recipe.distill, recipe.policy, recipe.rollout, device, recipe.seed)
        teacher = build_teacher(recipe.policy, device)
        return student, PairSampler(recipe.rollout, teacher, student)
    policy: Any = recipe.policy.build(device, seed=recipe.seed)
    return policy, recipe.rollout.build(policy)


@dataclass(frozen=True)
class Health:
    """Which process answers: a new ``boot`` means a restarted one, with no weights."""

    boot: str
    pid: int
    version: int | None


@dataclass(frozen=True)
class Record:
    """The small part of a sampled group, which the driver opens.

    ``started`` is the worker's own clock (Unix time), when its call began.
    ``problem`` is set for a group that its own data made impossible; the other parts are then empty.
    """

    summary: FlowSummary | TextSummary | None = None
    facts: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    forwards: int = 0
    started: float = 0.0
    seconds: float = 0.0
    version: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Failed:
    """A job that did not run, classified where it happened (types don't survive the crossing)."""

    kind: Literal["infrastructure", "data"]
    message: str


class RolloutWorker:
    """Holds a policy and samples groups."""

    def __init__(
        self,
        recipe_json: str,
        device: str,
        threads: int,
        log: str | None = None,
        served: Mapping[str, Score] | None = None,
    ) -> None:
        """``served``: how rewards are asked elsewhere, by name, for guidance that wants them so."""
        log_to(log)
        torch.set_num_threads(threads)
        self.boot = uuid.uuid4().hex
        self.version: int | None = None
        self.checksum: str | None = None
        self.recipe = recipe_from_json(recipe_json)
        self.policy, self.sampler = sampler_of(self.recipe, device)
        self.served = served
        self.guide: Guide | None = None

    def health(self) -> Health:
        """Answers while a job runs."""
        return Health(self.boot, os.getpid(), self.version)

    def load(self, data: np.ndarray, version: int, checksum: str) -> int:
        """Take published weights; returns the number of bound parameters once proved."""
        bound = bind(self.policy.trainable(), Weights(version, checksum, data))
        self.version, self.checksum = version, checksum
        return bound

    def generate(
        self, groups: Sequence[Group], plans: Sequence[Plan], checksum: str | None = None
    ) -> list[Any]:
        """``[records, replay, media, replay, media, ...]``, a pair for each group.

        ``checksum``: of the weights that shall sample; a process that was started anew has others.
        """
        began, started = time.time(), time.perf_counter()
        if checksum is not None and checksum != self.checksum:
            failed = Failed("infrastructure", f"holds other weights than {checksum[:12]}")
            return [failed, *[None] * (2 * len(groups))]
        try:
            rollouts, facts = self._sample(groups, plans)
        except GuidanceError:
            raise
        except ValueError:
            pairs = [self._single(g, p) for g, p in zip(groups, plans, strict=True)]
            rollouts, facts = [rollout for rollout, _ in pairs], [found for _, found in pairs]
        except (RuntimeError, OSError, MemoryError):
            failed = Failed("infrastructure", traceback.format_exc())
            return [failed, *[None] * (2 * len(groups))]
        seconds = (time.perf_counter() - started) / len(groups)
        records = [self._record(r, f, began, seconds) for r, f in zip(rollouts, facts, strict=True)]
        parts: list[Any] = []
        for rollout in rollouts:
            parts += [None, None] if isinstance(rollout, str) else [rollout.replay, rollout.media]
        return [records, *parts]

    def _sample(
        self, groups: Sequence[Group], plans: Sequence[Plan]
    ) -> tuple[Sequence[Rollout | str], list[Facts]]:
        """Rollouts, and what their plans ask beyond the samples."""
        plan = plans[0]
        if isinstance(plan, GuidancePlan):
            assert isinstance(self.recipe, Recipe)
            self.guide = self.guide or Guide(self.recipe, self.policy, self.sampler, self.served)
            return self.guide.sample(groups, plan.method)
        if isinstance(plan, DecodePlan) and plan.given is not None:
            rollouts = given(self.sampler, groups, plan.given)
        else:
            rollouts = self.sampler.sample(groups, plans)
        if isinstance(plan, DecodePlan) and plan.passes:
            assert isinstance(self.recipe, Recipe)
            algorithm, size = text_algorithm(self.recipe), self.recipe.learner.micro_batch
            rollouts = with_old(algorithm, self.policy, rollouts, plan.passes, size)  # pyright: ignore[reportArgumentType]
        return rollouts, [self._facts(r, p) for r, p in zip(rollouts, plans, strict=True)]

    def _single(self, group: Group, plan: Plan) -> tuple[Rollout | str, Facts]:
        try:
            rollouts, facts = self._sample([group], [plan])
        except ValueError as error:
            return f"prompt {group.prompt_id!r}: {error}", {}
        return rollouts[0], facts[0]

    def _facts(self, rollout: Rollout, plan: Plan) -> Facts:
        if not isinstance(rollout, MaskedRollout) or not isinstance(plan, DecodePlan):
            return {}
        if not plan.orders:
            return {}
        found = variational_gap(self.policy, rollout.replay, plan.orders)  # pyright: ignore[reportArgumentType]
        return {f"gap/{name}": values for name, values in found.items()}

    def _record(
        self, rollout: Rollout | str, facts: Facts, started: float, seconds: float
    ) -> Record:
        if isinstance(rollout, str):
            return Record(started=started, seconds=seconds, problem=rollout)
        return Record(
            summary=rollout.summary,
            facts=facts,
            forwards=rollout.forwards,
            started=started,
            seconds=seconds,
            version=self.version or 0,
        )


class RewardWorker(RewardServer):
    """Serves one reward in a process of the platform."""

    def __init__(self, config: RewardConfig, threads: int, log: str | None = None) -> None:
        log_to(log)
        torch.set_num_threads(threads)
        super().__init__(config)
