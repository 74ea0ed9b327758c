"""Teacher samples of conditions that are drawn by region: ARIA for a few-step student.

As for the smaller student (``distill/compression.py``), with every draw paired: conditions come by q,
which follows the tracked distance between student and teacher, and a sample weighs (pi / q)^b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distill.contracts import TeacherItem
from distill.random_conditioning import correction, draw_conditions, weights
from distill.regions import (
    Regions,
    RegionsConfig,
    Tracker,
    allocate,
    effective_sample_size,
    table,
)
from distill.teacher import Spent
from rl.contracts import Metrics, RolloutPool
from rollout.draws import Group, Prompt, keyed_seed, keyed_uniform
from rollout.flow import FlowPlan

# The distance that is tracked: of the sample from its teacher's, paired.
DISTANCE = "error/final"


class AllocatedTeacher:
    """Draws a step's conditions by the discrepancy up to the last step, so workers don't run ahead."""

    def __init__(
        self,
        pool: RolloutPool,
        plan: FlowPlan,
        prompts: Sequence[Prompt],
        regions: Regions,
        config: RegionsConfig,
        draws: Callable[[int], list[Group]],
        seed: int,
    ) -> None:
        """``draws(step)``: as many groups as a step has, of which the prompts are replaced."""
        self._pool, self._plan, self._prompts, self._draws = pool, plan, prompts, draws
        self._regions, self._config, self._seed = regions, config, seed
        self.tracker = Tracker.start(len(regions.names), config.decay)
        self._region_of: dict[int, int] = {}
        self._effective = 1.0

    @property
    def q(self) -> np.ndarray:
        """The next step's distribution over regions."""
        discrepancy = self.tracker.discrepancy(self._regions.pi)
        return allocate(self._regions.pi, discrepancy, self._config)

    def take(self, step: int) -> tuple[list[TeacherItem], Spent]:
        """See ``distill.teacher.Source``."""
        q, like = self.q, self._draws(step)
        uniforms = [keyed_uniform(self._seed, "condition", step, slot) for slot in range(len(like))]
        conditions = draw_conditions(self._regions, q, np.array(uniforms))
        groups = [
            self._asking(group, self._prompts[int(condition)])
            for group, condition in zip(like, conditions, strict=True)
        ]
        index = self._regions.index[conditions]
        factors = correction(self._regions.pi, q, index, self._config.correction)
        shares = weights(factors, self._config.clip)
        self._effective = effective_sample_size(shares) / len(shares)
        self._region_of = {
            group.draw(j).seed: int(region)
            for group, region in zip(groups, index, strict=True)
            for j in range(group.size)
        }
        samples = list(self._pool.generate(groups, [self._plan] * len(groups)))
        samples.sort(key=lambda sample: sample.group.group)
        total = max(1, sum(s.group.size for s in samples))
        items = [
            TeacherItem(
                s.replay, s.group.size, float(shares[s.group.group]) / total,
                s.group.prompt, s.group.columns,
            )
            for s in samples
        ]  # fmt: skip
        return items, (sum(s.forwards for s in samples), sum(s.seconds for s in samples))

    def observe(self, columns: Mapping[str, np.ndarray]) -> Metrics:
        """Track a step's distances; what regions look like now."""
        regions = np.array([self._region_of[int(seed)] for seed in columns["seed"]])
        distances = columns[DISTANCE]
        count = len(self._regions.names)
        total = table(distances, np.zeros(len(distances)), regions, count)
        self.tracker = self.tracker.observe(*total)
        discrepancy, q = self.tracker.discrepancy(self._regions.pi), self.q
        metrics: Metrics = {"regions/effective_sample_share": self._effective}
        for k, name in enumerate(self._regions.names):
            metrics[f"region/{name}/discrepancy"] = float(discrepancy[k])
            metrics[f"region/{name}/q"] = float(q[k])
        return metrics

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"tracker": self.tracker.state(), "regions": self._regions.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.tracker = Tracker.from_state(state["tracker"])
        self._regions = Regions.from_json(state["regions"])

    @staticmethod
    def _asking(group: Group, prompt: Prompt) -> Group:
        seed = keyed_seed(group.seed, "asking", prompt.id)
        return replace(
            group, prompt_id=prompt.id, prompt=prompt.text, columns=prompt.columns, seed=seed
        )
