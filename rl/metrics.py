"""Metrics of an update, from the table of its rows; and the drift check before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rl.contracts import Metrics, Sampled
from rollout.masked import TextSummary

Columns = Mapping[str, np.ndarray]


def flow_metrics(table: Columns) -> Metrics:
    """Means over branches, and the panel per timestep index.

    ``gradient_share`` is the part of the summed size of d loss / d velocity that a timestep has.
    """
    if len(table["index"]) == 0:
        return {}
    weight = float(table["weight"].sum()) or 1.0  # 0 in a step that only distils
    metrics: Metrics = {
        "loss": float((table["weight"] * table["loss"]).sum()) / weight,
        "ratio/mean": float(table["ratio"].mean()),
        "ratio/std": float(table["ratio"].std()),
        "clip_fraction": float(table["clipped"].mean()),
    }
    if "kl" in table:
        metrics["kl"] = float(table["kl"].mean())
    total = float(table["gradient"].sum()) or 1.0
    for index in np.unique(table["index"]):
        rows = table["index"] == index
        prefix = f"timestep/{index}"
        metrics |= {
            f"{prefix}/ratio_mean": float(table["ratio"][rows].mean()),
            f"{prefix}/ratio_std": float(table["ratio"][rows].std()),
            f"{prefix}/clip_fraction": float(table["clipped"][rows].mean()),
            f"{prefix}/log_ratio": float(table["log_ratio"][rows].mean()),
            f"{prefix}/gradient_share": float(table["gradient"][rows].sum()) / total,
        }
    return metrics


def text_metrics(table: Columns) -> Metrics:
    """Means over completions; the bound is per token."""
    if len(table["loss"]) == 0:
        return {}
    metrics: Metrics = {
        "elbo/mean": float(table["elbo"].mean()),
        "elbo/std": float(table["elbo"].std()),
    }
    for sign, rows in (("positive", table["advantage"] > 0), ("negative", table["advantage"] < 0)):
        if rows.any():
            metrics[f"elbo/{sign}"] = float(table["elbo"][rows].mean())
    if "ratio" in table:
        metrics["ratio/mean"] = float(table["ratio"].mean())
        metrics["ratio/std"] = float(table["ratio"].std())
        metrics["clip_fraction"] = float(table["clipped"].mean())
    if "kl" in table:
        metrics["kl"] = float(table["kl"].mean())
    return metrics


def length_metrics(prefix: str, samples: Sequence[Sampled]) -> Metrics:
    """Tokens of completions through their EOS, and the share that has one; nothing for media."""
    summaries = [s.summary for s in samples if isinstance(s.summary, TextSummary)]
    lengths = np.array([length for s in summaries for length in s.lengths])
    if len(lengths) == 0:
        return {}
    forwards = sum(sample.forwards for sample in samples)
    return {
        f"{prefix}/length/mean": float(lengths.mean()),
        f"{prefix}/length/min": float(lengths.min()),
        f"{prefix}/length/max": float(lengths.max()),
        f"{prefix}/eos_rate": sum(s.ended for s in summaries) / len(lengths),
        f"{prefix}/nfe_per_sample": forwards / len(lengths),
    }


def staleness_metrics(samples: Sequence[Sampled], step: int) -> Metrics:
    """How many versions the weights that train, of version ``step``, are ahead of those that sampled;
    over groups, nothing without any."""
    if not samples:
        return {}
    ages = np.array([step - sample.version for sample in samples])
    return {
        "rollout/staleness_mean": float(ages.mean()),
        "rollout/staleness_max": float(ages.max()),
    }


class DriftError(RuntimeError):
    """Sampler and learner disagree before anything was trained."""


def check_drift(table: Columns, clip_range: float, dtype: str) -> Metrics:
    """Refuse to train when rollout and learner give one transition different probabilities.

    Before the first update rho must be 1. What it deviates by is noise in every later ratio, and
    when that is not small against the clip range it decides what is clipped.

    Raises:
        DriftError: ``p99 |rho - 1|`` exceeds a fifth of ``clip_range``; names the likely cause.
    """
    deviation = np.abs(table["ratio"] - 1)
    drift = float(np.quantile(deviation, 0.99)) if len(deviation) else 0.0
    if drift > clip_range / 5:
        if dtype != "float32":
            cause = f"policy.dtype is {dtype}: rollout and learner round differently; use float32"
        elif drift > 0.1:
            cause = "the rollout weights, prompts or guidance are not the learner's"
        else:
            cause = (
                "forwards of different shape or on different devices; give rollout.batch_size and "
                "learner.micro_batch the same value"
            )
        raise DriftError(
            f"before the first update p99 |ratio - 1| is {drift:.3g}, above a fifth of "
            f"rl.clip_range ({clip_range:g}). Likely cause: {cause}"
        )
    return {"drift/ratio_p99": drift, "drift/exact": float((deviation == 0).all())}
