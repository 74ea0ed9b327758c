"""``rectify compare``: a policy, its inference-time alternatives at budgets, and what training made of it.

Every point draws the pinned evaluation samples of the recipe: same prompts, same seeds, same held-out
rewards. Plain sampling of the untrained policy is the base; a method tilts its samples; a checkpoint is
sampled plainly, and under NTRK where that is among the methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.evaluate import evaluation_of
from cluster.local import LocalRolloutPool, LocalScorer
from cluster.measured import MeasureError
from cluster.opened import OpenedPool
from cluster.ray_cluster import connected
from cluster.reward_actors import RayScorer
from cluster.rollout_pool import RayRolloutPool
from cluster.sample import Source, open_checkpoint
from cluster.tracking import MetricsFile
from cluster.weights import pack, to_arrays
from recipes.check_comparison import gradient_of
from recipes.comparison import budgets_of
from recipes.schema import Recipe
from rl.contracts import AnyMethod, GuidancePlan, Plan, Scored
from rollout.guidance.contract import COUNTED
from rollout.guidance.gradient import NTRK
from rollout.guidance.sampler import check_method
from rollout.guidance.text import TextBestOfN, TextSMC, completion_evaluations
from rollout.masked import MaskedSamplerConfig
from rollout.policies.base import forwards_per_sample

logger = logging.getLogger(__name__)

BASE, PLAIN = "base", "plain"
PREFIX = "evaluation"


@dataclass(frozen=True)
class Point:
    """One cell of the comparison: a policy under a method at a budget, for one seed.

    Attributes:
        policy: ``base`` or the checkpoint's label; method: ``plain`` or the method's kind.
        budget: network evaluations allowed a sample; what a plain sample takes, where plain.
        reward: mean of what methods follow, over samples.
        work: means a sample of ``COUNTED``, with ``equivalents`` = forwards + 2 backwards.
        seconds: of a worker, a sample.
        metrics: everything else that was measured, as an evaluation names it.
    """

    policy: str
    method: str
    budget: int
    seed: int
    reward: float
    work: dict[str, float]
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Trained:
    """A checkpoint: its label, the work and seconds of training up to it (None: not known)."""

    label: str
    source: Source
    equivalents: float | None
    seconds: float | None


@dataclass(frozen=True)
class Parts:
    """What draws and scores: the recipe's pool and scorer."""

    pool: Any
    scorer: Any


def opened(paths: Sequence[Path], recipe: Recipe) -> list[Trained]:
    """The checkpoints, with what they cost.

    Raises:
        SampleError: a path that holds no checkpoint.
        MeasureError: one that cannot draw what the recipe asks for.
    """
    found: list[Trained] = []
    prompts = [p.text for p in evaluation_of(recipe).prompts]
    for path in paths:
        source = open_checkpoint(path)
        try:
            source.policy.encode(prompts)
        except ValueError as error:
            raise MeasureError(f"{path}: {error}; compare it by a recipe of its kind") from error
        run = source.home if (source.home / "metrics.jsonl").is_file() else None
        rows = MetricsFile(run / "metrics.jsonl").read() if run else []
        spent = [r for r in rows if r["kind"] == "train" and r["step"] <= (source.step or 0)]
        costs = spent[-1] if spent else {}
        known = "cost/forwards" in costs
        label = source.home.name if run else path.name
        if source.step is not None:
            label += f" step {source.step}"
        if label in {one.label for one in found} | {BASE}:
            label = str(path)
        equivalents = costs["cost/forwards"] + 2 * costs["cost/backwards"] if known else None
        found.append(Trained(label, source, equivalents, costs.get("cost/seconds")))
    return found


@contextmanager
def on_ray(recipe: Recipe, log_dir: Path) -> Generator[Parts]:
    """Rollout and reward actors of the recipe, without a learner."""
    alone = recipe.model_copy(
        update={
            "learner": recipe.learner.model_copy(update={"ranks": 1}),
            "cluster": recipe.cluster.model_copy(update={"colocated": True}),
        }
    )
    with connected(alone) as placement:
        scorer = RayScorer(alone, str(log_dir))
        scorer.start()
        served = scorer.remote_scores() if recipe.comparison.served else None
        pool = RayRolloutPool(alone, placement, str(log_dir), served)
        pool.start()
        with closing(pool):
            yield Parts(pool, scorer)


def in_process(recipe: Recipe) -> Parts:
    """The same in this process."""
    return Parts(LocalRolloutPool(recipe), LocalScorer(recipe))


def measure(
    recipe: Recipe,
    parts: Parts,
    trained: Sequence[Trained] = (),
    tell: Callable[[str], object] = logger.info,
) -> list[Point]:
    """All points of a recipe's comparison, base first.

    Raises:
        RewardFailed: a reward fails too often. ClusterError: actors are lost for good.
    """
    base: Any = recipe.policy.build(seed=recipe.seed)
    untrained = pack(to_arrays(base.trainable()), 0)
    points: list[Point] = []
    for seed in range(recipe.seed, recipe.seed + recipe.comparison.seeds):
        cells = Cells(recipe, parts.scorer, seed, tell)
        parts.pool.load(untrained)
        points.append(cells.plain(parts.pool, BASE))
        points += cells.guided(parts.pool, BASE, recipe.comparison.methods)
        for one in trained:
            same = _same_network(one.source, base)
            pool = parts.pool if same else OpenedPool(one.source)
            if same:
                pool.load(pack(to_arrays(one.source.policy.trainable()), 1))
            points.append(cells.plain(pool, one.label, one.source.plan))
            if same:
                leaning = [m for m in recipe.comparison.methods if isinstance(m, NTRK)]
                points += cells.guided(pool, one.label, leaning)
    return points


def settled(recipe: Recipe, budgets: Sequence[int], samples: int | None) -> Recipe:
    """The recipe with its comparison written out.

    Args:
        recipe: of default methods, those that its reward allows stay.
        budgets, samples: instead of the comparison's own, where there are any.
    """
    methods: list[AnyMethod] = list(recipe.comparison.methods)
    if recipe.compare is None and not gradient_of(recipe):
        methods = [m for m in methods if not getattr(type(m), "differentiable", False)]
    asked = {"methods": tuple(methods), "budgets": tuple(budgets), "samples": samples}
    changed = {name: value for name, value in asked.items() if value}
    return recipe.model_copy(update={"compare": recipe.comparison.model_copy(update=changed)})


def plain_evaluations(recipe: Recipe) -> int:
    """Network evaluations of a plain sample, as methods draw it."""
    rollout = recipe.rollout
    if isinstance(rollout, MaskedSamplerConfig):
        return completion_evaluations(rollout)
    return rollout.steps * forwards_per_sample(rollout.guidance_scale)


class Cells:
    """The points of one seed."""

    def __init__(
        self,
        recipe: Recipe,
        scorer: Any,
        seed: int,
        tell: Callable[[str], object] = logger.info,
    ) -> None:
        self.recipe, self.scorer, self.tell = recipe, scorer, tell
        samples = recipe.comparison.samples or recipe.evaluation.samples
        self.evaluation = replace(evaluation_of(recipe), seed=seed, samples=samples)

    def plain(self, pool: Any, policy: str, plan: Plan | None = None) -> Point:
        """Without guidance, by ``plan`` or the recipe's evaluation."""
        evaluation = self.evaluation
        own = evaluation.algorithm.evaluation_plan(evaluation.steps)
        return self._point(pool, policy, PLAIN, plan or own)

    def guided(self, pool: Any, policy: str, methods: Sequence[AnyMethod]) -> list[Point]:
        """Every method at every budget; budgets that make the same of a method are one point."""
        recipe = self.recipe
        plain = plain_evaluations(recipe)
        points: list[Point] = []
        for method in methods:
            done: set[str] = set()
            for budget in budgets_of(recipe.comparison, plain):
                sized = self._sized(method, budget)
                if sized.model_dump_json() not in done:
                    done.add(sized.model_dump_json())
                    plan = GuidancePlan(sized)
                    points.append(self._point(pool, policy, method.kind, plan, budget))
        return points

    def _sized(self, method: AnyMethod, budget: int) -> AnyMethod:
        rollout = self.recipe.rollout
        if isinstance(method, TextBestOfN | TextSMC):
            assert isinstance(rollout, MaskedSamplerConfig)
            return method.at_budget(budget, method.evaluations(rollout))
        check_method(method, gradient_of(self.recipe))
        return method.at_budget(
            budget // forwards_per_sample(rollout.guidance_scale), rollout.steps
        )

    def _point(
        self, pool: Any, policy: str, method: str, plan: Plan, budget: int | None = None
    ) -> Point:
        """Draw, score and describe."""
        self.tell(f"{policy}: {method}" + (f" at {budget}" if budget else ""))
        metrics, scored = self.evaluation.measure(pool, self.scorer, plan, PREFIX)
        forwards = metrics.pop("work/evaluation_forwards") / len(scored)
        work = {name: metrics.pop(f"work/{name}", 0.0) for name in COUNTED} | {"forwards": forwards}
        work["equivalents"] = forwards + 2 * work["backwards"]
        return Point(
            policy=policy,
            method=method,
            budget=budget if budget is not None else round(forwards),
            seed=self.evaluation.seed,
            reward=followed(self.recipe, scored),
            work=work,
            seconds=sum(group.sample.seconds for group in scored) / len(scored),
            metrics=metrics,
        )


def followed(recipe: Recipe, scored: Sequence[Scored]) -> float:
    """The mean of the reward that methods follow, over samples that have it."""
    wanted = recipe.comparison.reward
    total = np.zeros(sum(group.sample.group.size for group in scored))
    for config in recipe.rewards:
        name = config.name or config.kind
        if wanted in (None, name) and config.weight != 0:
            total += config.weight * np.concatenate([g.scores[name].values for g in scored])
    return float(np.nanmean(total))


def _same_network(source: Source, base: Any) -> bool:
    """Whether only trained weights part a checkpoint from the recipe's policy, so that its workers take
    them: the same parameters, and what is frozen (the base of an adapter) the same numbers."""
    own = dict(base.module.named_parameters())
    theirs = dict(source.policy.module.named_parameters())
    if own.keys() != theirs.keys() or base.trainable().keys() != source.policy.trainable().keys():
        return False
    trained = base.trainable()
    return all(
        p.shape == theirs[name].shape
        and (name in trained or torch.equal(p.cpu(), theirs[name].cpu()))
        for name, p in own.items()
    )
