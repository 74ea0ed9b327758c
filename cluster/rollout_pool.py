"""Rollout workers as Ray actors behind the contract of a pool."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from cluster.dispatch import Dispatcher
from cluster.fleet import Event, Fleet, Member
from cluster.ray_cluster import Placement, actor_options, share_of
from cluster.stacks import end_processes, keep_stacks
from cluster.timeline import Timeline
from cluster.weights import Weights
from cluster.workers import Health, Record, RolloutWorker
from recipes.schema import AnyRecipe
from rl.contracts import Plan, Sampled
from rl.tilt import Score
from rollout.draws import EVALUATION_STEP, Group


class RayRolloutPool:
    """See ``rl.contracts.RolloutPool``."""

    def __init__(
        self,
        recipe: AnyRecipe,
        placement: Placement,
        log_dir: str,
        served: Mapping[str, Score] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """``served``: see ``RolloutWorker``. ``timeline``: gets what each actor does."""
        self.log_dir, self.timeline = log_dir, timeline
        workers, colocated = recipe.workers, recipe.cluster.colocated
        remote: Any = ray.remote  # its stubs know no concurrency_groups
        actor = remote(concurrency_groups={"health": 1})(RolloutWorker)
        handles = [
            actor.options(
                **actor_options(
                    placement,
                    bundle,
                    share_of(workers.cpus, colocated),
                    share_of(workers.gpus, colocated),
                ),
                name=f"{recipe.name}-rollout-{index}",
                max_restarts=recipe.cluster.max_restarts,
                max_task_retries=0,
            ).remote(
                recipe.model_dump_json(),
                "cuda" if workers.gpus else "cpu",
                max(int(workers.cpus), 1),
                f"{log_dir}/rollout-{index}.log",
                served,
            )
            for index, bundle in enumerate(placement.workers)
        ]
        self.fleet = Fleet(handles, recipe.cluster, self._told)
        self.dispatcher = Dispatcher(
            self.fleet, recipe.rollout.batch_size, recipe.cluster.job_timeout, self._sampled
        )

    @property
    def restarts(self) -> int:
        """See ``rl.contracts.RolloutPool``."""
        return self.fleet.restarts

    def start(self) -> list[Health]:
        """Wait until every worker answers, then take calls.

        Raises:
            ClusterError: one did not within ``cluster.start_timeout``.
        """
        health = self.fleet.start()
        self.dispatcher.start()
        return health

    def load(self, weights: Weights) -> None:
        """See ``rl.contracts.RolloutPool``."""
        self.dispatcher.latest = weights

    def generate(
        self, groups: Sequence[Group], plans: Sequence[Plan], weights: Weights | None = None
    ) -> Iterator[Sampled]:
        """See ``rl.contracts.RolloutPool``."""
        return self.dispatcher.call(groups, plans, weights)

    def cancel(self) -> None:
        """See ``rl.contracts.RolloutPool``."""
        self.dispatcher.cancel()

    def close(self) -> None:
        """Take no more calls."""
        self.dispatcher.close()

    def _told(self, member: Member, event: Event) -> None:
        name = f"rollout-{member.index}"
        if event == "hung":
            keep_stacks({name: member.handle}, self.log_dir)
            end_processes([member.handle])
        if self.timeline is not None:
            self.timeline.instant(name, event, time.time())

    def _sampled(self, index: int, groups: Sequence[Group], records: Sequence[Record]) -> None:
        if self.timeline is not None:
            seconds = sum(record.seconds for record in records)
            step = "evaluation" if groups[0].step == EVALUATION_STEP else groups[0].step
            self.timeline.span(
                f"rollout-{index}",
                "generate",
                records[0].started,
                seconds,
                step=step,
                groups=len(groups),
                version=records[0].version,
            )
