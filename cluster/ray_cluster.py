"""Ray itself: starting or joining a cluster, placing actors, telling a lost actor from an error."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from recipes.derived import needed
from recipes.schema import AnyRecipe

# The process behind a call is gone, or its result with it. Whether the call ran is unknown.
LOST = (ActorDiedError, ActorUnavailableError, NodeDiedError, ObjectLostError, WorkerCrashedError)
TIMEOUT = GetTimeoutError


class ClusterError(RuntimeError):
    """The cluster cannot do what the recipe asks, or stopped doing it."""


@dataclass(frozen=True)
class Placement:
    """Where the bundles are: rollout actor i and learner rank i by bundle index."""

    group: PlacementGroup
    workers: tuple[int, ...]
    ranks: tuple[int, ...]

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        """Scheduling into one bundle."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)


@contextlib.contextmanager
def connected(recipe: AnyRecipe) -> Generator[Placement]:
    """Ray running and the bundles of the recipe reserved; both are given back at the end.

    Raises:
        ClusterError: the cluster is out of reach or has too little, naming what is missing.
    """
    local = recipe.cluster.address == "local"
    bundles, workers, ranks = bundles_of(recipe)
    options: dict[str, Any] = {"address": recipe.cluster.address}
    if local:
        cpus = max(math.ceil(needed(recipe, "cpus")), 1)
        # Without a dashboard nobody asks for past tasks, of which Ray else keeps 100,000 in memory.
        quiet = {"task_events_report_interval_ms": 0}
        options |= {"num_cpus": cpus, "include_dashboard": False, "_system_config": quiet}
    # Ray's own notices belong into the run's log, not into the progress display.
    options |= {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(**options, runtime_env={"env_vars": _environment()})
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {recipe.cluster.address}: {error}") from error
    try:
        _check_resources(bundles)
        group = placement_group(bundles, strategy="PACK")
        try:
            if not group.wait(timeout_seconds=recipe.cluster.start_timeout):
                raise ClusterError(
                    f"the cluster did not free {_total(bundles)} within "
                    f"{recipe.cluster.start_timeout:g} s (cluster.start_timeout)"
                )
            yield Placement(group, workers, ranks)
        finally:
            remove_placement_group(group)
    finally:
        ray.shutdown()


def bundles_of(
    recipe: AnyRecipe,
) -> tuple[list[dict[str, float]], tuple[int, ...], tuple[int, ...]]:
    """Placement bundles, and the bundle of each rollout actor and each learner rank.

    Colocated actors share a bundle of the larger one's size: they take turns.
    """
    workers, learner = recipe.workers, recipe.learner
    worker = {"CPU": workers.cpus, "GPU": workers.gpus}
    rank = {"CPU": learner.cpus, "GPU": learner.gpus}
    if recipe.cluster.colocated:
        both = max(workers.count, learner.ranks)
        shared = {key: max(worker[key], rank[key]) for key in worker}
        bundles = [shared] * both
        worker_places, rank_places = range(workers.count), range(learner.ranks)
    else:
        bundles = [worker] * workers.count + [rank] * learner.ranks
        worker_places = range(workers.count)
        rank_places = range(workers.count, workers.count + learner.ranks)
    cleaned = [{k: v for k, v in bundle.items() if v > 0} for bundle in bundles]
    return cleaned, tuple(worker_places), tuple(rank_places)


def share_of(amount: float, colocated: bool) -> float:
    """What an actor declares of its bundle: half where two take turns in it."""
    return amount / 2 if colocated else amount


def actor_options(placement: Placement, bundle: int, cpus: float, gpus: float) -> dict[str, Any]:
    """Ray options of an actor in a bundle."""
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "scheduling_strategy": placement.strategy(bundle),
    }
    if gpus == 0:
        # Ray leaves all GPUs visible to an actor that asked for none.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return options


def _environment() -> dict[str, str]:
    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_TELEMETRY": "1"}


def _total(bundles: list[dict[str, float]]) -> str:
    keys = sorted({key for bundle in bundles for key in bundle})
    return ", ".join(f"{sum(b.get(k, 0) for b in bundles):g} {k}" for k in keys)


def _check_resources(bundles: list[dict[str, float]]) -> None:
    available = ray.cluster_resources()
    for key in sorted({key for bundle in bundles for key in bundle}):
        needed = sum(bundle.get(key, 0) for bundle in bundles)
        if needed > available.get(key, 0):
            raise ClusterError(
                f"the recipe needs {needed:g} {key} and the cluster has {available.get(key, 0):g}: "
                f"lower workers.count or learner.ranks, their {key.lower()}s, or set "
                "cluster.colocated: true"
            )
