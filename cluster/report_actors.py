"""A report's part on the actors: how long each was busy, from the timelines of all attempts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from cluster.timeline import busy, files, read
from cluster.top import order


class Actor(NamedTuple):
    """An actor over all attempts in which it had a span; what happened to it, by name."""

    name: str
    busy: float  # seconds
    idle: float  # share
    events: dict[str, int]


def timelines(run: Path) -> list[tuple[str, str]]:
    """Path in the run directory and address of each file, oldest first."""
    found = [path for attempt in _attempts(run) for path in files(attempt)]
    paths = [path.relative_to(run).as_posix() for path in found]
    return [(path, quote(path)) for path in paths]


def actors(run: Path) -> list[Actor]:
    """By kind and number. An attempt counts from its first span to its last, evaluations included."""
    working, present = Counter[str](), Counter[str]()
    events: dict[str, Counter[str]] = {}
    for attempt in _attempts(run):
        seconds, length, happened = _measured(files(attempt))
        working.update(seconds)
        present.update(dict.fromkeys(seconds, length))
        for track, names in happened.items():
            events.setdefault(track, Counter()).update(names)
    return [
        Actor(
            track, working[track], 1 - working[track] / present[track], dict(events.get(track, {}))
        )
        for track in sorted({*present, *events}, key=order)
        if present[track]
    ]


def _measured(
    parts: Sequence[Path],
) -> tuple[dict[str, float], float, dict[str, Counter[str]]]:
    """Busy seconds by actor, length, and events by actor of an attempt; a file at a time."""
    seconds, events = Counter[str](), dict[str, Counter[str]]()
    windows: list[tuple[float, float]] = []
    for part in parts:
        trace = read([part])
        window = trace.window()
        if window is not None:
            windows.append(window)
            seconds.update({t: busy(spans, *window) for t, spans in trace.spans.items()})
        for track, instants in trace.instants.items():
            names = [instant.name for instant in instants if instant.name != "step"]
            events.setdefault(track, Counter()).update(names)
    if not windows:
        return {}, 0.0, events
    length = max(end for _, end in windows) - min(begin for begin, _ in windows)
    return dict(seconds), length, events


def _attempts(run: Path) -> list[Path]:
    return sorted((run / "logs").glob("attempt-*"), key=lambda path: order(path.name))
