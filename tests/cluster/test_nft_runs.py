"""The weights that sample in a run of DiffusionNFT: how they follow, where they are, how they come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console
from safetensors.numpy import load_file

from cluster.launch import build_trainer, run_locally
from cluster.learner_group import RayLearner
from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
from cluster.progress import Progress
from cluster.ray_cluster import connected
from cluster.run import RunDirectory
from cluster.trained import STATE_FILE
from cluster.weights import checksum, to_arrays, unpack
from recipes.schema import Recipe
from recipes.source import load
from rl.catalogue import build_algorithm
from rl.items import Item
from rollout.draws import groups_for
from rollout.flow import FlowPlan
from rollout.flow_sampler import FlowSampler

Arrays = dict[str, np.ndarray]
# d is 0 after one optimiser step, then .25, .5, .6, .6 ...
LAGGING = "rl.old_policy={flat_steps: 1, rate: 0.25, ceiling: 0.6}"
SETTINGS = [
    "steps=4",
    "rollout.steps=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.batch_size=8",
    "learner.ranks=1",
    "learner.micro_batch=8",
    "policy.lora={rank: 4, alpha: 8}",
    "evaluation.every=2",
    "evaluation.samples=4",
    "evaluation.rewards=[]",
    "checkpoints.every=2",
    "checkpoints.keep_last=9",
    "checkpoints.keep_best=null",
    "tracking=[]",
    "rl.draws=2",
    LAGGING,
]


def recipe_of(*overrides: str) -> Recipe:
    return load(Path("digits/nft"), Recipe, [*SETTINGS, *overrides]).value


def steps_of(recipe: Recipe, count: int) -> list[list[Item]]:
    """Optimiser steps of samples that the weights before training drew; three groups each."""
    policy = recipe.policy.build(seed=recipe.seed)
    sampler = FlowSampler(recipe.rollout, policy)  # pyright: ignore[reportArgumentType]
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
    steps: list[list[Item]] = []
    for step in range(count):
        groups = groups_for(recipe.prompts.load(), seed=0, step=step, count=3, size=2)
        made = sampler.sample(groups, algorithm.plans(step, groups))  # pyright: ignore[reportArgumentType]
        advantages = np.random.default_rng(step).normal(size=(3, 2))
        shares, none = np.full(2, 1 / 6), np.zeros(2)
        steps.append(
            [
                Item(r.replay, 4, r.group.prompt, row, shares, none, 0)
                for r, row in zip(made, advantages, strict=True)
            ]
        )
    return steps


def published(learner: LocalLearner | RayLearner, averaged: bool = False) -> Arrays:
    data: Any = learner.publish(0, averaged).data
    arrays = unpack(ray.get(data) if isinstance(data, ray.ObjectRef) else data)
    return {name: array.copy() for name, array in arrays.items()}


def trained(learner: LocalLearner) -> Arrays:
    return {k: v.copy() for k, v in to_arrays(learner.rank.engine.weights()).items()}


def assert_close(got: Arrays, expected: Arrays, atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=atol, err_msg=name)


def distance(a: Arrays, b: Arrays) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def test_the_weights_that_sample_follow_once_a_rollout_set():
    """By optimiser steps of the run: d is .25 after the first set of two, .6 after the second."""
    learner = LocalLearner(recipe_of("rl.minibatches=2"))
    steps = steps_of(learner.rank.recipe, 4)
    old = trained(learner)
    for pair, decay in ((steps[:2], 0.25), (steps[2:], 0.6)):
        learner.update(pair)
        now = trained(learner)
        old = {name: decay * old[name] + (1 - decay) * now[name] for name in old}
        assert_close(published(learner), old, 1e-6)
        assert distance(old, now) > 1e-4


def test_what_is_evaluated_is_the_average_of_the_trained_weights():
    lagging, at_once = LocalLearner(recipe_of()), LocalLearner(recipe_of("rl.old_policy={rate: 0}"))
    for steps in steps_of(lagging.rank.recipe, 3):
        lagging.update([steps])
        at_once.update([steps])
    assert_close(published(lagging, True), published(at_once, True), 0.0)
    assert_close(published(at_once), trained(at_once), 0.0)
    assert distance(published(lagging), published(at_once)) > 1e-4


def test_rollouts_come_from_the_old_policy(tmp_path: Path):
    recipe = recipe_of("steps=3")
    pool, learner = LocalRolloutPool(recipe), LocalLearner(recipe)
    with Progress(recipe.steps, 0, Console(quiet=True)) as progress:
        directory = RunDirectory(recipe, tmp_path, [], progress, lambda media: media)
        directory.save = learner.save
        build_trainer(recipe, directory, pool, LocalScorer(recipe), learner, 0).train()
    groups = groups_for(recipe.prompts.load(), seed=0, step=3, count=1, size=2)
    list(pool.generate(groups, [FlowPlan()]))
    sampling = to_arrays(pool.worker.policy.trainable())
    assert checksum(sampling) == learner.publish(3).checksum
    assert distance(sampling, trained(learner)) > 1e-5


def run(path: Path, *overrides: str) -> Path:
    run_locally(recipe_of(*overrides), path, Console(quiet=True))
    return path


def numbers(path: Path) -> list[dict[str, Any]]:
    """Training rows without what a clock decides."""
    timed = ("time", "busy/", "idle/", "cost/seconds", "cost/actor_seconds")
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    kept = [row for row in rows if row["kind"] == "train"]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in kept]


def state(path: Path) -> bytes:
    return (path / "checkpoints" / "step_000004" / "optimizer.safetensors").read_bytes()


def test_a_run_in_two_parts_is_the_same_run(tmp_path: Path):
    whole = run(tmp_path / "whole")
    halves = run(tmp_path / "halves", "steps=2")
    assert len(numbers(halves)) == 2
    run(halves)
    assert numbers(halves) == numbers(whole)
    assert state(halves) == state(whole)
    first, *later = numbers(whole)
    assert first["drift/velocity_p99"] == first["nft/lag"] == 0
    assert all("drift/velocity_p99" not in row and row["nft/lag"] > 0 for row in later[1:])
    assert b".old" in state(whole)


def saved(learner: LocalLearner | RayLearner, path: Path) -> dict[str, Arrays]:
    """The trained weights and those that sample, as a checkpoint holds them."""
    path.mkdir()
    learner.save(path)
    tensors = load_file(path / STATE_FILE)
    return {
        kind: {n.removesuffix(kind): t for n, t in tensors.items() if n.endswith(kind)}
        for kind in (".weight_fp32", ".old")
    }


@pytest.mark.slow
def test_partitioned_ranks_keep_the_old_policy(tmp_path: Path):
    """ZeRO 3 on two ranks, adapters and everything; what they saved goes on in one process."""
    lora, full = (
        recipe_of("learner.ranks=2", "learner.zero_stage=3", f"policy.lora={lora}")
        for lora in ("{rank: 4, alpha: 8}", "null")
    )
    with connected(lora) as placement:
        for recipe, place in ((lora, tmp_path / "lora"), (full, tmp_path / "full")):
            place.mkdir()
            steps, alone = steps_of(recipe, 3), LocalLearner(recipe)
            ranks = RayLearner(recipe, placement, str(place))
            ranks.start()
            norms = [[learner.update([steps[0]]).grad_norms[0] for learner in (alone, ranks)]]
            one = saved(ranks, place / "one")
            norms += [[learner.update([steps[1]]).grad_norms[0] for learner in (alone, ranks)]]
            two = saved(ranks, place / "two")
            sampling = published(ranks)
            ranks.stop()
            assert [b for _, b in norms] == pytest.approx([a for a, _ in norms], rel=1e-2)
            assert_close(one[".old"], one[".weight_fp32"], 0.0)
            pairs = ((n, w, one[".old"][n]) for n, w in two[".weight_fp32"].items())
            assert_close(sampling, {n: 0.25 * old + 0.75 * w for n, w, old in pairs}, 1e-6)
            other = LocalLearner(recipe)
            other.restore(place / "two")
            assert_close(published(other), sampling, 0.0)
            other.update([steps[2]])
            now = trained(other)
            assert_close(published(other), {n: (sampling[n] + now[n]) / 2 for n in now}, 1e-6)
            assert distance(sampling, now) > 1e-4
