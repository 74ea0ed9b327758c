"""``report.html``: everything about a run in one file; only large videos stay beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from cluster import plots
from cluster.monitors import warnings
from cluster.report_actors import actors, timelines
from cluster.report_distill import distill_figures, svg
from cluster.tracking import MetricsFile

TIMESTEP_PANELS = {
    "ratio_mean": "ratio, mean",
    "ratio_std": "ratio, std",
    "clip_fraction": "clip fraction",
    "gradient_share": "share of gradient",
}
SHOWN = 12
EMBEDDED = 12 * 2**20  # bytes of videos that a page holds; a third more as base64
PHASES = {f"time/{name}": name for name in ("rollout", "reward", "learn", "sync")}
# A run's chart against inference-time methods, where 'rectify compare --report' has put one.
CHART = "compare.svg"
IDLE = {f"idle/{name}": name for name in ("rollout", "learner", "reward")}


def write_report(run: Path) -> Path:
    """Write and return the report of a run, finished or not.

    Raises:
        ValueError: ``run`` is no run directory.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is no run directory: it has no recipe.yaml")
    from jinja2 import Environment, PackageLoader

    rows = MetricsFile(run / "metrics.jsonl").read()
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    environment = Environment(loader=PackageLoader("cluster", "templates"), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        name=run.name,
        steps=train[-1]["step"] if train else 0,
        changes=changes(evaluations),
        figures=_figures(train, evaluations) + _comparison(run),
        evaluations=_table(evaluations),
        grids=_grids(run),
        clips=_clips(run),
        texts=_texts(run),
        actors=actors(run),
        timelines=timelines(run),
        costs=_costs(train),
        warnings=_warnings(train) + warnings(evaluations, _watched(run)),
        recipe=(run / "recipe.yaml").read_text(),
        versions=_versions(run),
    )
    target = run / "report.html"
    scratch = run / ".report.html.tmp"
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(target)
    return target


def changes(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every evaluation metric before and after: name, first and last value."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [k for k in last if k.startswith("evaluation/") and not k.endswith("/std")]
    return [
        {"name": k.removeprefix("evaluation/"), "before": first[k], "after": last[k]}
        for k in names
        if "/recall/" not in k and first.get(k) is not None and last[k] is not None
    ]


def _figures(train: plots.Rows, evaluations: plots.Rows) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    rewards = {k: k.split("/")[1] for row in train for k in row if _is(k, "reward/", "/mean")}
    for key, name in rewards.items():
        figures.append((f"Training reward: {name}", svg(plots.curves(train, {key: name}, name))))
    held = {
        k: k.split("/")[1] for row in evaluations for k in row if _is(k, "evaluation/", "/mean")
    }
    for key, name in held.items():
        title = f"Evaluation: {name}" + ("" if name in rewards.values() else " (held out)")
        figures.append((title, svg(plots.curves(evaluations, {key: name}, name))))
    distances = {k: k for row in evaluations for k in row if k.endswith("/frechet")}
    if distances:
        figures.append(
            (
                "Fréchet distance to real data",
                svg(plots.curves(evaluations, distances, "distance")),
            )
        )
    figures += _text_figures(train, evaluations) + distill_figures(train, evaluations)
    if any(key.startswith("timestep/") for row in train for key in row):
        figures.append(("By timestep", svg(plots.timesteps(train, TIMESTEP_PANELS))))
    if train:
        figures.append(("Seconds per step", svg(plots.stacked(train, PHASES, "s"))))
        figures.append(("Idle share of actors", svg(plots.curves(train, IDLE, "share"))))
        figures.append(("Gradient norm", svg(plots.curves(train, {"grad_norm": "norm"}, "norm"))))
    return figures


def _comparison(run: Path) -> list[tuple[str, str]]:
    chart = run / CHART
    return (
        [("Against inference-time alignment", svg(chart.read_bytes()))] if chart.is_file() else []
    )


def _text_figures(train: plots.Rows, evaluations: plots.Rows) -> list[tuple[str, str]]:
    """The double-drift track, and the curve of lengths, of a run on text."""
    figures: list[tuple[str, str]] = []
    if any("gap/gap" in row for row in evaluations):
        gap = plots.curves(evaluations, {"gap/gap": "gap"}, "nats per sample")
        figures.append(("Variational gap, log-likelihood minus bound", svg(gap)))
        both = {"gap/log_prob": "log-likelihood", "gap/elbo": "bound"}
        figures.append(("Own samples", svg(plots.curves(evaluations, both, "nats per sample"))))
        cosine = plots.curves(evaluations, {"gap/cosine": "cosine"}, "cosine")
        figures.append(("Gradient of the bound against the true one", svg(cosine)))
    if any("rollout/length/mean" in row for row in train):
        lengths = {f"rollout/length/{name}": name for name in ("mean", "min", "max")}
        figures.append(("Length of rollouts", svg(plots.curves(train, lengths, "tokens"))))
        ended = {"rollout/eos_rate": "share"}
        figures.append(("Rollouts that end with EOS", svg(plots.curves(train, ended, "share"))))
    return figures


def _is(key: str, start: str, end: str) -> bool:
    return key.startswith(start) and key.endswith(end)


def _grids(run: Path) -> list[tuple[str, str]]:
    """Samples of the first and the last evaluation, where no videos of them are kept."""
    return [
        (_title(path.parent), _data("image/png", path.read_bytes()))
        for path in _ends(run, "grid.png")
        if not any(path.parent.glob("*.mp4"))
    ]


class Clip(NamedTuple):
    """A sample's video as a page shows it: addresses of its contact sheet and of itself."""

    title: str
    prompt: str
    scores: dict[str, str]
    sheet: str
    video: str


def _clips(run: Path) -> list[list[Clip]]:
    """Videos of the first and the last evaluation, by sample.

    Within the page as long as all of them fit ``EMBEDDED``, else where they lie beside it.
    """
    found = [sorted(first.parent.glob("*.mp4")) for first in _ends(run, "000_*.mp4")]
    embedded = sum(path.stat().st_size for paths in found for path in paths) <= EMBEDDED
    rows: dict[int, list[Clip]] = {}
    for paths in found:
        step = paths[0].parent.name
        document = json.loads((run / "evaluation" / f"{step}.json").read_text())
        for path in paths:
            number = int(path.name.partition("_")[0])
            sample = document["samples"][number]
            beside = quote(path.relative_to(run).as_posix())
            clip = Clip(
                title=_title(path.parent),
                prompt=sample["prompt"],
                scores={name: _number(values[0]) for name, values in sample["scores"].items()},
                sheet=_data("image/jpeg", path.with_suffix(".jpg").read_bytes()),
                video=_data("video/mp4", path.read_bytes()) if embedded else beside,
            )
            rows.setdefault(number, []).append(clip)
    return list(rows.values())


def _texts(run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Completions of the first and the last evaluation."""
    return [
        (
            _title(path.parent),
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:SHOWN]],
        )
        for path in _ends(run, "completions.jsonl")
    ]


def _ends(run: Path, name: str) -> list[Path]:
    """A file of samples of the first and of the last evaluation that has it."""
    paths = sorted((run / "samples").glob(f"step_*/{name}"))
    return paths[:1] + paths[1:][-1:]


def _title(step: Path) -> str:
    return step.name.replace("_", " ")


def _data(kind: str, content: bytes) -> str:
    """An address that holds what it leads to."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def _table(evaluations: plots.Rows) -> dict[str, list[Any]]:
    keys = sorted({k for row in evaluations for k in row if k.startswith("evaluation/")})
    keys = [k for k in keys if not k.endswith("/std") and "/recall/" not in k]
    return {
        "head": ["step", *[k.removeprefix("evaluation/") for k in keys]],
        "rows": [[row["step"], *[_number(row.get(k)) for k in keys]] for row in evaluations],
    }


def _costs(train: plots.Rows) -> list[tuple[str, str]]:
    last = train[-1] if train else {}
    return [
        (k.removeprefix("cost/"), f"{v:,.0f}") for k, v in last.items() if k.startswith("cost/")
    ]


def _warnings(train: plots.Rows) -> list[str]:
    warnings: list[str] = []
    failed = {
        k: sum(r.get(k) or 0 for r in train) for row in train for k in row if k.endswith("/failed")
    }
    warnings += [f"{key}: {int(n)} samples were not scored" for key, n in failed.items() if n]
    dropped = sum(row.get("rollout/dropped_groups") or 0 for row in train)
    if dropped:
        warnings.append(f"{int(dropped)} groups were dropped by the rollout workers")
    idle = [row["step"] for row in train if (row.get("zero_std_ratio") or 0) > 0.5]
    if idle:
        warnings.append(
            f"in {len(idle)} steps (first {idle[0]}) over half of the groups had equal rewards and "
            "taught nothing: the task is solved or out of reach"
        )
    inexact = [row for row in train if row.get("drift/exact") == 0]
    if inexact:
        warnings.append(
            f"sampler and learner drift before the first update: {inexact[0]['drift/ratio_p99']:.2g}"
        )
    return warnings


def _watched(run: Path) -> str | None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    return recipe.get("checkpoints", {}).get("keep_best")


def _versions(run: Path) -> dict[str, str]:
    path = run / "versions.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
