"""``rectify evaluate``: any checkpoints by one recipe's evaluation, in this process.

Prompts, number of samples, seed, rewards, held-out rewards and their set metrics are the recipe's; weights
(averaged), sampler and plan are the checkpoint's own, as ``open_checkpoint`` finds them. The draws are
the pinned ones, so a run's checkpoint under the run's own recipe gives the very ``evaluation/...`` and
``gap/...`` that the run logged at that step (bits may depend on threads). ``evaluation.steps`` of the recipe
is for checkpoints of runs with its policy and sampler; others, like two-step students, keep their own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from cluster import checkpoints
from cluster.curves import Curve, write
from cluster.local import LocalScorer
from cluster.measured import Measured, MeasureError, Table, number, output_directory
from cluster.opened import OpenedPool
from cluster.sample import SampleError, open_checkpoint
from recipes.schema import AnyRecipe, DistillRecipe, GroupsConfig, PolicyConfig, recipe_type
from recipes.source import load
from rewards.calling import RewardFailed
from rl.catalogue import build_algorithm
from rl.contracts import Metrics, Plan
from rl.evaluate import Evaluation, Plans
from rollout.masked import DecodePlan
from rollout.policies.base import FlowPolicy, MaskedDiffusionPolicy
from rollout.policies.llada.policy import LladaConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint to evaluate: its directory, and the recipe of the run that wrote it."""

    path: Path
    recipe: AnyRecipe | None


@dataclass(frozen=True)
class Row:
    """An evaluated checkpoint.

    Attributes:
        run: whose it is: a line of the figure. step: None of a policy directory.
        nfe: network evaluations per sample. seconds: of sampling and scoring. metrics: finite ones.
        samples: that were drawn and scored. sampler: settings and plan they were drawn by.
    """

    path: Path
    run: str
    step: int | None
    nfe: float
    seconds: float
    samples: int
    sampler: dict[str, Any]
    metrics: Metrics

    @property
    def label(self) -> str:
        """Run and step."""
        return self.run if self.step is None else f"{self.run} step {self.step}"


def evaluate_checkpoints(
    paths: Sequence[Path],
    recipe: AnyRecipe,
    steps: Sequence[int] = (),
    out: Path | None = None,
    tell: Callable[[str], object] = logger.info,
) -> Measured:
    """Write ``evaluation.json``, ``evaluation.csv``, ``evaluation.png`` and ``evaluation.html``.

    Args:
        paths: run directories, RUN/checkpoints/step_000040, or whole policies. recipe: checked.
        steps: of runs these checkpoints only; default all valid ones.
        out: a new or empty directory; None: ``evaluation``, or ``evaluation-2`` ... here.
        tell: is told what goes on.

    Raises:
        MeasureError: what cannot be found, loaded or sampled; media that the recipe is not for;
            a reward that fails; ``out`` is taken. Nothing was written then.
        RecipeError: a run's recipe is not valid.
    """
    directory = output_directory("evaluation", out)
    found, notes = find_checkpoints(paths, steps)
    if not (recipe.rewards or recipe.evaluation.rewards):
        raise MeasureError(f"{recipe.name} has no rewards; name some in evaluation.rewards")
    for one in found:
        if one.recipe is not None:
            _check(one.path, _medium(one.recipe.policy, one.path), recipe)
    try:
        evaluation, scorer = evaluation_of(recipe), LocalScorer(recipe)
    except RewardFailed as error:
        raise MeasureError(str(error)) from error
    rows: list[Row] = []
    for checkpoint, name in zip(found, _names(found), strict=True):
        tell(f"evaluating {checkpoint.path} ({len(rows) + 1} of {len(found)})")
        rows.append(_evaluated(checkpoint, name, recipe, evaluation, scorer))
        missing = evaluation.samples - rows[-1].samples
        if missing:
            notes.append(f"{rows[-1].label}: {missing} samples could not be drawn")
    return _write(directory, rows, recipe, notes)


def find_checkpoints(
    paths: Sequence[Path], steps: Sequence[int] = ()
) -> tuple[list[Found], list[str]]:
    """Checkpoints behind ``paths``, each once, and what was passed over.

    Raises:
        MeasureError: nothing valid in one of them, or a step that is not there.
        RecipeError: a run's recipe is not valid.
    """
    found: dict[Path, Found] = {}
    notes: list[str] = []
    for path in paths:
        place = Path(os.path.realpath(path))
        root = place / "checkpoints"
        if (place / "recipe.yaml").is_file():
            wanted = _steps_of(path, root, steps, notes)
        elif steps:
            raise MeasureError(f"{path} is no run directory: --step chooses among a run's")
        elif place.is_dir():
            root, wanted = place.parent, [place]
            problem = checkpoints.verify(place) if root.name == "checkpoints" else None
            if problem is not None:
                raise MeasureError(f"{path} is damaged: {problem}; give another")
        else:
            raise MeasureError(f"{path} is no directory; give a run, a checkpoint or a policy")
        of_run = root.name == "checkpoints" and (root.parent / "recipe.yaml").is_file()
        recipe = load(root.parent / "recipe.yaml", recipe_type).value if of_run else None
        found |= {one: Found(one, recipe) for one in wanted if one not in found}
    return list(found.values()), notes


def _steps_of(run: Path, root: Path, steps: Sequence[int], notes: list[str]) -> list[Path]:
    """The valid checkpoints of a run, or those asked for."""
    there = [root / checkpoints.name_of(step) for step in checkpoints.steps_in(root)]
    asked = [root / f"step_{step:06d}" for step in sorted(set(steps))] or there
    for path in asked:
        if path not in there:
            names = ", ".join(p.name for p in there) or "none"
            raise MeasureError(f"{run} has no checkpoint {path.name}; there are: {names}")
    problems = {path: checkpoints.verify(path) for path in asked}
    damaged = [f"{path} is damaged: {why}" for path, why in problems.items() if why is not None]
    valid = [path for path, why in problems.items() if why is None]
    if not valid or (steps and damaged):
        what = "; ".join(damaged) or f"{root} holds no checkpoint"
        raise MeasureError(f"{what}; give other steps, or continue the run")
    notes += [f"passed over: {message}" for message in damaged]
    return valid


def _check(path: Path, made: str, recipe: AnyRecipe) -> None:
    judged = _medium(recipe.policy, recipe.name)
    if made != judged:
        what = f"{path} makes {made}, and recipe {recipe.name} evaluates {judged}"
        raise MeasureError(f"{what}; give a recipe for {made}")


def _medium(policy: PolicyConfig, place: object) -> str:
    """What a policy makes, before it is built."""
    if isinstance(policy, LladaConfig):
        return "text"
    try:
        frames = policy.latent()[1]
    except (ValueError, OSError) as error:
        raise MeasureError(f"{place}: its model cannot be read, restore it: {error}") from error
    return "videos" if frames > 1 else "images"


def _made(policy: FlowPolicy | MaskedDiffusionPolicy) -> str:
    if isinstance(policy, MaskedDiffusionPolicy):
        return "text"
    return "videos" if policy.latent_shape[1] > 1 else "images"


def evaluation_of(recipe: AnyRecipe) -> Evaluation:
    """What a run of ``recipe`` evaluates."""
    part = recipe.evaluation
    if isinstance(recipe, DistillRecipe):
        plans: Plans = recipe.distill
    else:
        plans = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
    return Evaluation(
        algorithm=plans,
        prompts=(part.prompts or recipe.prompts).load(),
        samples=part.samples,
        seed=recipe.seed,
        steps=part.steps,
        gap_samples=part.gap.samples if part.gap is not None else 0,
        gap_orders=part.gap.orders if part.gap is not None else 0,
    )


def _evaluated(
    found: Found, name: str, recipe: AnyRecipe, evaluation: Evaluation, scorer: LocalScorer
) -> Row:
    try:
        source = open_checkpoint(found.path)
    except SampleError as error:
        raise MeasureError(str(error)) from error
    _check(found.path, _made(source.policy), recipe)
    try:
        source.policy.encode([prompt.text for prompt in evaluation.prompts[: evaluation.samples]])
    except ValueError as error:
        message = f"{found.path}: {error}; give a recipe whose evaluation.prompts it can take"
        raise MeasureError(message) from error
    plan = source.plan
    if found.recipe is not None and _sampling(found.recipe) == _sampling(recipe):
        plan = evaluation.algorithm.evaluation_plan(evaluation.steps)
    gap: Plan = (
        replace(plan, orders=evaluation.gap_orders) if isinstance(plan, DecodePlan) else plan
    )
    started = perf_counter()
    try:
        metrics, scored = evaluation.measure(OpenedPool(source), scorer, plan, "evaluation", gap)
    except RewardFailed as error:
        message = f"{found.path}: {error}; give a recipe whose rewards take what it makes"
        raise MeasureError(message) from error
    return Row(
        path=found.path,
        run=name,
        step=source.step,
        nfe=metrics.pop("work/evaluation_forwards") / len(scored),
        seconds=perf_counter() - started,
        samples=len(scored),
        sampler={**source.sampler.config.model_dump(mode="json"), "plan": asdict(plan)},
        metrics={key: value for key, value in metrics.items() if np.isfinite(value)},
    )


def _sampling(recipe: AnyRecipe) -> dict[str, Any]:
    """What decides how a recipe's policy is sampled."""
    groups = {*GroupsConfig.model_fields, "store", "groups_per_shard"}
    return recipe.model_dump(include={"policy", "rollout", "distill"}, exclude={"rollout": groups})


def _names(found: Sequence[Found]) -> list[str]:
    """A name for each checkpoint's run: its directory's, or all of the path where two are alike."""
    homes = [one.path if one.recipe is None else one.path.parents[1] for one in found]
    alike = [home for home in set(homes) if any(home.name == o.name for o in set(homes) - {home})]
    return [str(home) if home in alike else home.name for home in homes]


def _write(directory: Path, rows: Sequence[Row], recipe: AnyRecipe, notes: list[str]) -> Measured:
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
    csv: list[list[Any]] = [["label", "step", "nfe_per_sample", "seconds", *keys]]
    csv += [
        [row.label, row.step, row.nfe, row.seconds, *[row.metrics.get(key) for key in keys]]
        for row in rows
    ]
    curves = [c for key in keys if key.endswith(("/mean", "/frechet")) for c in _curves(rows, key)]
    few = [key for key in keys if not key.endswith("/std") and "/recall/" not in key]
    head = ["checkpoint", "nfe", "s", *[key.removeprefix("evaluation/") for key in few]]
    numbers = [[row.nfe, row.seconds, *map(row.metrics.get, few)] for row in rows]
    lines = [[row.label, *map(number, own)] for row, own in zip(rows, numbers, strict=True)]
    shown = Table(f"Evaluation of {recipe.name}", head, lines)
    described = recipe.model_dump(mode="json", include={"name", "seed", "prompts", "rewards"})
    described["evaluation"] = recipe.evaluation.model_dump(mode="json")
    each = [asdict(row) | {"label": row.label, "path": str(row.path)} for row in rows]
    document = json.dumps({"recipe": described, "checkpoints": each, "notes": notes}, indent=1)
    return write(directory, "evaluation", csv, curves, [shown], notes, json=document.encode())


def _curves(rows: Sequence[Row], key: str) -> list[Curve]:
    """A curve for each run over its steps; a level for what has no step."""
    curves: list[Curve] = []
    for run in dict.fromkeys(row.run for row in rows):
        own = [row for row in rows if row.run == run and key in row.metrics]
        own.sort(key=lambda row: row.step or 0)
        if own:
            values = np.array([row.metrics[key] for row in own])
            at = {} if own[0].step is None else {"step": np.array([row.step for row in own])}
            curves.append(Curve(run, key, 1, at, values, values * np.nan, values * np.nan))
    return curves
