"""What a comparison says: table, break-even, charts, files."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.compare import BASE, PLAIN, Point, Trained, measure, on_ray, opened
from cluster.measured import Measured, Table, number, output_directory, save_page
from cluster.plots import COLORS, literal
from cluster.report import CHART, write_report
from cluster.report_distill import svg
from recipes.schema import Recipe

# The reward is what is followed; these sit beside it, where they were measured.
BESIDE = ("/accuracy", "/frechet", "/diversity", "/mean")
COLUMNS = ("forwards", "equivalents", "decodes", "rewards", "reward_backwards", "fallbacks")


def run_comparison(
    recipe: Recipe,
    checkpoints: Sequence[Path],
    out: Path | None,
    report: bool,
    tell: Callable[[str], object],
) -> Measured:
    """Compare on Ray; see ``measure`` and ``write_comparison``.

    Args:
        recipe: checked. checkpoints: runs, checkpoints or policy directories.
        out: a new or empty directory; None: ``compare``, or ``compare-2`` ... here.
        report: put the chart into the reports of the runs that were compared.

    Raises:
        MeasureError, SampleError: nothing was started or written then.
        ClusterError, RewardFailed: it stopped.
    """
    directory = output_directory("compare", out)
    recipe.policy.prepare()
    trained = opened(checkpoints, recipe)
    with tempfile.TemporaryDirectory() as logs, on_ray(recipe, Path(logs)) as parts:
        points = measure(recipe, parts, trained, tell)
    followed = recipe.comparison.reward
    names = [c.name or c.kind for c in recipe.rewards if c.weight != 0]
    measured = write_comparison(directory, points, trained, followed or " + ".join(names))
    for one in trained if report else ():
        if (one.source.home / "recipe.yaml").is_file():
            (one.source.home / CHART).write_bytes((directory / CHART).read_bytes())
            write_report(one.source.home)
    return measured


def write_comparison(
    directory: Path, points: Sequence[Point], trained: Sequence[Trained], reward: str
) -> Measured:
    """``compare.json``, ``.csv``, ``.png``, ``.svg``, ``.html`` in ``directory``.

    Args:
        reward: what it was that methods followed, for the axis.

    Raises:
        MeasureError: the directory cannot be made or written.
    """
    summary = summarised(points)
    names = beside(points, reward)
    head = [
        "policy",
        "method",
        "budget",
        "seeds",
        reward,
        "spread",
        *COLUMNS,
        "ms",
        *map(short, names),
    ]
    rows = [_row(one, names) for one in summary]
    table = Table(f"{reward} and what a sample costs", head, rows)
    lines = break_even(summary, trained)
    even = Table("Was training worth it", ["checkpoint", "against", "training is paid back"], lines)
    document = {
        "reward": reward,
        "points": [asdict(point) for point in points],
        "trained": [
            {"label": t.label, "equivalents": t.equivalents, "seconds": t.seconds} for t in trained
        ],
        "break_even": [dict(zip(even.head, line, strict=True)) for line in lines],
    }
    chart = draw(summary, reward, names, "svg")
    files = {
        "compare.json": json.dumps(document, indent=1).encode(),
        "compare.png": draw(summary, reward, names, "png"),
        CHART: chart,
    }
    tables = [table, even] if lines else [table]
    figures = [(f"{reward} against cost, and what it costs beside", svg(chart))]
    notes = [
        f"{label} against {method}: training is paid back: {paid}" for label, method, paid in lines
    ]
    measured = save_page(directory, "compare", [head, *rows], tables, figures, [], files)
    return replace(measured, table=_brief(summary, reward, names), notes=notes)


def _brief(summary: Sequence[Mapping[str, Any]], reward: str, names: Sequence[str]) -> Table:
    """What fits a terminal."""
    shown = names[:2]
    head = ["policy", "method", "NFE", "equivalents", reward, *(s.split("/")[-1] for s in shown)]
    rows = [
        [
            one["policy"],
            one["method"],
            f"{one['forwards']:.0f}",
            f"{one['equivalents']:.0f}",
            f"{one['reward']:.4g}",
            *(f"{one['metrics'].get(name, math.nan):.3f}" for name in shown),
        ]
        for one in summary
    ]
    return Table(f"{reward} and what a sample costs", head, rows)


def summarised(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Means over seeds of each policy, method and budget, in order; ``spread`` is (max - min) / 2."""
    cells: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        cells.setdefault((point.policy, point.method, point.budget), []).append(point)
    summary: list[dict[str, Any]] = []
    for (policy, method, budget), own in cells.items():
        rewards = [point.reward for point in own]
        common = [k for k in own[0].metrics if all(k in p.metrics for p in own)]
        summary.append(
            {
                "policy": policy,
                "method": method,
                "budget": budget,
                "seeds": len(own),
                "reward": float(np.mean(rewards)),
                "spread": (max(rewards) - min(rewards)) / 2,
                "seconds": float(np.mean([point.seconds for point in own])),
                "metrics": {k: float(np.mean([p.metrics[k] for p in own])) for k in common},
                **{k: float(np.mean([p.work[k] for p in own])) for k in own[0].work},
            }
        )
    return summary


def beside(points: Sequence[Point], reward: str) -> list[str]:
    """Metrics that are shown beside ``reward``, the telling ones first: accuracy, distance, diversity of
    what was held out, then means of other rewards."""
    keys = [k for k in points[0].metrics if k.endswith(BESIDE) and k.split("/")[1] != reward]
    described = {k.rsplit("/", 1)[0] for k in keys if not k.endswith("/mean")}
    kept = [k for k in keys if not (k.endswith("/mean") and k.rsplit("/", 1)[0] in described)]
    return sorted(kept, key=lambda k: next(i for i, end in enumerate(BESIDE) if k.endswith(end)))


def short(name: str) -> str:
    """A metric without its prefix."""
    return name.split("/", 1)[1]


def _row(one: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = [one["policy"], one["method"], str(one["budget"]), str(one["seeds"])]
    cells += [f"{one['reward']:.6g}", f"{one['spread']:.4g}" if one["seeds"] > 1 else ""]
    cells += [number(one[name]) for name in COLUMNS] + [f"{1000 * one['seconds']:.1f}"]
    return cells + [number(one["metrics"].get(name)) for name in names]


def break_even(summary: Sequence[Mapping[str, Any]], trained: Sequence[Trained]) -> list[list[str]]:
    """For each checkpoint and method: after how many samples of its reward training is paid back.

    A method's cost of that reward is interpolated between its budgets, in the logarithm of forward
    equivalents; training costs what it took up to the checkpoint, a sample of it what a plain one does.
    """
    lines: list[list[str]] = []
    for one in trained:
        plain = next(s for s in summary if (s["policy"], s["method"]) == (one.label, PLAIN))
        for method in dict.fromkeys(s["method"] for s in summary if s["policy"] == BASE):
            curve = [s for s in summary if (s["policy"], s["method"]) == (BASE, method)]
            lines.append([one.label, method, _paid(plain, curve, one.equivalents)])
    return lines


def _paid(
    plain: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], training: float | None
) -> str:
    cost = cost_of_reward(curve, plain["reward"])
    if cost is None:
        return "at once: no budget tried reaches its reward"
    saved = cost - plain["equivalents"]
    if saved <= 0:
        return "never: the method is not dearer at its reward"
    if training is None:
        return f"unknown cost of training; saves {saved:.4g} evaluations a sample"
    return f"after {math.ceil(training / saved):,} samples"


def cost_of_reward(curve: Sequence[Mapping[str, Any]], reward: float) -> float | None:
    """Forward equivalents a sample at which a method reaches ``reward``; None: it does not."""
    known = sorted((s["equivalents"], s["reward"]) for s in curve)
    before: tuple[float, float] | None = None
    for cost, value in known:
        if value >= reward:
            if before is None:
                return cost
            share = (reward - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * math.log(cost / before[0]))
        before = (cost, value)
    return None


def draw(
    summary: Sequence[Mapping[str, Any]],
    reward: str,
    names: Sequence[str],
    kind: Literal["png", "svg"],
) -> bytes:
    """The reward against evaluations, equivalents and seconds; below, what was measured beside it,
    against the reward."""
    from matplotlib.figure import Figure

    shown = list(names[:3])
    axes = (
        ("forwards", "network evaluations a sample (NFE)"),
        ("equivalents", "forward equivalents a sample"),
        ("seconds", "seconds a sample"),
    )
    figure = Figure(figsize=(12.6, 3.4 * (2 if shown else 1)), layout="constrained")
    grid: Any = figure.subplots(2 if shown else 1, 3, squeeze=False)
    for panel, (key, label) in zip(grid[0], axes, strict=True):
        _lines(panel, summary, lambda s, key=key: s[key], lambda s: s["reward"])
        panel.set(xscale="log", xlabel=label, ylabel=literal(reward))
    for panel, name in zip(grid[-1] if shown else (), shown, strict=False):
        _lines(
            panel,
            [s for s in summary if name in s["metrics"]],
            lambda s: s["reward"],
            lambda s, name=name: s["metrics"][name],
        )
        panel.set(xlabel=literal(reward), ylabel=literal(short(name)))
    for panel in grid[-1][len(shown) :] if shown else ():
        panel.set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def _lines(panel: Any, summary: Sequence[Mapping[str, Any]], x: Any, y: Any) -> None:
    """A line a policy and method; plain samples are single marks."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    kinds = list(dict.fromkeys((s["policy"], s["method"]) for s in summary))
    for place, (policy, method) in enumerate(kinds):
        own = sorted(
            (s for s in summary if (s["policy"], s["method"]) == (policy, method)),
            key=lambda s: s["forwards"],
        )
        label = method if policy == BASE and method != PLAIN else f"{policy} {method}"
        mark = "*" if method == PLAIN else "o"
        panel.plot(
            [x(s) for s in own], [y(s) for s in own], marker=mark, label=literal(label), linewidth=1.3,
            color=COLORS[place % len(COLORS)], markersize=9 if mark == "*" else 4,
            linestyle="-" if place < len(COLORS) else "--",
        )  # fmt: skip
