"""The pinned evaluation: noise-free sampling, the same draws, averaged weights, held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rl.contracts import Learner, Metrics, PlainPlan, Plan, RolloutPool, Scored, Scorer
from rl.metrics import length_metrics
from rollout.draws import EVALUATION_STEP, Prompt, groups_for


class Plans(Protocol):
    """What knows how an evaluation sample is drawn: an algorithm."""

    def evaluation_plan(self, steps: int | None, orders: int = 0) -> PlainPlan:
        """See ``rl.algorithm.Algorithm``."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        prompts: taken in turn until there are ``samples``.
        seed: the run's; evaluation draws are keyed apart from all training draws.
        steps: sampling steps, or None for the rollout's.
        gap_samples, gap_orders: of so many samples the variational gap is estimated, from so many
            orders each.
    """

    algorithm: Plans
    prompts: Sequence[Prompt]
    samples: int
    seed: int
    steps: int | None
    gap_samples: int = 0
    gap_orders: int = 0

    def run(
        self, learner: Learner, pool: RolloutPool, scorer: Scorer, step: int
    ) -> tuple[Metrics, list[Scored]]:
        """Metrics ``evaluation/<reward>/...`` and the scored samples of the averaged weights."""
        weights = learner.publish(step, averaged=True)
        gap, plain = (
            self.algorithm.evaluation_plan(self.steps, orders) for orders in (self.gap_orders, 0)
        )
        return self.measure(pool, scorer, plain, "evaluation", gap, weights)

    def measure(
        self,
        pool: RolloutPool,
        scorer: Scorer,
        plan: Plan,
        prefix: str,
        gap_plan: Plan | None = None,
        weights: Any = None,
    ) -> tuple[Metrics, list[Scored]]:
        """Metrics ``<prefix>/<reward>/...`` and the scored samples, drawn by ``plan``.

        ``gap_plan`` is that of the first ``gap_samples``; ``weights`` as a pool takes them.
        """
        groups = groups_for(
            self.prompts, seed=self.seed, step=EVALUATION_STEP, count=self.samples, size=1
        )
        plans = [
            gap_plan if gap_plan is not None and i < self.gap_samples else plan
            for i in range(len(groups))
        ]
        scored = scorer.score(pool.generate(groups, plans, weights), held_out=True)
        metrics: Metrics = {}
        for name in scored[0].scores:
            values = np.concatenate([group.scores[name].values for group in scored])
            values = values[np.isfinite(values)]
            if len(values):
                metrics[f"{prefix}/{name}/mean"] = float(values.mean())
                metrics[f"{prefix}/{name}/std"] = float(values.std())
        described = scorer.describe([group.sample for group in scored])
        metrics |= {f"{prefix}/{name}": value for name, value in described.items()}
        samples = [group.sample for group in scored]
        metrics |= length_metrics(prefix, samples)
        for name in sorted({name for sample in samples for name in sample.facts}):
            facts = np.concatenate([s.facts[name] for s in samples if name in s.facts])
            metrics[name] = float(facts.mean())
        metrics["work/evaluation_forwards"] = float(sum(g.sample.forwards for g in scored))
        return metrics, scored
