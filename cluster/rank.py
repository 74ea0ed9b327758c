"""One learner rank: policy, objective and engine; the same code in a test and in a Ray actor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.engine import ObjectiveModule
from cluster.trained import Trained, build_engine, read_state, write_state
from cluster.weights import Weights, pack, to_arrays
from recipes.schema import Recipe
from rl.algorithm import Table
from rl.catalogue import build_algorithm
from rl.contracts import Update
from rl.items import Item
from rollout.flow_sampler import FlowSamplerConfig
from rollout.policies.base import forwards_per_sample

# What checkpoints append to the names of the weights that sample, where those lag.
OLD = ".old"


class LearnerRank:
    """Applies optimiser steps. All ranks make the same calls in the same order.

    Attributes:
        old: rank 0's fp32 weights that sample, where the algorithm's lag behind the trained ones.
    """

    def __init__(self, recipe_json: str, rank: int, device: str, threads: int, engine: str) -> None:
        torch.set_num_threads(threads)
        self.recipe = recipe = Recipe.model_validate_json(recipe_json)
        self.rank = rank
        reference = recipe.rl.kl_coefficient > 0
        self.policy = recipe.policy.build(device, recipe.seed, reference)
        self.algorithm = build_algorithm(
            recipe.rl, recipe.rollout, recipe.seed, recipe.schedule.stale
        )
        module: Any = ObjectiveModule(self.policy, self.algorithm)
        self.engine = build_engine(engine, module, recipe.optimizer, recipe.learner)
        total = recipe.steps * recipe.rl.epochs * recipe.rl.minibatches
        self.trained = Trained(self.engine, recipe.optimizer, total, rank)
        weights = self.engine.weights() if self.algorithm.lags else {}
        self.old = {n: t.clone().float() for n, t in weights.items()} if rank == 0 else {}

    def update(
        self, steps: Sequence[Sequence[Item]], micro_steps: Sequence[int], *replays: Any
    ) -> Update:
        """This rank's share of each optimiser step.

        Args:
            steps: items per optimiser step; their ``replay`` is a position in ``replays``.
            micro_steps: micro-batches per optimiser step, the same on all ranks.
            replays: what this rank replays.
        """
        started = time.perf_counter()
        tables: list[Table] = []
        norms: list[float] = []
        old = self._old_scores(steps, micro_steps, replays)
        for items, count in zip(steps, micro_steps, strict=True):
            tables += self._backward(items, count, replays, old, ends=True)
            norms.append(self.trained.step())
        if self.algorithm.lags:
            self._follow()
        return self._update(tables, norms, sum(micro_steps), old is not None, started)

    def accumulate(
        self, steps: Sequence[Sequence[Item]], micro_steps: Sequence[int], *replays: Any
    ) -> Update:
        """The gradients of this rank's share of one optimiser step's first part; see ``update``."""
        started = time.perf_counter()
        ((items,), (count,)) = (steps, micro_steps)
        tables = self._backward(items, count, replays, None, ends=False)
        return self._update(tables, [], count, False, started)

    def _backward(
        self,
        items: Sequence[Item],
        count: int,
        replays: Sequence[Any],
        old: Iterator[Tensor] | None,
        ends: bool,
    ) -> list[Table]:
        tables: list[Table] = []
        for i, batch in enumerate(self._batches(items, count, replays)):
            if old is not None:
                batch = replace(batch, old=next(old))
            loss, table = self.engine.forward(batch)
            self.engine.backward(loss, last=ends and i == count - 1)
            tables.append(table)
        return tables

    def _update(
        self, tables: list[Table], norms: list[float], count: int, old: bool, started: float
    ) -> Update:
        """What ``count`` micro-batches were; ``old``: their old scores were computed too."""
        evaluations = self._evaluations(count)
        reference = 1 if self.recipe.rl.kl_coefficient else 0
        return Update(
            table=join_tables(tables),
            grad_norms=tuple(norms),
            forwards=evaluations * (1 + reference + old),
            backwards=evaluations,
            seconds=(time.perf_counter() - started,),
        )

    @torch.no_grad()
    def replay(self, items: Sequence[Item], count: int, *replays: Any) -> dict[str, Any]:
        """The table of ``items`` under the present weights, which are then the old ones too.

        Where rollouts came with their own old scores these are kept: ratios show what workers and
        ranks differ by.
        """
        tables: list[Table] = []
        for batch in self._batches(items, count, replays):
            if self.algorithm.needs_old and not self.algorithm.records_old:
                batch = replace(batch, old=self.engine.forward(batch, scores=True))
            tables.append(self.engine.forward(batch)[1])
        return join_tables(tables)

    @torch.no_grad()
    def _old_scores(
        self, steps: Sequence[Sequence[Item]], micro_steps: Sequence[int], replays: Sequence[Any]
    ) -> Iterator[Tensor] | None:
        """Scores of all micro-batches before the first optimiser step, where they are compared.

        On-policy the present scores are the old ones, and none are computed; nor where the rollouts
        came with them.
        """
        algorithm = self.algorithm
        if not algorithm.needs_old or algorithm.on_policy or algorithm.records_old:
            return None
        return iter(
            [
                self.engine.forward(batch, scores=True)
                for items, count in zip(steps, micro_steps, strict=True)
                for batch in self._batches(items, count, replays)
            ]
        )

    def publish(self, version: int, averaged: bool) -> tuple[Weights | None, Any]:
        """``(head without data, blob)`` on rank 0, two Nones elsewhere; every rank must call."""
        if averaged:
            tensors = self.trained.averaged
        else:
            tensors = self.old if self.algorithm.lags else self.engine.weights()
        if self.rank != 0:
            return None, None
        weights = pack(to_arrays(tensors), version)
        return Weights(version, weights.checksum, None), weights.data

    def save(self, directory: Path) -> None:
        """Write the averaged weights in their library's layout and all that training resumes from."""
        state = self.trained.state() | {f"{name}{OLD}": t for name, t in self.old.items()}
        if self.rank == 0:
            write_state(directory, {"": state})
            self.policy.save(directory / "policy", self.trained.averaged)

    def restore(self, directory: Path) -> None:
        """Continue from what ``save`` wrote, on any number of ranks."""

        def empty() -> Tensor:
            (batch,) = self._batches([], 1, ())
            return self.engine.forward(batch)[0]

        state = read_state(directory, ("",))[""]
        self.old = {name: state[f"{name}{OLD}"].to(old.device) for name, old in self.old.items()}
        self.trained.restore({k: t for k, t in state.items() if not k.endswith(OLD)}, empty)

    @torch.no_grad()
    def _follow(self) -> None:
        """The weights that sample take their step towards the trained ones."""
        weights, decay = self.engine.weights(), self.algorithm.old_decay(self.trained.steps)
        for name, old in self.old.items():
            old.lerp_(weights[name], 1 - decay)

    def _batches(self, items: Sequence[Item], count: int, replays: Sequence[Any]) -> Iterator[Any]:
        size = self.recipe.learner.micro_batch
        return self.algorithm.batches(self.policy, items, lambda i: replays[i], size, count)

    def _evaluations(self, micro_steps: int) -> int:
        sampler = self.recipe.rollout
        # A flow's loss evaluates the guided velocity; one on text the network as it is.
        flow = isinstance(sampler, FlowSamplerConfig)
        per_sample = forwards_per_sample(sampler.guidance_scale) if flow else 1
        return micro_steps * self.recipe.learner.micro_batch * per_sample


def join_tables(tables: Sequence[Table]) -> dict[str, Any]:
    """Columns over all micro-batches, as numpy; a column need not be in all of them."""
    columns = {key: None for table in tables for key in table}
    return {
        key: np.concatenate([t[key].detach().cpu().numpy() for t in tables if key in t])
        for key in columns
    }
