"""The pinned evaluation: noise-free sampling, the same draws, averaged weights, held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.algorithm import Algorithm
from rl.contracts import Learner, Metrics, RolloutPool, Scored, Scorer
from rl.metrics import length_metrics
from rollout.draws import EVALUATION_STEP, Prompt, groups_for


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

    algorithm: Algorithm[Any]
    prompts: Sequence[Prompt]
    samples: int
    seed: int
    steps: int | None
    gap_samples: int = 0
    gap_orders: int = 0

    def run(
        self, learner: Learner, pool: RolloutPool, scorer: Scorer, step: int
    ) -> tuple[Metrics, list[Scored]]:
        """Metrics ``evaluation/<reward>/...`` and the scored samples of the averaged weights.

        The pool is left with the averaged weights: the caller loads what it wants next.
        """
        pool.load(learner.publish(step, averaged=True))
        groups = groups_for(
            self.prompts, seed=self.seed, step=EVALUATION_STEP, count=self.samples, size=1
        )
        plans = [
            self.algorithm.evaluation_plan(
                self.steps, self.gap_orders if i < self.gap_samples else 0
            )
            for i in range(len(groups))
        ]
        scored = scorer.score(pool.generate(groups, plans), held_out=True)
        metrics: Metrics = {}
        for name in scored[0].scores:
            values = np.concatenate([group.scores[name].values for group in scored])
            values = values[np.isfinite(values)]
            if len(values):
                metrics[f"evaluation/{name}/mean"] = float(values.mean())
                metrics[f"evaluation/{name}/std"] = float(values.std())
        described = scorer.describe([group.sample for group in scored])
        metrics |= {f"evaluation/{name}": value for name, value in described.items()}
        samples = [group.sample for group in scored]
        metrics |= length_metrics("evaluation", samples)
        for name in sorted({name for sample in samples for name in sample.facts}):
            facts = np.concatenate([s.facts[name] for s in samples if name in s.facts])
            metrics[f"gap/{name}"] = float(facts.mean())
        metrics["work/evaluation_forwards"] = float(sum(g.sample.forwards for g in scored))
        return metrics, scored
