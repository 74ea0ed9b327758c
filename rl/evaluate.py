"""The pinned evaluation: ODE, the same draws every time, averaged weights, held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.contracts import Learner, Metrics, RolloutPool, Scored, Scorer
from rollout.draws import EVALUATION_STEP, Prompt, groups_for
from rollout.flow import FlowPlan


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        prompts: taken in turn until there are ``samples``.
        seed: the run's; evaluation draws are keyed apart from all training draws.
        steps: ODE steps, or None for the rollout's grid.
    """

    prompts: Sequence[Prompt]
    samples: int
    seed: int
    steps: int | None

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
        plans = [FlowPlan(steps=self.steps)] * len(groups)
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
        metrics["work/evaluation_forwards"] = float(sum(g.sample.forwards for g in scored))
        return metrics, scored
