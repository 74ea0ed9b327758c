"""One learner rank of a distillation: several networks, each in an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.rank import LearnerRank, join_tables
from cluster.trained import Trained, build_engine, read_state, write_state
from cluster.weights import Weights, pack, to_arrays
from distill.catalogue import build_method, build_student, build_teacher
from distill.contracts import TeacherItem
from distill.store import StoredReference
from distill.two_step import TwoStepConfig
from recipes.schema import DistillRecipe, OptimizerConfig, recipe_from_json
from rl.contracts import Update


class DistillRank:
    """Applies a method's updates. All ranks make the same calls in the same order."""

    def __init__(self, recipe_json: str, rank: int, device: str, threads: int, engine: str) -> None:
        torch.set_num_threads(threads)
        self.recipe = recipe = DistillRecipe.model_validate_json(recipe_json)
        self.rank = rank
        self.teacher = build_teacher(recipe.policy, device)
        self.student = build_student(
            recipe.distill, recipe.policy, recipe.rollout, device, recipe.seed
        )
        self.method: Any = build_method(recipe.distill, recipe.rollout, self.teacher, recipe.seed)
        modules = self.method.modules(
            self.student, lambda: recipe.policy.model_copy(update={"lora": None}).build(device)
        )
        self.networks = {
            name: self._trained(name, module, engine) for name, module in modules.items()
        }

    def _trained(self, name: str, module: Any, engine: str) -> Trained:
        recipe = self.recipe
        optimizer, total = optimizers(recipe)[name]
        built = build_engine(engine, module, optimizer, recipe.learner)
        return Trained(built, optimizer, total, self.rank, averages=name == "student")

    def update(
        self, steps: Sequence[Sequence[TeacherItem]], micro_steps: Sequence[int], *replays: Any
    ) -> Update:
        """This rank's share of training steps; ``replay`` of an item is a position in ``replays``."""
        started = time.perf_counter()
        tables: list[Any] = []
        norms: list[float] = []
        for items, count in zip(steps, micro_steps, strict=True):
            batches = list(self._batches(items, count, replays))
            step = self.networks["student"].steps
            columns, found = self.method.update(self.networks, batches, step)
            tables += columns
            norms.append(found["student"])
        samples = sum(micro_steps) * self.recipe.learner.micro_batch
        forwards, backwards = self.method.evaluations(self.networks["student"].steps - 1)
        return Update(
            table=join_tables(tables),
            grad_norms=tuple(norms),
            forwards=samples * forwards,
            backwards=samples * backwards,
            seconds=(time.perf_counter() - started,),
        )

    @torch.no_grad()
    def replay(self, items: Sequence[TeacherItem], count: int, *replays: Any) -> dict[str, Any]:
        """``sample``: the student's, by the training forward, with the ``seed`` of each draw."""
        student = self.networks["student"]
        tables: list[Any] = []
        for batch in self._batches(items, count, replays):
            _, y2 = student.apply(batch.z, self.method.second_noise(batch), batch.condition)
            kept = batch.weights != 0
            tables.append({"sample": y2[kept], "seed": torch.tensor(batch.seeds)[kept.cpu()]})
        return join_tables(tables)

    def publish(self, version: int, averaged: bool) -> tuple[Weights | None, Any]:
        """The student: ``(head without data, blob)`` on rank 0, two Nones elsewhere."""
        student = self.networks["student"]
        tensors = student.averaged if averaged else student.engine.weights()
        if self.rank != 0:
            return None, None
        weights = pack(to_arrays(tensors), version)
        return Weights(version, weights.checksum, None), weights.data

    def save(self, directory: Path) -> None:
        """Write the averaged student in its library's layout and all networks' states."""
        states = {f"{name}:": network.state() for name, network in self.networks.items()}
        if self.rank == 0:
            write_state(directory, states)
            self.student.save(directory / "policy", self.networks["student"].averaged)

    def restore(self, directory: Path) -> None:
        """Continue from what ``save`` wrote, on any number of ranks."""
        states = read_state(directory, [f"{name}:" for name in self.networks])
        (batch,) = self._batches([], 1, ())
        for name, network in self.networks.items():

            def empty(name: str = name) -> Tensor:
                return self.method.empty_loss(self.networks, name, batch)

            network.restore(states[f"{name}:"], empty)

    def _batches(self, items: Sequence[TeacherItem], count: int, replays: Sequence[Any]) -> Any:
        def fetch(place: int) -> Any:
            replay = replays[place]
            return replay.read() if isinstance(replay, StoredReference) else replay

        size = self.recipe.learner.micro_batch
        return self.method.batches(items, fetch, size, count)


def build_rank(
    recipe_json: str, rank: int, device: str, threads: int, engine: str
) -> LearnerRank | DistillRank:
    """The rank of a recipe's kind."""
    kind = DistillRank if isinstance(recipe_from_json(recipe_json), DistillRecipe) else LearnerRank
    return kind(recipe_json, rank, device, threads, engine)


def optimizers(recipe: DistillRecipe) -> dict[str, tuple[OptimizerConfig, int]]:
    """The optimiser of every network, and the steps it takes in the whole run."""
    distill, own = recipe.distill, recipe.optimizer
    found = {"student": (own, recipe.steps)}
    if isinstance(distill, TwoStepConfig):
        begun = max(0, recipe.steps - distill.warmup_steps)
        critics = {"heads": distill.discriminator, "fake_score": distill.fake_score}
        for name, critic in critics.items():
            changed = {"learning_rate": critic.learning_rate, "betas": critic.betas}
            found[name] = (own.model_copy(update=changed), begun * critic.updates)
    return found
