"""What watches a run while it is on: a widening gap, a collapse, recursive training on own samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.diagnostics import collapse_began
from distill.recursion import spectrum
from recipes.schema import AnyRecipe, Recipe
from rl.contracts import Metrics

WIDENING = 3
REFERENCE = "reference_features.npy"
# Media are watched as so many places a side, frames and colours averaged.
GRID = 8
LEAST_SAMPLES = 50


def widening(gaps: Sequence[float | None]) -> int:
    """In how many last evaluations the gap grew each time; 0 below ``WIDENING`` of them."""
    known = [gap for gap in gaps if gap is not None]
    grown = 0
    for before, after in itertools.pairwise(reversed(known)):
        if before <= after:
            break
        grown += 1
    return grown if grown >= WIDENING else 0


def warnings(evaluations: Sequence[Mapping[str, Any]], watched: str | None) -> list[str]:
    """What the evaluations so far give reason to say.

    ``watched``: a metric that should rise (``checkpoints.keep_best``).
    """
    found: list[str] = []
    since = widening([row.get("gap/gap") for row in evaluations])
    if since:
        found.append(
            f"the variational gap widened in the last {since} evaluations in a row: the bound that is "
            "trained says less and less about the policy (rl.dipod keeps it tight)"
        )
    if watched is not None:
        history = [(row["step"], row[watched]) for row in evaluations if watched in row]
        began = collapse_began(history)
        if began is not None:
            found.append(
                f"{watched} fell at step {began} and has not recovered: the run collapsed; the best "
                "checkpoint is kept"
            )
    return found


def learns_from_itself(recipe: AnyRecipe) -> bool:
    """Whether a flow is trained towards its own samples."""
    text = recipe.policy.kind == "llada"
    return isinstance(recipe, Recipe) and recipe.rl.dipod is not None and not text


def recursion_metrics(directory: Path, media: Sequence[np.ndarray]) -> Metrics:
    """The samples' variance and Hermite spectrum against those of the first evaluation.

    The first call stores its features in ``directory`` and is the reference of all later ones.
    """
    features = pooled(np.concatenate(media))
    file = directory / REFERENCE
    if len(features) < LEAST_SAMPLES:
        return {}
    if not file.exists():
        np.save(file, features)
    found = spectrum(features, np.load(file)).metrics()
    return {f"recursion/{name}": value for name, value in found.items()}


def pooled(media: np.ndarray) -> np.ndarray:
    """Features (n, at most GRID^2) of uint8 media (n, F, H, W, C), in [0, 1]."""
    grey = media.mean((1, 4)) / 255
    rows, columns = (np.array_split(np.arange(size), min(size, GRID)) for size in grey.shape[1:])
    cells = [grey[:, r][:, :, c].mean((1, 2)) for r in rows for c in columns]
    return np.stack(cells, axis=1)
