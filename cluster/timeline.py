"""What each actor did and when: ``logs/attempt-N/timeline.json``, which Perfetto opens.

The file is Chrome's trace-event JSON, the array form: an event a line, times in microseconds since the
origin, one process per kind of actor and one thread per actor. A file that a crash left without its
closing bracket is opened too; ``Timeline.close`` makes it strict JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.tracking import last_bytes, strict

NAME = "timeline"
KINDS = ("driver", "rollout", "reward", "learner")  # in this order in a viewer
# A span of this name is time in which an actor waited for others: it is shown, and counts as idle.
WAIT = "wait"
BUFFERED = 4096  # events in memory at most
PART = 64 * 2**20  # bytes after which a file is ended and the next begun: viewers hold it in memory
Fact = str | int | float | bool | None


class Timeline:
    """Events of one attempt, from any thread; written when ``flush`` is called or many have come.

    A track is an actor, ``KIND`` or ``KIND-...-NUMBER``. Spans of a track nest or follow each other.
    Nothing is written before the first event. Files after the first are ``timeline-2.json`` ...
    """

    def __init__(self, path: Path, origin: float) -> None:
        """``path``: of the first file. ``origin``: ``time.time()`` of the trace's zero."""
        self.path, self.origin = path, origin
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._tracks: dict[str, tuple[int, int]] = {}
        self._kinds: list[str] = list(KINDS)
        self._part, self._size, self._begun = path, 0, False

    def span(self, track: str, name: str, start: float, seconds: float, **facts: Fact) -> None:
        """``track`` did ``name`` from ``start`` (``time.time()`` there) for so many seconds."""
        begin, end = self._micro(start), self._micro(start + max(seconds, 0.0))
        self._add(track, {"name": name, "ph": "X", "ts": begin, "dur": end - begin}, facts)

    def instant(self, track: str, name: str, at: float, **facts: Fact) -> None:
        """Something that happened to ``track`` at ``at``: a restart, a kill."""
        self._add(track, {"name": name, "ph": "i", "s": "t", "ts": self._micro(at)}, facts)

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Write what is left and end the file."""
        with self._lock:
            self._flush()
            self._end()

    def _micro(self, at: float) -> int:
        return round((at - self.origin) * 1e6)

    def _add(self, track: str, event: dict[str, Any], facts: Mapping[str, Fact]) -> None:
        with self._lock:
            if track not in self._tracks:
                self._tracks[track] = self._place(track)
                self._lines += self._described(track)
            process, thread = self._tracks[track]
            args = {key: strict(value) for key, value in facts.items()}
            event |= {"pid": process, "tid": thread, "cat": track.partition("-")[0], "args": args}
            self._lines.append(json.dumps(event, allow_nan=False))
            if len(self._lines) >= BUFFERED:
                self._flush()

    def _place(self, track: str) -> tuple[int, int]:
        """Process and thread numbers; unique, an actor's own number decides the order."""
        kind = track.partition("-")[0]
        if kind not in self._kinds:
            self._kinds.append(kind)
        return self._kinds.index(kind) + 1, len(self._tracks) + 1

    def _described(self, track: str) -> list[str]:
        process, thread = self._tracks[track]
        number = track.rpartition("-")[2]
        facts = [
            ("process_name", {"name": self._kinds[process - 1]}),
            ("process_sort_index", {"sort_index": process}),
            ("thread_name", {"name": track}),
            ("thread_sort_index", {"sort_index": int(number) if number.isdecimal() else 0}),
        ]
        common = {"ph": "M", "ts": 0, "pid": process, "tid": thread}
        return [json.dumps({"name": name, **common, "args": args}) for name, args in facts]

    def _flush(self) -> None:
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        if not self._begun:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            lines = [self._origin(), *lines]
        text = ("[\n" if not self._begun else ",\n") + ",\n".join(lines)
        # In one write and never opened between: a crash leaves whole lines.
        with self._part.open("w" if not self._begun else "a", encoding="utf-8") as file:
            file.write(text)
        self._begun, self._size = True, self._size + len(text)
        if self._size >= PART:
            self._end()

    def _origin(self) -> str:
        common = {"ph": "i", "s": "g", "ts": 0, "pid": 1, "tid": 0}
        return json.dumps({"name": "origin", **common, "args": {"time": self.origin}})

    def _end(self) -> None:
        """Close this file; what comes later goes into the next, which describes its tracks again."""
        if self._begun:
            with self._part.open("a", encoding="utf-8") as file:
                file.write("\n]\n")
            number = len(files(self.path.parent)) + 1
            self._part = self.path.with_name(f"{self.path.stem}-{number}.json")
            self._size, self._begun, self._tracks = 0, False, {}


@dataclass(frozen=True)
class Span:
    """Seconds since 1970 from ``begin`` to ``end``."""

    name: str
    begin: float
    end: float


@dataclass
class Trace:
    """What files of one attempt say, by track."""

    spans: dict[str, list[Span]] = field(default_factory=dict[str, list[Span]])
    instants: dict[str, list[Span]] = field(default_factory=dict[str, list[Span]])

    def window(self) -> tuple[float, float] | None:
        """From the first begin to the last end of all spans; None without any."""
        every = [span for spans in self.spans.values() for span in spans]
        if not every:
            return None
        return min(span.begin for span in every), max(span.end for span in every)

    def idle(self, track: str, begin: float, end: float) -> float:
        """Share of the window in which ``track`` had no span but ``WAIT``; spans may overlap."""
        return 1 - busy(self.spans.get(track, ()), begin, end) / (end - begin)


def busy(spans: Iterable[Span], begin: float, end: float) -> float:
    """Seconds of the window that at least one span covers, ``WAIT`` apart."""
    covered, reached = 0.0, begin
    for span in sorted(spans, key=lambda span: span.begin):
        if span.name == WAIT:
            continue
        reached_now = min(max(span.end, reached), end)
        covered += max(reached_now - max(span.begin, reached), 0.0)
        reached = reached_now
    return covered


def files(directory: Path) -> list[Path]:
    """The files of an attempt, oldest first."""
    first, rest = directory / f"{NAME}.json", directory.glob(f"{NAME}-*.json")
    numbered = {int(n): p for p in rest if (n := p.stem.removeprefix(f"{NAME}-")).isdecimal()}
    return [*([first] if first.is_file() else []), *(numbered[n] for n in sorted(numbered))]


def read(paths: Sequence[Path], last: int | None = None) -> Trace:
    """Events of files of one attempt, whether closed or not; lines that are no events are left out.

    Args:
        last: read only so many bytes at the end of each file, and of as many at its start which actor a
            thread is.
    """
    trace = Trace()
    for path in paths:
        origin, names = 0.0, dict[tuple[int, int], str]()
        for event in _events(path, last):
            try:
                kind, args, place = event["ph"], event["args"], (event["pid"], event["tid"])
                if event["name"] == "origin":
                    origin = args["time"]
                elif kind == "M" and event["name"] == "thread_name":
                    names[place] = args["name"]
                elif kind in "Xi":
                    begin = origin + event["ts"] / 1e6
                    span = Span(event["name"], begin, begin + event.get("dur", 0) / 1e6)
                    kept = trace.spans if kind == "X" else trace.instants
                    kept.setdefault(names[place], []).append(span)
            except (KeyError, TypeError):
                continue
    return trace


def _events(path: Path, last: int | None) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        lines: Iterable[bytes] = file
        if last is not None and path.stat().st_size > 2 * last:
            head = file.read(last).splitlines()
            described = [line for line in head if b'"ph": "M"' in line or b'"origin"' in line]
            lines = [*described, *last_bytes(path, last).splitlines()]
        for line in lines:
            try:
                event = json.loads(line.strip().rstrip(b","))
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def attempt_timeline(run: Path) -> Timeline:
    """For the attempt that is beginning: the newest directory of logs that has none, or a new one."""
    numbers = [int(p.name[8:]) for p in (run / "logs").glob("attempt-*") if p.name[8:].isdecimal()]
    number = max(numbers, default=1)
    if files(run / "logs" / f"attempt-{number}"):
        number += 1
    return Timeline(run / "logs" / f"attempt-{number}" / f"{NAME}.json", time.time())
