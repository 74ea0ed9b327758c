"""DeepSpeed ranks against plain PyTorch: ZeRO 0-3, one and two ranks, and restoring on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.learner_group import RayLearner
from cluster.local import LocalLearner
from cluster.ray_cluster import connected
from cluster.weights import unpack
from recipes.schema import Recipe
from rl.items import Item
from rollout.draws import groups_for
from rollout.flow_sampler import FlowSampler

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def placement(digits_recipe: Callable[..., Recipe]) -> Iterator[Any]:
    recipe = digits_recipe("learner.ranks=2")
    with connected(recipe) as placement:
        yield placement


def steps_of(recipe: Recipe) -> list[list[Item]]:
    """Two optimiser steps of real transitions; three groups, so two ranks are uneven."""
    policy = recipe.policy.build(seed=recipe.seed)
    from rl.catalogue import build_algorithm

    sampler = FlowSampler(recipe.rollout, policy)
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
    steps = []
    for step in range(2):
        groups = groups_for(recipe.prompts.load(), seed=0, step=step, count=3, size=4)
        rollouts = sampler.sample(groups, algorithm.plans(step, groups))
        generator = np.random.default_rng(step)
        steps.append(
            [
                Item(r.replay, len(r.replay.x), r.group.prompt,
                     generator.normal(size=4), np.full(4, 1 / 12), np.zeros(4), 0)
                for r in rollouts
            ]
        )  # fmt: skip
    return steps


def arrays(learner: LocalLearner | RayLearner, averaged: bool = False) -> dict[str, np.ndarray]:
    data = learner.publish(0, averaged).data
    return unpack(ray.get(data) if isinstance(data, ray.ObjectRef) else data)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=atol, err_msg=name)


def start(recipe: Recipe, placement: Any, tmp_path: Path) -> RayLearner:
    places = placement.ranks[: recipe.learner.ranks]
    learner = RayLearner(recipe, replace(placement, ranks=places), str(tmp_path))
    learner.start()
    return learner


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=SLOW) for stage in (0, 2, 3))])
def test_ranks_train_like_plain_pytorch(digits_recipe, placement, tmp_path: Path, stage: int):
    """Adapters and everything; several micro-batches per step, uneven over two ranks; averages too."""
    for lora in ("{rank: 4, alpha: 8}", "null"):
        recipe = digits_recipe(
            f"learner.zero_stage={stage}", f"policy.lora={lora}", "learner.ranks=2",
            "learner.micro_batch=3", "rl.initial_noise=independent", "rl.kl_coefficient=0.01",
            "optimizer.learning_rate=1e-3",
        )  # fmt: skip
        steps = steps_of(recipe)
        reference = LocalLearner(digits_recipe(f"policy.lora={lora}", "rl.initial_noise=independent",
                                               "rl.kl_coefficient=0.01", "learner.micro_batch=3",
                                               "optimizer.learning_rate=1e-3"))  # fmt: skip
        start_weights = {name: array.copy() for name, array in arrays(reference).items()}
        expected = reference.update(steps)
        learner = start(recipe, placement, tmp_path)
        try:
            update = learner.update(steps)
            # Adam's first steps are signs of gradients: tiny differences near zero are amplified.
            assert_close(arrays(learner), arrays(reference), 2e-4)
            assert_close(arrays(learner, True), arrays(reference, True), 2e-4)
            moved = max(np.abs(arrays(learner)[n] - w).max() for n, w in start_weights.items())
            assert moved > 1e-3
            assert update.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
            assert np.sort(update.table["loss"]) == pytest.approx(
                np.sort(expected.table["loss"]), abs=1e-4
            )
            # The same in parts: the rest of a step, and nothing at all, end it.
            for items, parts in ((steps[0], (2, 3)), (steps[1], (3, 3))):
                whole = reference.update([items])
                first = learner.accumulate(items[: parts[0]])
                rest = learner.update([items[parts[0] : parts[1]]])
                assert first.grad_norms == ()
                assert rest.grad_norms == pytest.approx(whole.grad_norms, rel=2e-3)
            assert_close(arrays(learner), arrays(reference), 3e-4)
        finally:
            learner.stop()


def test_a_learner_begins_before_ray_has_forgotten_the_lost_one(
    digits_recipe, placement, tmp_path: Path
):
    recipe = digits_recipe("learner.ranks=2")
    places = replace(placement, ranks=placement.ranks[:2])
    lost = RayLearner(recipe, places, str(tmp_path))
    successor = RayLearner(recipe, places, str(tmp_path), life=1)
    lost.stop(lost=True)
    try:
        assert len(set(successor.start())) == 2
    finally:
        successor.stop()


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [(3, 2, 1), *(pytest.param(*c, marks=SLOW) for c in ((0, 1, 2), (2, 1, 2), (1, 2, 1)))],
)
def test_state_moves_to_other_ranks(digits_recipe, placement, tmp_path: Path, stage, before, after):
    """One step, save, restore on another number of ranks, another step: like two in one go."""

    def recipe(ranks: int) -> Recipe:
        return digits_recipe(f"learner.zero_stage={stage}", f"learner.ranks={ranks}")

    first, second = steps_of(recipe(before))
    reference = LocalLearner(recipe(1))
    reference.update([first, second])
    learner = start(recipe(before), placement, tmp_path)
    learner.update([first])
    learner.save(tmp_path)
    saved = arrays(learner)
    learner.stop()
    assert (tmp_path / "policy" / "pytorch_lora_weights.safetensors").exists()
    learner = start(recipe(after), placement, tmp_path)
    try:
        learner.restore(tmp_path)
        assert_close(arrays(learner), saved, 0.0)
        learner.update([second])
        assert_close(arrays(learner), arrays(reference), 1e-4)
        assert_close(arrays(learner, True), arrays(reference, True), 1e-4)
    finally:
        learner.stop()
