"""DeepSpeed learner ranks as Ray actors behind one class.

Ranks are never restarted singly: their collective state is only valid together. When one is lost
or hangs the group is; the launcher builds a new one from the last checkpoint.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayTaskError

from cluster.distill_rank import build_rank
from cluster.jobs import AnyItem, place_replays
from cluster.logs import log_to
from cluster.ray_cluster import LOST, TIMEOUT, Placement, actor_options, share_of
from cluster.stacks import end_processes, keep_stacks
from cluster.timeline import Timeline
from cluster.weights import Weights
from recipes.schema import AnyRecipe, recipe_from_json
from rl.contracts import Update
from rl.items import micro_steps, share


class LearnerLost(RuntimeError):
    """A rank is gone or hangs, and with it the group; or what it was to replay is gone."""


class RankActor:
    """A learner rank in its own process."""

    def __init__(self, log: str) -> None:
        log_to(log)
        self.rank: Any

    def address(self) -> tuple[str, int]:
        """Where ranks can meet: this node and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, recipe_json: str, rank: int, address: tuple[str, int]) -> int:
        """Join the group and build the engine; returns the process id."""
        from cluster.deepspeed_engine import join_group

        recipe = recipe_from_json(recipe_json)
        gpu = recipe.learner.gpus > 0
        join_group(rank, recipe.learner.ranks, *address, gpu=gpu)
        threads = max(int(recipe.learner.cpus), 1)
        device = "cuda" if gpu else "cpu"
        self.rank = build_rank(recipe_json, rank, device, threads, "deepspeed")
        return os.getpid()

    def update(self, *arguments: Any) -> Update:
        """See ``LearnerRank.update``."""
        return self.rank.update(*arguments)

    def accumulate(self, *arguments: Any) -> Update:
        """See ``LearnerRank.accumulate``."""
        return self.rank.accumulate(*arguments)

    def replay(self, *arguments: Any) -> dict[str, Any]:
        """See ``LearnerRank.replay``."""
        return self.rank.replay(*arguments)

    def publish(self, version: int, averaged: bool) -> tuple[Weights | None, Any]:
        """See ``LearnerRank.publish``."""
        return self.rank.publish(version, averaged)

    def save(self, directory: Path) -> None:
        """See ``LearnerRank.save``."""
        self.rank.save(directory)

    def restore(self, directory: Path) -> None:
        """See ``LearnerRank.restore``."""
        self.rank.restore(directory)


class RayLearner:
    """See ``rl.contracts.Learner``."""

    def __init__(
        self,
        recipe: AnyRecipe,
        placement: Placement,
        log_dir: str,
        timeline: Timeline | None = None,
        life: int = 0,
    ) -> None:
        """``timeline``: gets what each rank does. ``life``: how many were lost before in this process."""
        self.recipe = recipe
        self.log_dir, self.timeline = log_dir, timeline
        learner, colocated = recipe.learner, recipe.cluster.colocated
        actor: Any = ray.remote(RankActor)
        # Ray keeps a name for a while after the driver has heard of an actor's death.
        again = f"-{life + 1}" if life else ""
        self.ranks: list[Any] = [
            actor.options(
                **actor_options(
                    placement,
                    bundle,
                    share_of(learner.cpus, colocated),
                    share_of(learner.gpus, colocated),
                ),
                name=f"{recipe.name}-learner-{index}{again}",
                max_restarts=0,
            ).remote(f"{log_dir}/learner-{index}.log")
            for index, bundle in enumerate(placement.ranks)
        ]

    def start(self) -> list[int]:
        """Build all ranks; returns their process ids."""
        timeout = self.recipe.cluster.start_timeout
        (address,) = self._get([self.ranks[0].address.remote()], timeout)
        recipe = self.recipe.model_dump_json()
        calls = [rank.start.remote(recipe, i, address) for i, rank in enumerate(self.ranks)]
        return self._get(calls, timeout)

    def update(self, steps: Sequence[Sequence[AnyItem]]) -> Update:
        """See ``rl.contracts.Learner``."""
        return self._share_out("update", steps, 1)

    def accumulate(self, items: Sequence[AnyItem]) -> Update:
        """See ``rl.contracts.Learner``."""
        return self._share_out("accumulate", [items], 0)

    def _share_out(self, method: str, steps: Sequence[Sequence[AnyItem]], least: int) -> Update:
        """Every rank's share; ``least`` micro-batches end a step, be they empty."""
        size = self.recipe.learner.micro_batch
        shares = [share(items, len(self.ranks)) for items in steps]
        counts = [max(micro_steps(parts, size), least) for parts in shares]
        calls: list[Any] = []
        began = time.time()
        for index, rank in enumerate(self.ranks):
            placed, replays = place_replays([parts[index] for parts in shares])
            calls.append(getattr(rank, method).remote(placed, counts, *replays))
        parts: list[Update] = self._get(calls, self.recipe.cluster.job_timeout)
        if self.timeline is not None:
            for index, part in enumerate(parts):
                self.timeline.span(f"learner-{index}", method, began, part.seconds[0])
        return replace(Update.joined(parts), grad_norms=parts[0].grad_norms)

    def replay(self, items: Sequence[AnyItem]) -> Mapping[str, Any]:
        """See ``rl.contracts.Learner``."""
        shares = share(items, len(self.ranks))
        count = micro_steps(shares, self.recipe.learner.micro_batch)
        calls: list[Any] = []
        for rank, part in zip(self.ranks, shares, strict=True):
            (placed,), replays = place_replays([part])
            calls.append(rank.replay.remote(placed, count, *replays))
        return _join(self._get(calls, self.recipe.cluster.job_timeout))

    def publish(self, version: int, averaged: bool = False) -> Weights:
        """See ``rl.contracts.Learner``. The blob stays in the object store; the driver owns it."""
        calls = [
            rank.publish.options(num_returns=2).remote(version, averaged) for rank in self.ranks
        ]
        heads = self._get([head for head, _ in calls], self.recipe.cluster.job_timeout)
        head: Weights = heads[0]
        return Weights(head.version, head.checksum, calls[0][1])

    def save(self, directory: Path) -> None:
        """All ranks take part, rank 0 writes."""
        calls = [rank.save.remote(directory) for rank in self.ranks]
        self._get(calls, self.recipe.cluster.job_timeout)

    def restore(self, directory: Path) -> None:
        """Continue from a saved state, of any number of ranks."""
        calls = [rank.restore.remote(directory) for rank in self.ranks]
        self._get(calls, self.recipe.cluster.job_timeout)

    def stop(self, lost: bool = False) -> None:
        """End all ranks' processes; ``lost``: though one may not hear of it."""
        if lost:
            end_processes(self.ranks)
        for rank in self.ranks:
            ray.kill(rank)

    def _get(self, calls: list[Any], timeout: float) -> list[Any]:
        """Answers of all ranks.

        Raises:
            LearnerLost: a process is gone, or its peers noticed that it is; the deadline passed (the
                stacks are kept); or a node took along what they were to replay.
        """
        try:
            return ray.get(calls, timeout=timeout)
        except TIMEOUT as error:
            names = {f"learner-{index}": rank for index, rank in enumerate(self.ranks)}
            keep_stacks(names, self.log_dir)
            raise LearnerLost(f"its ranks gave no answer within {timeout:g} s") from error
        except ObjectLostError as error:
            raise LearnerLost("samples were lost with the node that held them") from error
        except LOST as error:
            raise LearnerLost(str(error)) from error
        except RayTaskError as error:
            # A collective fails on the survivors first: then the cause is the lost peer.
            if _any_lost(self.ranks):
                raise LearnerLost("a learner rank died") from error
            raise


def _any_lost(ranks: Sequence[Any]) -> bool:
    """Whether a process is gone; one that gives no answer waits for the peer that failed."""
    for rank in ranks:
        try:
            ray.get(rank.address.remote(), timeout=10)
        except TIMEOUT:
            continue
        except LOST:
            return True
    return False


def _join(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of all ranks; a rank without branches has empty ones."""
    return {
        key: np.concatenate([table[key] for table in tables if key in table]) for key in tables[0]
    }
