"""What a run is doing, from the ends of its files: it needs no Ray, and the run may have ended.

Every look opens the files anew, which is what a network file system wants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.timeline import Trace, files, read
from cluster.tracking import MetricsFile, last_bytes

TAIL = 2**20  # bytes that are read of each file
SHOWN = 40  # steps
WINDOW = 60.0  # seconds before the newest span in which an actor's idle share is taken
WARNINGS = 5
ACTORS = 32  # that are shown, the idlest
QUIET = 10.0  # seconds without a line that are never worth a word
BLOCKS = "▁▂▃▄▅▆▇█"
WARNED = re.compile(r"^\S+ \S+ (?:WARNING|ERROR|CRITICAL) ")
KINDS = ("rollout", "learner", "reward")
# Shown where a run has them: metric and name.
STATES = {
    "rollout/staleness_mean": "staleness",
    "rollout/dropped_groups": "dropped groups",
    "rollout/restarts": "restarts",
}
COSTS = ("nfe", "forwards", "backwards", "gpu_seconds")
Row = Mapping[str, Any]


class NoRun(ValueError):
    """There is no run directory; the message says what is missing."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        train: the last rows of steps; ``evaluation``: the last row of one.
        idle: share of each actor's time without work lately, by actor.
        age: seconds since the last line of metrics; None before the first.
        checkpoint: the newest one's name.
    """

    name: str
    total: int
    versions: Mapping[str, str]
    train: Sequence[Row] = ()
    evaluation: Row | None = None
    pace: float = 0.0
    age: float | None = None
    idle: Mapping[str, float] = field(default_factory=dict[str, float])
    checkpoint: str | None = None
    warnings: Sequence[str] = ()

    @property
    def step(self) -> int:
        """The last step."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def last(self) -> Row:
        """Metrics of the last step."""
        return self.train[-1] if self.train else {}

    def silence(self) -> str | None:
        """What to say of a run that has not written for longer than it does between steps."""
        if self.age is None or self.step >= self.total:
            return None
        if self.age < max(QUIET, 3 * self.pace):
            return None
        return f"no line for {duration(self.age)}: it stopped, ended, or a step takes this long"


def snapshot(run: Path, now: float) -> Snapshot:
    """Read a run directory.

    Args:
        now: ``time.time()``.

    Raises:
        NoRun: it is none.
    """
    recipe = _recipe(run)
    rows = MetricsFile(run / "metrics.jsonl").tail(TAIL)
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    attempts = sorted((run / "logs").glob("attempt-*"), key=lambda p: (len(p.name), p.name))
    newest = attempts[-1] if attempts else run
    whole = [p.parent.name for p in (run / "checkpoints").glob("step_*/manifest.json")]
    return Snapshot(
        name=run.resolve().name,
        total=recipe["steps"],
        versions=_document(run / "versions.json"),
        train=train[-SHOWN:],
        evaluation=evaluations[-1] if evaluations else _evaluated(run),
        pace=_pace(train, evaluations),
        age=max(now - rows[-1].get("time", now), 0.0) if rows else None,
        idle=idle_lately(read(files(newest)[-1:], last=TAIL)),
        checkpoint=max(whole, key=lambda name: (len(name), name), default=None),
        warnings=_warnings(newest / "driver.log"),
    )


def idle_lately(trace: Trace) -> dict[str, float]:
    """Idle share of every actor in the last ``WINDOW`` seconds of a trace, or as long as it is."""
    window = trace.window()
    if window is None or window[0] == window[1]:
        return {}
    begin = max(window[0], window[1] - WINDOW)
    return {track: trace.idle(track, begin, window[1]) for track in sorted(trace.spans, key=order)}


def order(track: str) -> tuple[str, int]:
    """Actors by kind, then by number."""
    kind, _, number = track.rpartition("-")
    return (kind, int(number)) if number.isdecimal() else (track, 0)


def render(shot: Snapshot) -> RenderableType:
    """All of it, for a console of any width."""
    parts: list[RenderableType] = [_head(shot)]
    if shot.train:
        parts += [_rewards(shot), _actors(shot)]
    if shot.evaluation is not None:
        parts.append(_evaluation(shot.evaluation))
    parts += [Text(_plain(line), "yellow", overflow="fold") for line in shot.warnings]
    versions = "  ".join(f"{name} {shot.versions.get(name, '?')}" for name in ("rectify", "torch"))
    parts.append(Text(versions, "dim"))
    return Group(*parts)


def sparkline(values: Sequence[float | None]) -> str:
    """Heights between the least and the largest value; a space where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, wide = min(known), max(known) - min(known)
    top = len(BLOCKS) - 1
    return "".join(
        " " if value is None else BLOCKS[round((value - low) / wide * top) if wide else top // 2]
        for value in values
    )


def duration(seconds: float) -> str:
    """As 3 d 4 h, 5 h 6 min, 7 min 8 s or 9 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    left, parts = int(seconds), list[str]()
    for unit, size in units:
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _head(shot: Snapshot) -> RenderableType:
    state = shot.silence()
    grid = Table.grid(padding=(0, 2))
    left = f"ETA {duration(shot.pace * (shot.total - shot.step))}" if shot.train else "no step yet"
    done = "done" if shot.step >= shot.total else left
    bar = ProgressBar(max(shot.total, 1), shot.step, width=30)
    grid.add_row(bar, f"{shot.step}/{shot.total}", done)
    facts = [f"{60 / shot.pace:.3g} steps/min"] if shot.pace else []
    rate = _rate(shot.train)
    facts += [f"{rate:.3g} samples/s"] if rate else []
    facts += [f"checkpoint {shot.checkpoint}" if shot.checkpoint else "no checkpoint"]
    last = shot.last
    facts += [f"{label} {last[k]:.3g}" for k, label in STATES.items() if last.get(k) is not None]
    costs = [
        f"{name} {last[f'cost/{name}']:,.0f}"
        for name in COSTS
        if last.get(f"cost/{name}") is not None
    ]
    lines = [Text("  ".join(facts)), Text("  ".join(costs), "dim")]
    lines += [Text(state, "bold red")] if state else []
    return Panel(Group(grid, *lines), title=Text(_plain(shot.name)), title_align="left")


def _rewards(shot: Snapshot) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for head in ("reward", "mean", f"last {len(shot.train)} steps"):
        table.add_column(head, overflow="fold")
    for key in _keys(shot.train, "reward/", "/mean"):
        values = [row.get(key) for row in shot.train]
        table.add_row(Text(_plain(key.split("/")[1])), _number(values[-1]), sparkline(values))
    phases = _keys([shot.last], "time/", "")
    times = "  ".join(f"{key[5:]} {_number(shot.last[key])} s" for key in phases)
    return Group(table, Text(times))


def _actors(shot: Snapshot) -> RenderableType:
    kinds = [
        f"{kind} {shot.last[f'idle/{kind}']:.0%}"
        for kind in KINDS
        if shot.last.get(f"idle/{kind}") is not None
    ]
    lines: list[RenderableType] = [Text("idle in the last step: " + "  ".join(kinds))]
    idlest = sorted(shot.idle, key=lambda track: -shot.idle[track])[:ACTORS]
    if idlest:
        table = Table(box=None, pad_edge=False)
        table.add_column("actor", overflow="fold")
        table.add_column(f"idle, last {WINDOW:.0f} s")
        table.add_column("")
        for track in sorted(idlest, key=order):
            share = shot.idle[track]
            table.add_row(Text(track), f"{share:.0%}", Text("█" * round(20 * share), "yellow"))
        lines.append(table)
    if len(idlest) < len(shot.idle):
        lines.append(Text(f"{len(shot.idle) - len(idlest)} more are busier", "dim"))
    return Group(*lines)


def _evaluation(row: Row) -> RenderableType:
    keys = [*_keys([row], "evaluation/", "/mean"), *_keys([row], "evaluation/", "/frechet")]
    found = [f"{key.removeprefix('evaluation/')} {_number(row[key])}" for key in keys]
    return Text(f"evaluation at step {row['step']}: " + "  ".join(found), overflow="fold")


def _recipe(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text())
    except OSError as error:
        raise NoRun(
            f"{run} is no run directory: recipe.yaml cannot be read ({error.strerror})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NoRun(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("steps"), int):
        raise NoRun(f"{file} is not the recipe of a run: it says no number of steps")
    return recipe


def _evaluated(run: Path) -> Row | None:
    """The last evaluation, where it lies further back than what was read."""
    found = sorted((run / "evaluation").glob("step_*.json"))
    document = _document(found[-1]) if found else {}
    return {"step": document["step"], **document["metrics"]} if document else None


def _document(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no whole one (it may be being written)."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _pace(train: Sequence[Row], evaluations: Sequence[Row]) -> float:
    """Seconds a step takes with its share of the evaluations; 0 where nothing is known."""
    recent = train[-SHOWN:]
    if not recent:
        return 0.0
    first = recent[0]["step"]
    spent = sum(row.get("time/step") or 0.0 for row in recent)
    spent += sum(row.get("time/evaluate") or 0.0 for row in evaluations if row["step"] >= first)
    return spent / len(recent)


def _rate(train: Sequence[Row]) -> float | None:
    seconds = sum(row.get("time/step") or 0.0 for row in train)
    samples = sum(row.get("rollout/samples") or 0.0 for row in train)
    return samples / seconds if seconds and samples else None


def _warnings(log: Path) -> list[str]:
    if not log.is_file():
        return []
    lines = last_bytes(log, TAIL).decode(errors="replace").splitlines()
    return [line for line in lines if WARNED.match(line)][-WARNINGS:]


def _keys(rows: Sequence[Row], start: str, end: str) -> list[str]:
    found = (key for row in rows for key in row if key.startswith(start) and key.endswith(end))
    return list(dict.fromkeys(found))


def _plain(text: str) -> str:
    """Without what a terminal would obey: a log quotes what models write."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
