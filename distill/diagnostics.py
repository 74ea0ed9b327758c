"""What goes wrong in distillation, as numbers: the complaints that users of public code repeat.

A discriminator that wins or sleeps, colours that drift, over-sharpening, videos that freeze, classes
that vanish, quality that falls after some hundred steps, training on inputs that inference never
makes. Each has a function here; all are pure and take arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

# The gradient of softplus on the logit, sigmoid(-4.595), is 1 % of its largest value here.
SATURATED = math.log(99)
# Evaluations whose middle value counts as reached, so that one lucky evaluation does not.
HELD = 3
# Largest difference that rounding may make, in units of the samples' root mean square. With the
# embedded digits model and two steps bfloat16 makes 0.03, a time that is wrong by 0.02 makes 0.13.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def discriminator_metrics(real_logits: np.ndarray, fake_logits: np.ndarray) -> dict[str, float]:
    """How well a discriminator separates teacher samples from the student's; logits of any shape.

    - ``accuracy``: mean of ``accuracy/real`` (share of real logits above 0) and ``accuracy/fake``
      (share of fake ones below 0), whatever their numbers; a logit of exactly 0 is half right.
    - ``logit_gap``: mean real minus mean fake logit.
    - ``saturated``: share, balanced likewise, beyond ``SATURATED`` on the right side: samples from
      which the discriminator learns nothing any more.
    - ``nonfinite``: share of all logits that are NaN or infinite. The others leave them out, and
      are NaN where a side has no finite logit.
    """
    real, fake = _finite(real_logits), _finite(fake_logits)
    right = _share_above(real, 0.0), _share_above(-fake, 0.0)
    total = np.size(real_logits) + np.size(fake_logits)
    return {
        "accuracy": sum(right) / 2,
        "accuracy/real": right[0],
        "accuracy/fake": right[1],
        "logit_gap": _mean(real) - _mean(fake),
        "saturated": (_share_above(real, SATURATED) + _share_above(-fake, SATURATED)) / 2,
        "nonfinite": 1 - (len(real) + len(fake)) / total if total else math.nan,
    }


def statistics_drift(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Low-order statistics of a student's media against its teacher's, in units of [0, 1].

    Both uint8 (n, frames, height, width, channels). Sizes may differ except for the channels; ratios
    of spatial or temporal differences mean little between different resolutions or frame rates.

    - ``mean/<c>``, ``std/<c>``: student minus teacher, over all pixels of channel c: colour drift.
    - ``contrast_ratio``: mean over frames and channels of the deviation within a frame,
      student / teacher: below 1 washed out, above 1 harsh.
    - ``sharpness_ratio``: energy of differences between neighbouring pixels, each side relative to
      its variance within frames: above 1 over-sharpened or noisy, below 1 blurred; contrast alone
      leaves it at 1.
    - ``black/<side>``, ``white/<side>``: share of values at 0 and at 255, for student and teacher.
    - ``motion_ratio``: energy of differences between successive frames, student / teacher: 0 is a
      frozen video. Left out where a side has one frame.

    A ratio is NaN where both parts are 0 (``sharpness_ratio``: where a side is flat) and infinite
    where only the teacher's is.

    Raises:
        ValueError: not such arrays, nothing in them, or channels that differ.
    """
    for name, media in (("student", student), ("teacher", teacher)):
        if media.dtype != np.uint8 or media.ndim != 5 or media.size == 0:
            raise ValueError(
                f"{name} media must be uint8 (n, frames, height, width, channels) and not empty, "
                f"not {media.dtype} {media.shape}"
            )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student media {student.shape} and teacher's {teacher.shape}: channels")
    ours, theirs = _moments(student), _moments(teacher)
    mean, std = ((ours[name] - theirs[name]) / 255 for name in ("mean", "std"))
    metrics: dict[str, float] = {}
    for channel in range(student.shape[-1]):
        metrics[f"mean/{channel}"] = float(mean[channel])
        metrics[f"std/{channel}"] = float(std[channel])
    metrics["contrast_ratio"] = _ratio(ours["contrast"], theirs["contrast"])
    metrics["sharpness_ratio"] = _ratio(
        ours["edges"] * theirs["variance"], theirs["edges"] * ours["variance"]
    )
    for side, moments in (("student", ours), ("teacher", theirs)):
        metrics[f"black/{side}"] = float(moments["black"])
        metrics[f"white/{side}"] = float(moments["white"])
    if student.shape[1] > 1 and teacher.shape[1] > 1:
        metrics["motion_ratio"] = _ratio(ours["motion"], theirs["motion"])
    return metrics


def collapse_began(
    history: Sequence[tuple[int, float]],
    rising: bool = True,
    relative: float = 0.1,
    absolute: float = 0.0,
    patience: int = 3,
) -> int | None:
    """The step at which a metric began a fall that it has not recovered from; None if it has not.

    The rule, for a metric that should rise (otherwise with the sign turned):

    1. *Best* is the highest level held so far: of any ``HELD`` evaluations in a row the middle value,
       of the first two the lower. A single spike does not raise it.
    2. An evaluation is *low* when it is more than max(``relative`` |best|, ``absolute``) under best.
       For a metric near 0, such as a log-probability, give ``absolute``: above its noise.
    3. ``patience`` low evaluations in a row are a collapse; it began at the first of them.
    4. ``patience`` evaluations in a row that are not low end it: the run has recovered, however late.

    Values that are not finite never make the best; a NaN is low once there is a best.

    Args:
        history: (step, value), steps ascending.

    Raises:
        ValueError: the steps do not ascend, or ``patience`` is below 1.
    """
    steps = [step for step, _ in history]
    if patience < 1 or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError("patience must be 1 or more and the steps of the history must ascend")
    best, low, run, began = -math.inf, False, [], None
    held: list[float] = []
    for step, value in history:
        level = value if rising else -value
        line = best - max(relative * abs(best), absolute) if held else -math.inf
        was_low, low = low, bool(held) and not level >= line
        run = [*run, step] if low == was_low else [step]
        if len(run) >= patience:
            began = (began if began is not None else run[0]) if low else None
        if math.isfinite(level):
            held = [*held, level][-HELD:]
            best = max(best, sorted(held)[(len(held) - 1) // 2])
    return began


def mismatch(training: np.ndarray, inference: np.ndarray, dtype: str) -> dict[str, float]:
    """Whether the training forward makes what the sampler makes, from the same draws and weights.

    Both (n, ...), row by row from equal draws. ``mismatch/max`` and ``mismatch/mean`` are absolute
    differences; ``mismatch/tolerance`` is ``TOLERANCE[dtype]`` times the root mean square of
    ``inference``; ``mismatch/agrees`` is 1.0 where the largest difference stays within it, else 0.0.
    A value that is not finite never agrees, not even with its like.

    Args:
        dtype: what the network computes in, ``float32`` or ``bfloat16``.

    Raises:
        ValueError: shapes differ or have no element, or no tolerance is known for ``dtype``.
    """
    if training.shape != inference.shape or training.size == 0:
        raise ValueError(
            f"training samples {training.shape} and inference samples {inference.shape} must have "
            "one shape and not be empty"
        )
    if dtype not in TOLERANCE:
        raise ValueError(f"no tolerance for dtype {dtype!r}; known: {', '.join(TOLERANCE)}")
    ours, theirs = training.astype(np.float64), inference.astype(np.float64)
    finite = bool(np.isfinite(ours).all() and np.isfinite(theirs).all())
    difference = np.abs(ours - theirs) if finite else np.full(1, math.inf)
    tolerance = TOLERANCE[dtype] * float(np.sqrt(np.square(theirs).mean()))
    return {
        "mismatch/max": float(difference.max()),
        "mismatch/mean": float(difference.mean()),
        "mismatch/tolerance": tolerance,
        "mismatch/agrees": float(finite and difference.max() <= tolerance),
    }


def _moments(media: np.ndarray) -> dict[str, np.ndarray]:
    """Averages over frames, in [0, 255]: integers, so that what is constant has no variance at all.

    One frame at a time: as floats a set of videos may not fit into memory.
    """
    rows = [_frame_moments(frame) for sample in media for frame in sample]
    means = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    means["std"] = np.sqrt((means.pop("square") - means["mean"] ** 2).clip(min=0))
    pairs = [pair for sample in media for pair in itertools.pairwise(sample)]
    means["motion"] = np.mean([_energy(np.stack(pair), 0) for pair in pairs] or [0.0])
    return means


def _frame_moments(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Of one frame uint8 (height, width, channels); by channel ``mean`` and ``square``."""
    x = frame.astype(np.float64)
    variance = x.var((0, 1))
    return {
        "mean": x.mean((0, 1)),
        "square": np.square(x).mean((0, 1)),
        "contrast": np.sqrt(variance).mean(),
        "variance": variance.mean(),
        "edges": _energy(x, 0) + _energy(x, 1),
        "black": (frame == 0).mean(),
        "white": (frame == 255).mean(),
    }


def _energy(x: np.ndarray, axis: int) -> np.ndarray:
    """Mean squared difference of neighbours; 0 where an axis of length 1 has none."""
    difference = np.diff(x.astype(np.float64), axis=axis)
    return np.square(difference).mean() if difference.size else np.zeros(())


def _finite(logits: np.ndarray) -> np.ndarray:
    flat = np.asarray(logits, dtype=np.float64).reshape(-1)
    return flat[np.isfinite(flat)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _share_above(values: np.ndarray, bound: float) -> float:
    """Values at the bound count half."""
    return _mean((np.sign(values - bound) + 1) / 2)


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    if theirs == 0:
        return math.inf if ours > 0 else math.nan
    return float(ours / theirs)
