"""One learner rank: policy, objective and engine; the same code in a test and in a Ray actor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.engine import Engine, ObjectiveModule, TorchEngine
from cluster.weights import Weights, pack, to_arrays
from recipes.schema import Recipe
from rl.algorithm import Table
from rl.catalogue import build_algorithm
from rl.contracts import Update
from rl.items import Item
from rollout.policies.base import forwards_per_sample

STATE_FILE = "optimizer.safetensors"


class LearnerRank:
    """Applies optimiser steps. All ranks make the same calls in the same order.

    Attributes:
        averaged: rank 0's exponential average of the trained weights in fp32, updated once per
            optimiser step with decay min((1 + n) / (10 + n), ema_decay).
        steps: optimiser steps taken.
    """

    def __init__(self, recipe_json: str, rank: int, device: str, threads: int, engine: str) -> None:
        torch.set_num_threads(threads)
        self.recipe = Recipe.model_validate_json(recipe_json)
        self.rank = rank
        reference = self.recipe.rl.kl_coefficient > 0
        self.policy = self.recipe.policy.build(device, self.recipe.seed, reference)
        self.algorithm = build_algorithm(self.recipe.rl, self.recipe.rollout, self.recipe.seed)
        module = ObjectiveModule(self.policy, self.algorithm)
        self.engine: Engine = self._engine(module, engine)
        self.steps = 0
        self.averaged = {n: t.clone().float() for n, t in self.engine.weights().items()}
        if rank != 0:
            self.averaged = {}

    def _engine(self, module: ObjectiveModule, engine: str) -> Engine:
        if engine == "torch":
            return TorchEngine(module, self.recipe.optimizer)
        from cluster.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(module, self.recipe.optimizer, self.recipe.learner)

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
            for i, batch in enumerate(self._batches(items, count, replays)):
                if old is not None:
                    batch = replace(batch, old=next(old))
                loss, table = self.engine.forward(batch)
                self.engine.backward(loss, last=i == count - 1)
                tables.append(table)
            norms.append(self.engine.step(self._learning_rate()))
            self.steps += 1
            self._average()
        evaluations = self._evaluations(sum(micro_steps))
        reference = 1 if self.recipe.rl.kl_coefficient else 0
        return Update(
            table=_join(tables),
            grad_norms=tuple(norms),
            forwards=evaluations * (1 + reference + (old is not None)),
            backwards=evaluations,
            seconds=(time.perf_counter() - started,),
        )

    @torch.no_grad()
    def replay(self, items: Sequence[Item], count: int, *replays: Any) -> dict[str, Any]:
        """The table of ``items`` under the present weights, which are then the old ones too."""
        tables: list[Table] = []
        for batch in self._batches(items, count, replays):
            if self.algorithm.needs_old:
                batch = replace(batch, old=self.engine.scores(batch))
            tables.append(self.engine.forward(batch)[1])
        return _join(tables)

    @torch.no_grad()
    def _old_scores(
        self, steps: Sequence[Sequence[Item]], micro_steps: Sequence[int], replays: Sequence[Any]
    ) -> Iterator[Tensor] | None:
        """Scores of all micro-batches before the first optimiser step, where they are compared.

        On-policy the present scores are the old ones, and none are computed.
        """
        if not self.algorithm.needs_old or self.recipe.rl.on_policy:
            return None
        return iter(
            [
                self.engine.scores(batch)
                for items, count in zip(steps, micro_steps, strict=True)
                for batch in self._batches(items, count, replays)
            ]
        )

    def publish(self, version: int, averaged: bool) -> tuple[Weights | None, Any]:
        """``(head without data, blob)`` on rank 0, two Nones elsewhere; every rank must call."""
        tensors = self.averaged if averaged else self.engine.weights()
        if self.rank != 0:
            return None, None
        weights = pack(to_arrays(tensors), version)
        return Weights(version, weights.checksum, None), weights.data

    def save(self, directory: Path) -> None:
        """Write the averaged weights in their library's layout and all that training resumes from."""
        weights, moments = self.engine.weights(), self.engine.moments()
        if self.rank != 0:
            return
        state = {f"{name}.weight_fp32": t for name, t in weights.items()} | moments
        state |= {f"{name}.ema": t for name, t in self.averaged.items()}
        state["optimizer_steps"] = torch.tensor([self.steps])
        save_file(
            {k: t.cpu().contiguous().clone() for k, t in state.items()}, directory / STATE_FILE
        )
        self.policy.save(directory / "policy", self.averaged)

    def restore(self, directory: Path) -> None:
        """Continue from what ``save`` wrote, on any number of ranks."""
        state = load_file(directory / STATE_FILE)
        self.steps = int(state.pop("optimizer_steps")[0])
        parts: dict[str, dict[str, Tensor]] = {"weight_fp32": {}, "ema": {}, "moment": {}}
        for key, tensor in state.items():
            name, _, kind = key.rpartition(".")
            if kind in parts:
                parts[kind][name] = tensor
            else:
                parts["moment"][key] = tensor
        if parts["moment"]:
            # Optimisers make their state at the first step; an empty one makes it, to be overwritten.
            (empty,) = self._batches([], 1, ())
            self.engine.backward(self.engine.forward(empty)[0], last=True)
            self.engine.step(0.0)
        self.engine.restore(parts["weight_fp32"], parts["moment"], self.steps)
        if self.rank == 0:
            self.averaged = {n: t.to(self.policy.device) for n, t in parts["ema"].items()}

    def _batches(self, items: Sequence[Item], count: int, replays: Sequence[Any]) -> Iterator[Any]:
        size = self.recipe.learner.micro_batch
        return self.algorithm.batches(self.policy, items, lambda i: replays[i], size, count)

    def _evaluations(self, micro_steps: int) -> int:
        per_sample = forwards_per_sample(self.recipe.rollout.guidance_scale)
        return micro_steps * self.recipe.learner.micro_batch * per_sample

    def _learning_rate(self) -> float:
        config = self.recipe.optimizer
        warmed = min(1.0, (self.steps + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return config.learning_rate * warmed

    @torch.no_grad()
    def _average(self) -> None:
        decay = min((1 + self.steps) / (10 + self.steps), self.recipe.optimizer.ema_decay)
        weights = self.engine.weights()
        if self.rank == 0:
            targets = [weights[name] for name in self.averaged]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage]
                list(self.averaged.values()), targets, 1 - decay
            )


def _join(tables: Sequence[Table]) -> dict[str, Any]:
    columns = tables[0].keys() if tables else ()
    return {
        key: np.concatenate([table[key].detach().cpu().numpy() for table in tables])
        for key in columns
    }
