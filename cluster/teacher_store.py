"""Teacher samples of a recipe: streamed from the workers, or a store and the verb that fills it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

from cluster.progress import Progress
from cluster.ray_cluster import connected
from cluster.rollout_pool import RayRolloutPool
from cluster.run import data_digest
from distill.allocation import AllocatedTeacher
from distill.catalogue import build_teacher, teacher_plan
from distill.compression import CompressionConfig, Conditions, regions_of
from distill.store import StoredGroup, StoreMismatch, TeacherStore
from distill.teacher import Source, StoredTeacher, StreamedTeacher, draws_of
from recipes.schema import DistillRecipe
from rl.contracts import RolloutPool, Sampled
from rl.train import Schedule


def source_of(recipe: DistillRecipe, pool: RolloutPool, schedule: Schedule) -> Source:
    """Where a run's items come from.

    Raises:
        StoreError: the store is not complete, or holds other samples than the recipe's teacher makes.
    """
    rollout = recipe.rollout
    if isinstance(recipe.distill, CompressionConfig):
        batch = rollout.prompts_per_step * rollout.group_size
        return Conditions(
            recipe.distill, recipe.prompts.load(), recipe.seed, batch, condition_embeddings(recipe)
        )
    if rollout.store is not None:
        store = TeacherStore.open(rollout.store)
        check_identity(store, recipe)
        return StoredTeacher(store, recipe.seed, rollout.prompts_per_step)
    groups = draws_of(
        recipe.prompts.load(), recipe.seed, rollout.prompts_per_step, rollout.group_size
    )

    if recipe.distill.regions is not None:
        config, prompts = recipe.distill.regions, recipe.prompts.load()
        masses = np.full(len(prompts), 1 / len(prompts))
        regions = regions_of(config, prompts, masses, recipe.seed, condition_embeddings(recipe))
        plan = teacher_plan()
        return AllocatedTeacher(pool, plan, prompts, regions, config, groups, recipe.seed)

    def until(step: int) -> int:
        """The next step after which the pool evaluates."""
        every = schedule.evaluate_every
        return min((step // every + 1) * every, schedule.steps)

    return StreamedTeacher(pool, teacher_plan(), groups, until)


def condition_embeddings(recipe: DistillRecipe) -> Callable[[Sequence[str]], np.ndarray]:
    """What k-means groups: the teacher's own conditions, flat."""

    def embeddings(prompts: Sequence[str]) -> np.ndarray:
        return build_teacher(recipe.policy, "cpu").encode(prompts).flatten(1).numpy()

    return embeddings


def identity(recipe: DistillRecipe) -> dict[str, Any]:
    """What the samples of a recipe's teacher are a function of."""
    rollout, policy = recipe.rollout, recipe.policy
    return {
        "checkpoint": policy.checkpoint,
        "dtype": policy.dtype,
        "sampler": rollout.model_dump(
            mode="json",
            include={"steps", "shift", "sigma_max", "guidance_scale", "group_size"},
        ),
        "prompts": data_digest(recipe.prompts.load()),
    }


def check_identity(store: TeacherStore, recipe: DistillRecipe) -> None:
    """Refuse samples of another teacher; how many there are, and of which prompts, is free.

    Raises:
        StoreMismatch: with what differs.
    """
    asked = identity(recipe)
    different = [
        f"{key} (there {store.identity.get(key)}, in the recipe {asked[key]})"
        for key in ("checkpoint", "dtype", "sampler")
        if store.identity.get(key) != asked[key]
    ]
    if different:
        raise StoreMismatch(
            f"{store.directory}: holds samples of another teacher: {', '.join(different)}: fill "
            "another directory with `rectify teacher RECIPE`"
        )


def fill(recipe: DistillRecipe, console: Console, samples: int | None) -> Path:
    """Draw teacher samples of a recipe into its store, or those that are still missing.

    ``samples``: how many, rounded up to whole shards; None: as many as the run takes.

    Raises:
        StoreMismatch: the store holds samples of something else.
        ClusterError: workers were lost.
    """
    rollout = recipe.rollout
    assert rollout.store is not None
    per_shard = rollout.groups_per_shard
    groups = recipe.steps * rollout.prompts_per_step
    if samples is not None:
        groups = -(-samples // rollout.group_size)
    shards = max(1, -(-groups // per_shard))
    facts = {**identity(recipe), "seed": recipe.seed, "groups_per_shard": per_shard}
    store = TeacherStore.create(rollout.store, facts, shards)
    missing = store.missing()
    if not missing:
        return store.directory
    recipe.policy.prepare()
    draws = draws_of(recipe.prompts.load(), recipe.seed, per_shard, rollout.group_size)
    with Progress(shards, shards - len(missing), console) as progress, connected(recipe) as placed:
        logs = store.directory / "logs"
        logs.mkdir(exist_ok=True)
        pool = RayRolloutPool(recipe, placed, str(logs.resolve()))
        pool.start()
        fetch = partial(ray.get, timeout=recipe.cluster.job_timeout)
        with contextlib.closing(pool):
            for done, shard in enumerate(missing, shards - len(missing) + 1):
                started = time.perf_counter()
                drawn = draws(shard)
                plans = [teacher_plan()] * len(drawn)
                found = sorted(pool.generate(drawn, plans), key=lambda s: s.group.group)
                store.write(shard, [stored(sample, fetch) for sample in found])
                progress.step(done, {"time/step": time.perf_counter() - started})
    return store.directory


def stored(sample: Sampled, fetch: Callable[[Any], Any]) -> StoredGroup:
    """A sampled group as it is stored."""
    replay, group = fetch(sample.replay), sample.group
    return StoredGroup(
        group.prompt_id,
        group.prompt,
        group.columns,
        np.array(replay.seeds),
        np.array(replay.final),
    )
