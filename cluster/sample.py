"""Samples of a checkpoint: ``open_checkpoint`` finds and loads, ``draw`` samples, ``write`` makes files.

Draws are those of the pinned evaluation: groups of one at ``EVALUATION_STEP``, prompts in turn, cut into
the jobs that a run cuts them into. The same command gives the same files; a run's checkpoint with the
run's own seed and prompts gives the samples that were evaluated at that step.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cluster import checkpoints
from cluster.checkpoints import Checkpoint, CheckpointError
from cluster.jobs import partition
from cluster.media import VideoFormat, write_media, write_texts
from cluster.trained import STATE_FILE
from cluster.weights import WeightsMismatch, bind, pack
from cluster.workers import sampler_of
from recipes.schema import DistillRecipe, GroupsConfig, PolicyConfig, recipe_type
from recipes.source import load
from rl.catalogue import build_algorithm
from rl.contracts import PlainPlan
from rollout.draws import EVALUATION_STEP, Prompt, groups_for
from rollout.flow import FlowPlan
from rollout.flow_sampler import FlowRollout, FlowSamplerConfig
from rollout.masked import DecodePlan, MaskedRollout, MaskedSamplerConfig
from rollout.policies.base import FlowPolicy, MaskedDiffusionPolicy
from rollout.policies.llada.policy import LladaConfig
from rollout.policies.pipelines import RENOISING
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.z_image import ZImageConfig

logger = logging.getLogger(__name__)

STUDENT = "student:"  # of a distillation's networks, the one that is sampled
Policy = FlowPolicy | MaskedDiffusionPolicy


class SampleError(Exception):
    """What cannot be sampled or written, where, and what to do instead."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        policy: with the weights that are sampled; ``sampler`` of its kind.
        plan: how a sample is drawn unless options say otherwise.
        prompts: loads the prompts that are used where none are given.
        seed: of the draws where none is given.
        label: the checkpoint's directory; ``step``: after which it was written, where known.
        home: where a directory of samples is made by default.
    """

    policy: Policy
    sampler: Any
    plan: PlainPlan
    prompts: Callable[[], Sequence[Prompt]]
    seed: int
    label: Path
    step: int | None
    home: Path


@dataclass(frozen=True)
class Drawn:
    """Samples, a group of one each, with the plan and seed they were drawn by."""

    source: Source
    plan: PlainPlan
    seed: int
    rollouts: list[FlowRollout | MaskedRollout]


def open_checkpoint(path: Path, step: int | None = None) -> Source:
    """Load a run's checkpoint (the newest valid one, or that of ``step``), or a policy directory.

    Raises:
        SampleError: nothing that can be sampled, or damaged.
        RecipeError: the run's recipe is not valid.
    """
    place = Path(os.path.realpath(path))  # not resolve(): it raises where links go in a circle
    if (place / "recipe.yaml").is_file():
        return _of_run(place, _checkpoint(place / "checkpoints", step))
    if step is not None:
        raise SampleError(f"{path} is no run directory: --step chooses among a run's checkpoints")
    run = _run_around(place)
    if run is not None and place.parent == run / "checkpoints":
        return _of_run(run, _verified(place))
    config = _policy_config(place)
    if config is not None:
        return _of_policy(place, config, run or place.parent)
    raise SampleError(
        f"{path} is no checkpoint: give a run directory, RUN/checkpoints/step_000040, or a whole model's "
        "directory (Wan, Z-Image: model_index.json, or transformer/ and conditions.json; LLaDA: config.json)"
    )


def _of_run(run: Path, found: Checkpoint) -> Source:
    """The averaged weights, the rollout's sampler and the evaluation's plan and prompts."""
    recipe = load(run / "recipe.yaml", recipe_type).value
    gpu, place = recipe.workers.gpus > 0, run / "recipe.yaml"
    policy, sampler = _loaded(lambda device: sampler_of(recipe, device), gpu, place)
    if isinstance(recipe, DistillRecipe):
        plan, prefix = recipe.distill.evaluation_plan(recipe.evaluation.steps), STUDENT
    else:
        algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
        plan, prefix = algorithm.evaluation_plan(recipe.evaluation.steps), ""
    _bind_averaged(policy, found, prefix)
    return Source(
        policy=policy,
        sampler=sampler,
        plan=plan,
        prompts=(recipe.evaluation.prompts or recipe.prompts).load,
        seed=recipe.seed,
        label=found.path,
        step=found.step,
        home=run,
    )


def _of_policy(path: Path, config: PolicyConfig, home: Path) -> Source:
    """A model in its library's layout, with its pipeline's sampler or the default of its kind."""
    scheduler = _scheduler(path)
    sampler: Any = MaskedSamplerConfig()
    plan: PlainPlan = DecodePlan(temperature=0.0, exact=True)
    build: Callable[[str], Any] = config.build
    if not isinstance(config, LladaConfig):
        sampler, plan = FlowSamplerConfig(), FlowPlan()
        sigma = scheduler.get("shift_terminal")
        if sigma:  # a student of two steps
            # Of sigma(1/2) = shift / (1 + shift).
            sampler = FlowSamplerConfig(steps=2, shift=sigma / (1 - sigma), sigma_max=1.0)
            plan = FlowPlan(renoise=scheduler["_class_name"] == RENOISING)
            if config.networks == 1:
                build = lambda device: TwoStepPolicy.load(config, device)  # noqa: E731
        elif config.pipeline:
            shift = scheduler.get("flow_shift") or scheduler.get("shift") or 1.0
            sampler = FlowSamplerConfig(steps=50, shift=shift, guidance_scale=5.0, batch_size=1)
    policy: Any = _loaded(build, True, path)
    return Source(
        policy=policy,
        sampler=sampler.build(policy),  # pyright: ignore[reportArgumentType]
        plan=plan,
        prompts=lambda: _vocabulary_prompts(path),
        seed=0,
        label=path,
        step=None,
        home=home,
    )


def _run_around(path: Path) -> Path | None:
    """The run that a checkpoint, or the policy in one, lies in."""
    for parent in path.parents[:3]:
        if (parent / "recipe.yaml").is_file() and (parent / "checkpoints").is_dir():
            return parent
    return None


def _checkpoint(root: Path, step: int | None) -> Checkpoint:
    if step is not None:
        path = root / f"step_{step:06d}"
        if not path.is_dir():
            there = ", ".join(sorted(p.name for p in root.glob("step_*"))) or "none"
            raise SampleError(f"{root} has no checkpoint of step {step}; there are: {there}")
        return _verified(path)
    try:
        found = checkpoints.latest(root, logger.warning)
    except CheckpointError as error:
        raise SampleError(str(error)) from error
    if found is None:
        raise SampleError(f"{root} holds no valid checkpoint: continue the run, or give another")
    return found


def _verified(path: Path) -> Checkpoint:
    try:
        return checkpoints.read(path)
    except CheckpointError as error:
        remedy = "give the run directory for its newest valid checkpoint"
        raise SampleError(f"{error}; {remedy}") from error


def _scheduler(path: Path) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler; empty where there is none."""
    file = path / "scheduler" / "scheduler_config.json"
    return _document(file) if file.is_file() else {}


def _document(file: Path) -> dict[str, Any]:
    """A JSON object of a model's directory.

    Raises:
        SampleError: it is none.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SampleError(f"{file} cannot be read ({error}); copy the model again") from error
    if not isinstance(found, dict):
        raise SampleError(f"{file} holds no JSON object; copy the model again")
    return found


def _policy_config(path: Path) -> PolicyConfig | None:
    """What a directory in a stock layout holds."""
    if all((path / part).is_file() for part in ("transformer/config.json", "conditions.json")):
        return WanConfig(checkpoint=str(path))
    index = path / "model_index.json"
    if index.is_file():
        name = _document(index).get("_class_name")
        kinds: dict[str, Any] = {"WanPipeline": WanConfig, "ZImagePipeline": ZImageConfig}
        if name not in kinds:
            raise SampleError(f"{path} is a {name}; there are: {', '.join(kinds)}")
        return kinds[name](checkpoint=str(path))
    file = path / "config.json"
    if not file.is_file():
        return None
    kind = _document(file).get("model_type")
    return LladaConfig(checkpoint=str(path)) if kind == "llada" else None


def _loaded(build: Callable[[str], Any], gpu: bool, place: Path) -> Any:
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    try:
        return build(device)
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise SampleError(f"{place}: its model cannot be loaded, restore it: {error}") from error


def _bind_averaged(policy: Policy, found: Checkpoint, prefix: str) -> None:
    """Put the averaged weights into the policy: the very parameters that train, proved as bound.

    ``prefix``: of their network, where a checkpoint holds several.
    """
    file, suffix = found.path / STATE_FILE, ".ema"
    try:
        with safe_open(str(file), framework="np") as state:
            found_names = [n for n in state.keys() if n.startswith(prefix) and n.endswith(suffix)]  # noqa: SIM118
            names = {n.removeprefix(prefix).removesuffix(suffix): n for n in found_names}
            averaged = {name: state.get_tensor(key) for name, key in names.items()}
        bind(policy.trainable(), pack(averaged, found.step))
    except (OSError, SafetensorError, WeightsMismatch) as error:
        raise SampleError(f"{file}: {error}; was the run's recipe.yaml changed?") from error


def _vocabulary_prompts(path: Path) -> list[Prompt]:
    """A prompt for each combination of a Wan model's words."""
    file = path / "conditions.json"
    if not file.is_file():
        raise SampleError(f"{path} has no prompts of its own; give --prompt TEXT")
    texts = map(" ".join, itertools.product(*json.loads(file.read_text())["vocabulary"]))
    return [Prompt(text, text, {}) for text in texts]


def draw(
    source: Source,
    prompts: Sequence[str] = (),
    *,
    count: int = 16,
    seed: int | None = None,
    steps: int | None = None,
    temperature: float | None = None,
) -> Drawn:
    """``count`` samples, prompts in turn.

    Args:
        prompts: texts; without any the source's own.
        seed, steps: None: the source's.
        temperature: of text; None: the source's, which is 0.

    Raises:
        SampleError: an option that does not fit the policy, or a prompt that it cannot take.
    """
    plan = _plan(source, steps, temperature)
    used = seed if seed is not None else source.seed
    try:
        chosen = [Prompt(text, text, {}) for text in prompts] or source.prompts()
        groups = groups_for(chosen, seed=used, step=EVALUATION_STEP, count=count, size=1)
        source.policy.encode([group.prompt for group in groups[: len(chosen)]])
    except ValueError as error:
        raise SampleError(f"{source.label}: {error}; or give other prompts by --prompt") from error
    rollouts: list[FlowRollout | MaskedRollout] = []
    for job in partition(groups, source.sampler.config.batch_size):
        rollouts += source.sampler.sample(groups[job], [plan] * len(groups[job]))
    return Drawn(source, plan, used, rollouts)


def _plan(source: Source, steps: int | None, temperature: float | None) -> PlainPlan:
    plan, config = source.plan, source.sampler.config
    if steps is not None:
        text = isinstance(config, MaskedSamplerConfig)
        if text and (steps % config.blocks or steps > config.length):
            limits = f"a multiple of {config.blocks} (its blocks), at most {config.length}"
            raise SampleError(f"--steps {steps} does not fit the sampler: give {limits}")
        plan = replace(plan, steps=steps)
    if temperature is not None:
        if not isinstance(plan, DecodePlan):
            raise SampleError("--temperature is for text; leave it out for images and videos")
        plan = replace(plan, temperature=temperature)
    return plan


def check_output(directory: Path | None, video: VideoFormat) -> None:
    """Refuse what could not be written, before anything is drawn.

    Raises:
        SampleError: ``directory`` holds something already, or a video writer is not installed.
    """
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise SampleError(f"{directory} is not empty; give --out a new directory")
    if directory is not None and directory.is_file():
        raise SampleError(f"{directory} is a file; give --out a new directory")
    if video == "mp4" and importlib.util.find_spec("av") is None:
        raise SampleError("--format mp4 needs the package 'av': pip install av, or take gif")


def write(drawn: Drawn, directory: Path | None, video: VideoFormat = "mp4") -> Path:
    """Write the samples and ``samples.json``; returns the directory.

    Args:
        directory: new or empty; None: ``samples``, or ``samples-2`` ... where that is taken.
        video: what clips become.

    Raises:
        SampleError: the directory cannot be made or used.
    """
    check_output(directory, video)
    directory = _new_directory(drawn.source.home, directory)
    groups = [rollout.group for rollout in drawn.rollouts]
    if isinstance(drawn.source.policy, MaskedDiffusionPolicy):
        files = ["completions.jsonl"] * len(groups)
        rows = [
            {"prompt": group.prompt, "completion": rollout.media[0], "seed": group.seed}
            for group, rollout in zip(groups, drawn.rollouts, strict=True)
        ]
        write_texts(directory / "completions.jsonl", rows)
    else:
        media = np.concatenate([np.asarray(rollout.media) for rollout in drawn.rollouts])
        files = write_media(directory, media, [group.prompt for group in groups], video)
    document = {
        "checkpoint": str(drawn.source.label),
        "step": drawn.source.step,
        "seed": drawn.seed,
        "sampler": _settings(drawn.source, drawn.plan),
        "samples": [
            {"prompt": group.prompt, "seed": group.seed, "file": file}
            for group, file in zip(groups, files, strict=True)
        ],
    }
    (directory / "samples.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return directory


def _new_directory(home: Path, directory: Path | None) -> Path:
    names = itertools.chain(["samples"], (f"samples-{number}" for number in itertools.count(2)))
    path = directory or next(home / name for name in names if not (home / name).exists())
    try:
        path.mkdir(parents=True, exist_ok=directory is not None)
    except OSError as error:
        raise SampleError(f"{path} cannot be made: {error}; give --out another one") from error
    return path


def _settings(source: Source, plan: PlainPlan) -> dict[str, Any]:
    """The sampler's options as they were used."""
    changed: dict[str, Any] = {"steps": plan.steps}
    used = source.sampler.config.model_dump(mode="json", exclude=set(GroupsConfig.model_fields))
    if isinstance(plan, DecodePlan):
        changed["temperature"] = plan.temperature
        used |= {"cache": "none", "threshold": None} if plan.exact else {}
    return used | {name: value for name, value in changed.items() if value is not None}
