"""``rectify audit``: does a checkpoint memorise? Cyclic denoising (arXiv 2606.24000) of its samples.

``audit`` runs ``rollout.audit`` over an opened checkpoint for each noise level, ``write`` makes files:
audit.json (summary), audit.csv (each sample and cycle), audit.png (fixed-point fraction against
gamma) and cycles-GAMMA.png (samples down, cycles across). The same command gives the same files.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cluster.plots import COLORS, sample_grid
from cluster.sample import SampleError, Source, check_output, draw
from rollout.audit import (
    THRESHOLD,
    Movement,
    cycle,
    gaussian_step,
    movement,
    policy_velocity,
    sigmas_from,
    spread_of,
)
from rollout.draws import keyed_generator, keyed_seed
from rollout.flow import FlowPlan
from rollout.flow_sampler import FlowRollout
from rollout.policies.base import FlowPolicy
from rollout.policies.digits import moving_digits, training_digits, vocabulary
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import EMBEDDED
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DIRECTIONS

GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHOWN = 10  # samples of a grid
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")


@dataclass(frozen=True)
class References:
    """Data to compare with: states (m, C, F, H, W), prompts where they are known, and its name."""

    states: Tensor
    prompts: list[str] | None
    name: str


@dataclass(frozen=True)
class Start:
    """What is cycled: states (n, C, F, H, W), their conditions, noise seeds, and prompts ("": none)."""

    states: Tensor
    condition: Tensor
    seeds: list[int]
    prompts: list[str]


@dataclass(frozen=True)
class Level:
    """One noise level: what moved, and media uint8 (samples, cycles + 1, F, H, W, C) of a few."""

    gamma: float
    moved: Movement
    media: np.ndarray


@dataclass(frozen=True)
class Audited:
    """An audit: levels in ascending order, and how it was made."""

    source: Source
    start: Start
    levels: list[Level]
    settings: dict[str, Any]


def audit(
    source: Source,
    gammas: Sequence[float] = GAMMAS,
    count: int = 16,
    cycles: int = 5,
    references: Path | None = None,
    seed: int | None = None,
    *,
    start: Literal["samples", "references"] = "samples",
    prompts: Sequence[str] = (),
    steps: int | None = None,
) -> Audited:
    """Cycle ``count`` samples through each of ``gammas``.

    Args:
        references: a directory of images or .npy to measure distances to; None: the training images
            of an embedded model, none for others.
        seed, steps: None: the source's; the steps are those of each denoising too.
        start: cycle the source's own samples, or references chosen by the seed (under their own
            prompts, or without a condition where they have none).
        prompts: of samples; without any the source's own.

    Raises:
        SampleError: a policy or options that cannot be audited; references that cannot be read.
    """
    policy, plan = _auditable(source)
    config = source.sampler.config
    levels = sorted(set(gammas))
    used = seed if seed is not None else source.seed
    number = steps or plan.steps or config.steps
    if count < 2:
        raise SampleError("--count 1 has no distance between samples: give at least 2")
    try:
        for gamma in levels:
            sigmas_from(gamma, number, config.shift)
        known = _references(policy, references)
        if start == "samples":
            kept = replace(source, plan=replace(plan, keep_final=True))
            begun = _own_samples(kept, policy, prompts, count, used, steps)
        else:
            begun = _chosen(policy, known, count, used)
        spread_of(begun.states)
    except ValueError as error:
        raise SampleError(f"{source.label}: {error}") from error
    velocity = policy_velocity(policy, begun.condition, config.guidance_scale, config.batch_size)
    run = partial(cycle, cycles=cycles, steps=number, seeds=begun.seeds, shift=config.shift)
    done = [_level(policy, known, g, run(velocity, begun.states, g)) for g in levels]
    settings = {
        "seed": used,
        "start": start,
        "references": known and {"name": known.name, "count": len(known.states)},
        "sampler": {"steps": number, "shift": config.shift, "guidance": config.guidance_scale},
        "cycles": cycles,
        "threshold": THRESHOLD,
        "spread": done[0].moved.spread,
    }
    return Audited(source, begun, done, settings)


def _level(policy: FlowPolicy, known: References | None, gamma: float, states: Tensor) -> Level:
    shown = states[:, :SHOWN].transpose(0, 1)
    media = policy.decode(shown.flatten(0, 1))
    moved = movement(states.cpu(), None if known is None else known.states)
    return Level(gamma, moved, media.reshape(*shown.shape[:2], *media.shape[1:]))


def _auditable(source: Source) -> tuple[FlowPolicy, FlowPlan]:
    policy, plan = source.policy, source.plan
    if not isinstance(policy, FlowPolicy):
        raise SampleError(
            f"{source.label}: text has no continuous noise level to return to; audit an image or "
            "video model"
        )
    if not isinstance(plan, FlowPlan):
        raise SampleError(f"{source.label}: guided samples are not audited; audit the policy alone")
    if isinstance(policy, TwoStepPolicy) or plan.renoise:
        raise SampleError(
            f"{source.label}: a few-step student only knows the noise levels of its steps; audit "
            "its teacher"
        )
    return policy, plan


def _own_samples(
    source: Source,
    policy: FlowPolicy,
    prompts: Sequence[str],
    count: int,
    seed: int,
    steps: int | None,
) -> Start:
    """The samples that ``rectify sample`` draws, before they are rounded to pixels."""
    drawn = draw(source, prompts, count=count, seed=seed, steps=steps)
    rollouts = [rollout for rollout in drawn.rollouts if isinstance(rollout, FlowRollout)]
    states = torch.from_numpy(np.concatenate([r.replay.final for r in rollouts]))
    texts = [rollout.group.prompt for rollout in rollouts]
    seeds = [rollout.group.draw(0).seed for rollout in rollouts]
    return Start(states.to(policy.device), policy.encode(texts), seeds, texts)


def _chosen(policy: FlowPolicy, known: References | None, count: int, seed: int) -> Start:
    if known is None:
        raise ValueError("there are no references to start from; give --references DIRECTORY")
    order = torch.randperm(len(known.states), generator=keyed_generator(seed, "references"))
    rows: list[int] = order[:count].tolist()
    texts = [""] * len(rows) if known.prompts is None else [known.prompts[row] for row in rows]
    condition = policy.encode_null(len(rows)) if known.prompts is None else policy.encode(texts)
    seeds = [keyed_seed(seed, "reference", row) for row in rows]
    return Start(known.states[rows].to(policy.device), condition, seeds, texts)


def _references(policy: FlowPolicy, directory: Path | None) -> References | None:
    if directory is not None:
        return References(_read(policy, directory), None, str(directory))
    for name in EMBEDDED:
        if isinstance(policy, WanPolicy) and _is_embedded(policy, name):
            return _training_images(name)
    return None


def _is_embedded(policy: WanPolicy, name: str) -> bool:
    """Whether it is the embedded model, or was trained on from it: it draws what that draws."""
    shape = (1, 1 if name == "digits" else 4, 8, 8)
    return policy.latent_shape == shape and policy.conditions["vocabulary"] == vocabulary(name)


def _training_images(name: str) -> References:
    images, labels = training_digits()
    if name == "digits":
        clips, prompts = images[:, None], [str(label) for label in labels]
    else:
        ways = range(len(DIRECTIONS))
        moving = [moving_digits(images, np.full(len(images), way)) for way in ways]
        clips = np.concatenate(moving)
        prompts = [f"{label} {way}" for way in DIRECTIONS for label in labels]
    return References(torch.from_numpy(clips)[:, None], prompts, f"training images of {name}")


def _read(policy: FlowPolicy, directory: Path) -> Tensor:
    """States (m, C, F, H, W) of the images and arrays of a directory.

    Raises:
        ValueError: none, unreadable, of another size; or a policy whose states are not pixels.
    """
    files = sorted(p for p in directory.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"--references {directory} holds no {', '.join(SUFFIXES)}")
    channels, *place = policy.latent_shape
    pixels = torch.from_numpy(np.concatenate([_pixels(f, (*place, channels)) for f in files]))
    states = (2 * pixels - 1).permute(0, 4, 1, 2, 3).contiguous()
    back = policy.pixels(states[:1].to(policy.device)).cpu()
    if back.shape != pixels[:1].shape or not torch.allclose(back, pixels[:1], atol=1e-3):
        raise ValueError("--references needs a policy whose latents are pixels: this has a decoder")
    return states


def _pixels(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 (k, F, H, W, C) in [0, 1] of a file, k = 1 unless it is a stack."""
    from PIL import Image

    try:
        if file.suffix.lower() == ".npy":
            array: Any = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as image:
                array = np.asarray(image.convert("L" if shape[-1] == 1 else "RGB"))
            array = array.reshape(1, *array.shape[:2], -1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); replace or remove it") from error
    stack = array if array.ndim == 5 else array[None]
    if stack.shape[1:] != shape:
        raise ValueError(
            f"{file} is {stack.shape[1:]}, not (frames, height, width, channels) {shape}"
        )
    if stack.dtype == np.uint8:
        return stack.astype(np.float32) / 255
    if stack.dtype.kind != "f" or not ((stack >= 0) & (stack <= 1)).all():
        raise ValueError(f"{file} must be uint8, or floats in [0, 1]")
    return stack.astype(np.float32)


def write(audited: Audited, directory: Path | None) -> Path:
    """Write the audit's files; returns the directory.

    Args:
        directory: new or empty; None: ``audit``, or ``audit-2`` ... where that is taken.

    Raises:
        SampleError: the directory cannot be made or used.
    """
    check_output(directory, "gif")
    summary = _summary(audited)
    files = {
        "audit.json": json.dumps(summary, indent=1).encode(),
        "audit.csv": _table(audited).encode(),
        "audit.png": _curve(summary["levels"]),
    }
    for level in audited.levels:
        _, columns, frames = level.media.shape[:3]
        # sample_grid gives a video half of the columns.
        across = columns if frames == 1 else 2 * columns
        files[f"cycles-{level.gamma:g}.png"] = sample_grid(np.concatenate(level.media), across)
    path = directory or _free(audited.source.home)
    try:
        path.mkdir(parents=True, exist_ok=directory is not None)
    except OSError as error:
        raise SampleError(f"{path} cannot be made: {error}; give --out another one") from error
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def _free(home: Path) -> Path:
    names = itertools.chain(["audit"], (f"audit-{number}" for number in itertools.count(2)))
    return next(home / name for name in names if not (home / name).exists())


def _summary(audited: Audited) -> dict[str, Any]:
    """Lists are by cycle; distances are relative (see ``rollout.audit.Movement``)."""
    spread = audited.settings["spread"]
    deviation = spread / (2 * audited.start.states[0].numel()) ** 0.5
    levels: list[dict[str, Any]] = []
    for level in audited.levels:
        moved = level.moved
        fixed: list[float] = moved.fixed.double().mean(1).tolist()
        levels.append(
            {
                "gamma": level.gamma,
                "fixed": fixed[-1],
                "fixed_by_cycle": fixed,
                "moved": moved.step.median(1).values.tolist(),
                "drift": moved.drift.median(1).values.tolist(),
                "nearest": None
                if moved.nearest is None
                else moved.nearest.median(1).values.tolist(),
                "moved_gaussian": gaussian_step(level.gamma, deviation),
            }
        )
    source = audited.source
    made = zip(audited.start.prompts, audited.start.seeds, strict=True)
    return {
        "checkpoint": str(source.label),
        "step": source.step,
        **audited.settings,
        "levels": levels,
        "samples": [{"prompt": prompt, "seed": seed} for prompt, seed in made],
    }


def _table(audited: Audited) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["gamma", "sample", "prompt", "cycle", "moved", "drift", "fixed", "nearest"])
    for level in audited.levels:
        moved = level.moved
        for row, prompt in enumerate(audited.start.prompts):
            for number in range(len(moved.step)):
                distances = [moved.step[number, row], moved.drift[number, row]]
                near = (
                    "" if moved.nearest is None else f"{float(moved.nearest[number + 1, row]):.6g}"
                )
                values = [f"{float(distance):.6g}" for distance in distances]
                fixed = int(moved.fixed[number, row])
                writer.writerow([level.gamma, row, prompt, number + 1, *values, fixed, near])
    return buffer.getvalue()


def _curve(levels: list[dict[str, Any]]) -> bytes:
    """PNG of the last cycle against gamma."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    gammas = [level["gamma"] for level in levels]
    lines: list[tuple[str, list[float], str]] = [
        ("fixed points", [level["fixed"] for level in levels], "-"),
        ("median distance moved", [level["moved"][-1] for level in levels], "-"),
        ("distance in a Gaussian", [level["moved_gaussian"] for level in levels], "--"),
    ]
    for color, (label, values, style) in zip(COLORS, lines, strict=False):
        axes.plot(gammas, values, style, marker="o", markersize=3, color=color, label=label)
    axes.set_xlabel("gamma: noise level returned to")
    axes.set_ylabel("fraction, relative distance")
    axes.set_ylim(bottom=-0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
