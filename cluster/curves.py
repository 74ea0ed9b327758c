"""``rectify curves``: runs merged into curves with confidence bands, groups of runs side by side.

Runs whose recipes are equal but for ``FREE`` are one group. Along steps a group's curve is at the steps
that all of its runs were evaluated at. Along network evaluations and seconds (of training, as
``cost/...`` has them), where its runs differ in these, each is interpolated linearly onto the union of
their points within the range that all have. The band is pointwise, Student's, of n independent seeds::

    mean +- t(0.975, n - 1) s / sqrt(n),   s^2 = sum (y - mean)^2 / (n - 1);   a single run has none
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from cluster.measured import Measured, MeasureError, Table, number, output_directory, save_page
from cluster.plots import COLORS, literal
from cluster.report_distill import svg
from cluster.tracking import MetricsFile
from recipes.errors import nearest

# What runs of one group may differ in: the draws, and where they were made.
FREE = ("seed", "name", "run_dir", "cluster", "workers", "tracking")
AXES = {"step": "step", "forwards": "network evaluations", "seconds": "seconds of training"}
SHOWN_KEYS = 3


@dataclass(frozen=True)
class Run:
    """Evaluations of a run.

    Attributes:
        recipe: by dotted key, without ``FREE``.
        points: of each evaluation ``step``, ``forwards`` and ``seconds`` until then, and its metrics.
    """

    path: Path
    name: str
    seed: Any
    recipe: Mapping[str, Any]
    points: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Curve:
    """A metric of a group of n runs.

    Attributes:
        at: x (k,) by axis: all of ``AXES`` that are known, or the one that was interpolated along;
            of a level none.
        mean, low, high: (k,); the band is NaN where n is 1.
    """

    group: str
    metric: str
    n: int
    at: Mapping[str, np.ndarray]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def compare_curves(
    paths: Sequence[Path], metrics: Sequence[str] = (), out: Path | None = None
) -> Measured:
    """Write ``curves.csv``, ``curves.png`` and ``curves.html``.

    Args:
        paths: run directories. metrics: keys of evaluations, ``evaluation/`` may be left out;
            default: every reward's mean and Fréchet distances, that all runs have.
        out: a new or empty directory; None: ``curves``, or ``curves-2`` ... here.

    Raises:
        MeasureError: no run, a metric that not all have, no step in common, ``out`` is taken.
    """
    directory = output_directory("curves", out)
    runs = [read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    keys, groups = _metrics(runs, metrics), grouped(runs)
    curves = [c for key in keys for label, own in groups for c in merge(label, own, key)]
    notes = [
        f"{label}: {run.path.name} has the seed {run.seed} of another run; the band is too narrow"
        for label, own in groups
        for place, run in enumerate(own)
        if run.seed in [other.seed for other in own[:place]]
    ]
    tables = [_final(curves), _described(groups)]
    return write(directory, "curves", _long(curves), curves, tables, notes)


def read_run(path: Path) -> Run:
    """The evaluations of a run directory.

    Raises:
        MeasureError: it is none, or holds no evaluation.
    """
    file = path / "recipe.yaml"
    if not file.is_file():
        raise MeasureError(f"{path} is no run directory: it has no recipe.yaml")
    try:
        recipe: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MeasureError(f"{file} cannot be read ({error}); restore it") from error
    logged = MetricsFile(path / "metrics.jsonl").read()
    found = {row["step"]: row for row in logged if row["kind"] == "evaluation"}
    if not isinstance(recipe, dict) or not found:
        what = "metrics.jsonl holds no evaluation" if not found else "recipe.yaml is no mapping"
        raise MeasureError(f"{path}: {what}; continue the run, or leave it out")
    costs: dict[int, dict[str, Any]] = {0: {"forwards": 0.0, "seconds": 0.0}}
    for row in logged:
        if row["kind"] == "train":
            costs[row["step"]] = {axis: row.get(f"cost/{axis}") for axis in ("forwards", "seconds")}
    points = [
        {k: float(v) for k, v in row.items() if type(v) in (int, float)}
        for row in (costs.get(step, {}) | found[step] for step in sorted(found))
    ]
    kept = {key: value for key, value in recipe.items() if key not in FREE}
    return Run(path, str(recipe.get("name", path.name)), recipe.get("seed"), _flat(kept), points)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    if not isinstance(value, list | dict) or not value:
        return {key: value}
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [_flat(part, f"{key}.{name}" if key else str(name)) for name, part in items]
    return {name: leaf for part in parts for name, leaf in part.items()}


def _metrics(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    sets = [{key for p in run.points for key in p} - {*AXES, "time"} for run in runs]
    there = sorted(set[str].intersection(*sets))
    keys = [key if key in there else f"evaluation/{key}" for key in asked]
    for name, key in zip(asked, keys, strict=True):
        if key not in there:
            known = f"There are: {', '.join(there) or 'none'}"
            raise MeasureError(
                f"no metric {name!r} in every run{nearest(key, there) or '.'} {known}"
            )
    ends = ("/mean", "/frechet")
    keys = keys or [k for k in there if k.startswith("evaluation/") and k.endswith(ends)]
    if not keys:
        names = ", ".join(str(run.path) for run in runs)
        raise MeasureError(f"{names}: no evaluated reward in common; give runs of one task")
    return list(dict.fromkeys(keys))


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of equal recipes together, labelled by what differs among the recipes."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps(run.recipe, sort_keys=True, default=str), []).append(run)
    groups = list(members.values())
    if len(groups) == 1:
        return [(runs[0].name, groups[0])]
    recipes = [own[0].recipe for own in groups]
    different = differing(recipes)
    # Another kind has other keys, which only say so again.
    common = [key for key in different if all(key in recipe for recipe in recipes)]
    common.sort(key=lambda key: not key.endswith("kind"))
    for keys in (common[:SHOWN_KEYS], different):
        labels = [", ".join(f"{key}={_told(recipe, key)}" for key in keys) for recipe in recipes]
        if len(set(labels)) == len(labels):
            break
    return list(zip(labels, groups, strict=True))


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys that are not the same in all."""
    keys = dict.fromkeys(itertools.chain.from_iterable(recipes))
    return [key for key in keys if len({_told(recipe, key) for recipe in recipes}) > 1]


def _told(recipe: Mapping[str, Any], key: str) -> str:
    value = recipe.get(key, "-")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def merge(label: str, runs: Sequence[Run], metric: str) -> list[Curve]:
    """The curve of a group at its common steps, then those that had to be interpolated.

    Raises:
        MeasureError: the runs share no step with that metric.
    """
    by_step = _tracks(runs, metric, "step")
    common = sorted(set[float].intersection(*map(set[float], by_step)))
    if not common:
        names = ", ".join(str(run.path) for run in runs)
        raise MeasureError(f"{names}: {metric} at no step in common; leave out one of the runs")
    at = {"step": np.array(common, np.int64)}
    interpolated: list[Curve] = []
    for axis in ("forwards", "seconds"):
        costs = _tracks(runs, axis, "step")
        if not all(step in cost for cost in costs for step in common):
            continue  # it was not logged
        x = np.array([[cost[step] for step in common] for cost in costs])
        at[axis] = x.mean(0)
        tracks = [dict(sorted(track.items())) for track in _tracks(runs, metric, axis)]
        low, high = max(map(min, tracks)), min(map(max, tracks))
        if (x != x[0]).any() and low <= high:
            grid = np.array(sorted({v for track in tracks for v in track if low <= v <= high}))
            values = np.stack([np.interp(grid, [*t], [*t.values()]) for t in tracks])
            interpolated.append(Curve(label, metric, len(runs), {axis: grid}, *band(values)))
    values = np.array([[track[step] for step in common] for track in by_step])
    return [Curve(label, metric, len(runs), at, *band(values)), *interpolated]


def _tracks(runs: Sequence[Run], metric: str, axis: str) -> list[dict[float, float]]:
    """Of each run the metric by x, where both are known."""
    return [{p[axis]: p[metric] for p in run.points if axis in p and metric in p} for run in runs]


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and ends of the 95 % interval (k,) of values (n, k)."""
    from scipy import special

    mean, n = values.mean(0), len(values)
    if n == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = float(special.stdtrit(n - 1, 0.975)) * values.std(0, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def _long(curves: Sequence[Curve]) -> list[list[Any]]:
    """A row a point, head first: at a step with the runs' mean costs, interpolated without a step."""
    rows: list[list[Any]] = [["group", "metric", *AXES, "n", "mean", "low", "high"]]
    for c in curves:
        for i in range(len(c.mean)):
            at = [c.at[axis][i].item() if axis in c.at else None for axis in AXES]
            numbers = [float(v[i]) if np.isfinite(v[i]) else None for v in (c.mean, c.low, c.high)]
            rows.append([c.group, c.metric, *at, c.n, *numbers])
    return rows


def _final(curves: Sequence[Curve]) -> Table:
    rows = [
        [c.metric.removeprefix("evaluation/"), c.group, str(c.n)]
        + [number(c.at[axis][-1]) if axis in c.at else "" for axis in AXES]
        + [number(v[-1]) for v in (c.mean, c.low, c.high)]
        for c in curves
        if "step" in c.at
    ]
    return Table("Last evaluation", ["metric", "group", "n", *AXES, "mean", "low", "high"], rows)


def _described(groups: Sequence[tuple[str, list[Run]]]) -> Table:
    keys = differing([own[0].recipe for _, own in groups])
    rows = [
        [label, ", ".join(run.path.name for run in own), ", ".join(str(run.seed) for run in own)]
        + [_told(own[0].recipe, key) for key in keys]
        for label, own in groups
    ]
    return Table("Groups", ["group", "runs", "seeds", *keys], rows)


def write(
    directory: Path,
    name: str,
    rows: Sequence[Sequence[Any]],
    curves: Sequence[Curve],
    tables: Sequence[Table],
    notes: list[str],
    **more: bytes,
) -> Measured:
    """``save_page`` with ``name.png`` and the page's figures from ``curves``, a figure a metric.

    ``more``: further files by suffix.
    """
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    figures = [(m, svg(draw([c for c in curves if c.metric == m], "svg"))) for m in metrics]
    files = {f"{name}.{kind}": content for kind, content in more.items()}
    files[f"{name}.png"] = draw(curves, "png")
    return save_page(directory, name, rows, tables, figures, notes, files)


def draw(curves: Sequence[Curve], kind: Literal["png", "svg"]) -> bytes:
    """A row of panels a metric, a panel an axis; interpolated curves where there are any."""
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    groups = list(dict.fromkeys(curve.group for curve in curves))
    axes = [axis for axis in AXES if any(axis in curve.at for curve in curves)] or ["step"]
    figure = Figure(figsize=(4.2 * len(axes), 3 * max(len(metrics), 1)), layout="constrained")
    grid: Any = figure.subplots(max(len(metrics), 1), len(axes), squeeze=False)
    for (row, metric), (column, axis) in itertools.product(enumerate(metrics), enumerate(axes)):
        panel = grid[row, column]
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_title(literal(metric.removeprefix("evaluation/")), fontsize=9)
        panel.set_xlabel(AXES[axis], fontsize=8)
        own = [c for c in curves if c.metric == metric and (axis in c.at or not c.at)]
        for group, curve in {c.group: c for c in own}.items():
            color = COLORS[groups.index(group) % len(COLORS)]
            label = literal(f"{group} (n={curve.n})")
            if curve.at:
                panel.plot(curve.at[axis], curve.mean, "o-", label=label, color=color, markersize=3)
                panel.fill_between(curve.at[axis], curve.low, curve.high, color=color, alpha=0.18)
            else:
                panel.axhline(curve.mean[0], label=label, color=color, linestyle="--")
        if own and column == 0:
            panel.legend(frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()
