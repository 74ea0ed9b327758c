"""Starting a run: directory, cluster, actors, proofs, the loop; and going on after a loss."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import yaml
from ray.exceptions import ObjectLostError
from rich.console import Console

from cluster import checkpoints
from cluster.checkpoints import Checkpoint, CheckpointError
from cluster.disk import writing
from cluster.learner_group import LearnerLost, RayLearner
from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
from cluster.lock import locked
from cluster.logs import log_to
from cluster.progress import Progress
from cluster.ray_cluster import TIMEOUT, ClusterError, Placement, connected
from cluster.report import write_report
from cluster.reward_actors import RayScorer
from cluster.rollout_pool import RayRolloutPool
from cluster.run import RunDirectory, data_digest, describe, new_directory
from cluster.storage import Storage, fetch_newer, proved
from cluster.teacher_store import source_of
from cluster.tracking import MetricsFile, open_trackers
from cluster.weights import read_weights
from distill.catalogue import teacher_plan
from distill.train import Distiller
from distill.two_step import TwoStepConfig
from recipes.schema import AnyRecipe, DistillRecipe, Recipe
from rl.ahead import ScheduleConfig
from rl.catalogue import build_algorithm
from rl.contracts import RolloutPool, Scorer
from rl.evaluate import Evaluation
from rl.train import Schedule, Trainer
from rollout.draws import EVALUATION_STEP, groups_for

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: where and how long, never what is computed.
FREE = ("steps", "learner", "workers", "cluster", "checkpoints", "tracking", "run_dir", "name")


# The published weights of the step before a checkpoint.
OLDER = "older.safetensors"
FETCH_SECONDS = 600.0

Read = TypeVar("Read")


class ResumeError(ValueError):
    """A run that cannot be continued as asked."""


def run(
    recipe: AnyRecipe, console: Console, resume: Path | None = None, changed: bool = False
) -> Path:
    """Run a recipe on Ray, or continue ``resume``; returns the run directory, report written.

    Args:
        recipe: checked. console: for progress. resume: a run directory.
        changed: continue although the recipe or its data changed.

    Raises:
        ResumeError: nothing to continue, or something else than was begun.
        StorageError: the recipe's storage cannot be used. RunLocked: another process has the run.
        DiskFull: of the run directory.
    """
    if resume is not None:
        check_resume(resume, recipe, changed)
    storage = proved(recipe)
    console.print(f"preparing {recipe.policy.checkpoint}", highlight=False)
    recipe.policy.prepare()
    path = resume or new_directory(recipe, storage.names() if storage else ())
    with writing(path, path), locked(path):
        return _attempt(recipe, console, path, resume is None, storage)


def _attempt(
    recipe: AnyRecipe, console: Console, path: Path, new: bool, storage: Storage | None
) -> Path:
    if new:
        describe(path, recipe, recipe.prompts.load())
    if storage is not None:
        storage.describe(path)
        fetch_newer(storage, path.name, path, partial(console.print, highlight=False))
    found = checkpoints.latest(path / "checkpoints")
    attempt = len(list((path / "logs").glob("attempt-*"))) + 1
    log_dir = (path / "logs" / f"attempt-{attempt}").resolve()
    log_to(str(log_dir / "driver.log"))
    done = found.step if found else 0
    with Progress(recipe.steps, done, console) as progress:
        trackers = open_trackers(recipe.tracking, path)
        directory = RunDirectory(recipe, path, trackers, progress, _fetch)
        try:
            progress.message(f"starting Ray ({recipe.cluster.address}); run directory {path}")
            with connected(recipe) as placement:
                # Here, because ray.init puts a handler of its own in place of an earlier one.
                directory.stop_on_signals()
                _on_ray(recipe, directory, placement, str(log_dir))
        finally:
            directory.close()
    write_report(path)
    return path


def _on_ray(recipe: AnyRecipe, directory: RunDirectory, placement: Placement, log_dir: str) -> None:
    """Actors up one kind after another (loading all at once spikes memory), then train."""
    timeline = directory.timeline
    pool = RayRolloutPool(recipe, placement, log_dir, timeline=timeline)
    pool.start()
    scorer = RayScorer(recipe, log_dir, timeline)
    scorer.start()
    with contextlib.closing(pool):
        for attempt in range(recipe.cluster.max_restarts + 1):
            learner = RayLearner(recipe, placement, log_dir, timeline, attempt)
            try:
                learner.start()
                _train(recipe, directory, pool, scorer, learner)
                learner.stop()
                return
            except (LearnerLost, ObjectLostError) as error:
                learner.stop(lost=True)
                lost = "samples" if isinstance(error, ObjectLostError) else "learner"
                why = str(error).splitlines()[0]
                if attempt == recipe.cluster.max_restarts:
                    raise LearnerLost(f"{lost} lost too often: {why}") from error
                logger.warning("%s lost: %s", lost, error)
                directory.progress.message(
                    f"{lost} lost ({why}); going back to the last checkpoint"
                )


def run_locally(recipe: AnyRecipe, path: Path, console: Console) -> RunDirectory:
    """The same run in this process without Ray or DeepSpeed, in ``path``; continues what is there."""
    path.mkdir(parents=True, exist_ok=True)
    recipe.policy.prepare()
    with Progress(recipe.steps, 0, console) as progress:
        directory = RunDirectory(recipe, path, [], progress, _fetch)
        _train(
            recipe, directory, LocalRolloutPool(recipe), LocalScorer(recipe), LocalLearner(recipe)
        )
        directory.close()
    return directory


def _train(
    recipe: AnyRecipe,
    directory: RunDirectory,
    pool: RolloutPool,
    scorer: Scorer,
    learner: RayLearner | LocalLearner,
) -> None:
    found = checkpoints.latest(directory.path / "checkpoints", directory.warn)
    directory.resume_from(found)
    if found is not None:
        learner.restore(found.path)
        directory.progress.message(f"continuing after step {found.step}")
    directory.save = learner.save
    step = found.step if found else 0
    build = build_distiller if isinstance(recipe, DistillRecipe) else build_trainer
    parts: Any = (directory, pool, scorer, learner, step)
    trainer = build(recipe, *parts)  # pyright: ignore[reportArgumentType]
    if isinstance(trainer, Trainer) and trainer.schedule.overlap.mode == "one_step_ahead":
        _keep_older(trainer, directory, learner, found)
    pool.load(learner.publish(trainer.step))
    prove_rewards(trainer)
    trainer.train()


def _keep_older(
    trainer: Trainer,
    directory: RunDirectory,
    learner: RayLearner | LocalLearner,
    found: Checkpoint | None,
) -> None:
    """A checkpoint has the weights of the step before too: the set that comes next is theirs."""

    def save(path: Path) -> None:
        learner.save(path)
        _fetch(trainer.before.data).tofile(path / OLDER)

    directory.save = save
    if found is not None and (found.path / OLDER).exists():
        trainer.before = read_weights(found.path / OLDER, found.step - 1)


def schedule_of(recipe: AnyRecipe) -> Schedule:
    """The numbers of a recipe that its loop needs."""
    return Schedule(
        seed=recipe.seed,
        steps=recipe.steps,
        prompts_per_step=recipe.rollout.prompts_per_step,
        group_size=recipe.rollout.group_size,
        evaluate_every=recipe.evaluation.every,
        checkpoint_every=recipe.checkpoints.every,
        weights={config.name or config.kind: config.weight for config in recipe.rewards},
        dtype=recipe.policy.dtype,
        overlap=recipe.schedule if isinstance(recipe, Recipe) else ScheduleConfig(),
    )


def build_trainer(
    recipe: Recipe,
    directory: RunDirectory,
    pool: RolloutPool,
    scorer: Scorer,
    learner: RayLearner | LocalLearner,
    step: int,
) -> Trainer:
    """The loop of a recipe over its parts."""
    prompts = recipe.prompts.load()
    rollout, evaluation = recipe.rollout, recipe.evaluation
    algorithm = build_algorithm(recipe.rl, rollout, recipe.seed, recipe.schedule.stale)
    held_out = prompts if evaluation.prompts is None else evaluation.prompts.load()
    gap = evaluation.gap
    return Trainer(
        schedule=schedule_of(recipe),
        algorithm=algorithm,
        prompts=prompts,
        pool=pool,
        scorer=scorer,
        learner=learner,
        evaluation=Evaluation(
            algorithm=algorithm,
            prompts=held_out,
            samples=evaluation.samples,
            seed=recipe.seed,
            steps=evaluation.steps,
            gap_samples=gap.samples if gap is not None else 0,
            gap_orders=gap.orders if gap is not None else 0,
        ),
        run=directory,
        step=step,
    )


def build_distiller(
    recipe: DistillRecipe,
    directory: RunDirectory,
    pool: RolloutPool,
    scorer: Scorer,
    learner: RayLearner | LocalLearner,
    step: int,
) -> Distiller:
    """The loop of a distillation over its parts."""
    evaluation = recipe.evaluation
    two_step = isinstance(recipe.distill, TwoStepConfig)
    prompts = recipe.prompts.load()
    held_out = prompts if evaluation.prompts is None else evaluation.prompts.load()
    schedule = schedule_of(recipe)
    source = source_of(recipe, pool, schedule)
    if directory.restored:
        source.restore(directory.restored)
    directory.extra = source.state
    teachers = {"teacher": teacher_plan()}
    if two_step:
        teachers["teacher_2_steps"] = teacher_plan(2)
    return Distiller(
        schedule=schedule,
        student=recipe.distill.evaluation_plan(evaluation.steps),
        teachers=teachers,
        teacher=source,
        pool=pool,
        scorer=scorer,
        learner=learner,
        evaluation=Evaluation(
            algorithm=recipe.distill,
            prompts=held_out,
            samples=evaluation.samples,
            seed=recipe.seed,
            steps=evaluation.steps,
        ),
        run=directory,
        step=step,
        checked=two_step,
        fetch=_fetch,
    )


def prove_rewards(trainer: Trainer | Distiller) -> None:
    """Every reward scores one sample before training starts.

    Raises:
        RewardFailed: one does not, with its own error.
    """
    groups = groups_for(
        trainer.evaluation.prompts,
        seed=trainer.schedule.seed,
        step=EVALUATION_STEP,
        count=1,
        size=1,
    )
    plans = [trainer.evaluation.algorithm.evaluation_plan(None)]
    trainer.scorer.score(trainer.pool.generate(groups, plans), held_out=True)
    trainer.scorer.take_seconds()


def check_resume(path: Path, recipe: AnyRecipe, changed: bool) -> None:
    """Refuse to continue something else than was begun.

    Raises:
        ResumeError: with what differs.
    """
    if not (path / "recipe.yaml").is_file():
        raise ResumeError(f"{path} is no run directory: it has no recipe.yaml")
    begun = _undamaged(path / "recipe.yaml", lambda file: dict(yaml.safe_load(file.read_text())))
    digest = _undamaged(path / "data.sha256", lambda file: file.read_text().strip())
    logged = _undamaged(path / "metrics.jsonl", lambda file: MetricsFile(file).read())
    found = _valid(path, recipe)
    asked = recipe.model_dump(mode="json")
    # A rate that falls to 0 at the last step is another one where that step is another.
    free = [key for key in FREE if key != "steps" or recipe.optimizer.decay == "none"]
    # A key that is younger than the run is as it was where it has its default.
    defaults = {key: field.get_default() for key, field in type(recipe).model_fields.items()}
    different = [
        key
        for key in asked
        if key not in free
        and (asked[key] != begun[key] if key in begun else getattr(recipe, key) != defaults[key])
    ]
    if digest != data_digest(recipe.prompts.load()):
        different.append("prompts (the data itself)")
    if different and not changed:
        raise ResumeError(
            f"{path} was begun with another {', '.join(different)}; give the recipe it was begun "
            "with, or --changed to continue all the same"
        )
    if found is None and logged and recipe.checkpoints.storage is None:
        logger.warning("%s has no valid checkpoint: it starts from step 0", path)


def _undamaged(file: Path, read: Callable[[Path], Read]) -> Read:
    try:
        return read(file)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ResumeError(f"{file} is damaged: put it back from a copy ({error})") from error


def _valid(path: Path, recipe: AnyRecipe) -> Checkpoint | None:
    """The newest valid checkpoint; where all are damaged, a storage may have others."""
    try:
        return checkpoints.latest(path / "checkpoints")
    except CheckpointError as error:
        if recipe.checkpoints.storage is None:
            raise ResumeError(str(error)) from error
        return None


def _fetch(reference: Any) -> Any:
    if not isinstance(reference, ray.ObjectRef):
        return reference
    try:
        return ray.get(reference, timeout=FETCH_SECONDS)
    except TIMEOUT as error:
        message = f"no node handed over a sample within {FETCH_SECONDS:g} s"
        raise ClusterError(message) from error
