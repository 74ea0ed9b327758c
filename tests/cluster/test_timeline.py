"""The trace of a run: the format, what a crash leaves, and idle time computed from it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster import timeline
from cluster.report import write_report
from cluster.report_actors import actors
from cluster.timeline import Span, Timeline, attempt_timeline, busy, files, read

ORIGIN = 1_800_000_000.0


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_a_closed_file_is_the_array_form_of_the_trace_event_format(tmp_path: Path):
    path = tmp_path / "logs" / "timeline.json"
    line = Timeline(path, ORIGIN)
    assert not path.exists()
    line.span("rollout-3", "generate", ORIGIN + 1.5, 0.25, step=7, ratio=float("nan"))
    line.span("reward-a-b-1", "score", ORIGIN + 2, 0.1)
    line.instant("learner-0", "restart", ORIGIN + 3, why="</script>\n")
    line.close()
    found = events(path)
    for event in found:
        assert event["ph"] in ("X", "i", "M")
        assert isinstance(event["name"], str)
        assert all(type(event[key]) is int for key in ("ts", "pid", "tid"))
        assert isinstance(event["args"], dict)
        assert ("dur" in event) == (event["ph"] == "X")
    span = next(e for e in found if e["name"] == "generate")
    assert (span["ts"], span["dur"]) == (1_500_000, 250_000)
    assert span["args"] == {"step": 7, "ratio": None}
    named = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    threads = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert named[span["pid"]] == "rollout" and threads[span["tid"]] == "rollout-3"
    assert sorted(named.values()) == ["learner", "reward", "rollout"]
    assert sorted(threads.values()) == ["learner-0", "reward-a-b-1", "rollout-3"]
    assert next(e for e in found if e["name"] == "restart")["s"] == "t"


def test_a_crash_leaves_whole_events_one_a_line_and_reading_needs_no_bracket(tmp_path: Path):
    path = tmp_path / "timeline.json"
    line = Timeline(path, ORIGIN)
    line.span("rollout-0", "generate", ORIGIN + 1, 2)
    line.flush()
    line.span("rollout-0", "generate", ORIGIN + 5, 1)
    line.flush()
    line.span("rollout-0", "generate", ORIGIN + 9, 1)  # never written
    text = path.read_text()
    assert text.startswith("[\n{") and not text.rstrip().endswith("]")
    assert len(json.loads(text + "]")) == len(text.splitlines()) - len(["["])
    path.write_text(text + ',\n{"name": "generate", "ph": "X", "ts": 99')  # torn by a full disk
    assert read([path]).spans == {
        "rollout-0": [
            Span("generate", ORIGIN + 1, ORIGIN + 3),
            Span("generate", ORIGIN + 5, ORIGIN + 6),
        ]
    }


def test_idle_is_the_share_that_no_span_covers_with_overlaps_counted_once(tmp_path: Path):
    line = Timeline(tmp_path / "timeline.json", ORIGIN)
    for start, seconds in ((0, 4), (1, 1), (3, 3), (8, 4)):  # covered: 0-6, 8-12
        line.span("rollout-0", "generate", ORIGIN + start, seconds)
    line.span("driver", "wait", ORIGIN, 9)
    line.span("driver", "sync", ORIGIN + 8, 2)
    line.close()
    trace = read(files(tmp_path))
    assert trace.window() == (ORIGIN, ORIGIN + 12)
    assert trace.idle("rollout-0", ORIGIN, ORIGIN + 12) == pytest.approx(2 / 12)
    assert trace.idle("rollout-0", ORIGIN + 5, ORIGIN + 9) == pytest.approx(2 / 4)
    assert trace.idle("rollout-0", ORIGIN + 6, ORIGIN + 8) == 1
    assert trace.idle("driver", ORIGIN, ORIGIN + 12) == pytest.approx(10 / 12)
    assert trace.idle("rollout-1", ORIGIN, ORIGIN + 12) == 1
    assert busy([], 0, 1) == 0
    assert read([]).window() is None


def test_events_of_many_threads_are_all_written_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(timeline, "BUFFERED", 50)
    line = Timeline(tmp_path / "timeline.json", ORIGIN)

    def work(actor: int) -> None:
        for number in range(200):
            line.span(f"rollout-{actor}", "generate", ORIGIN + number, 1, number=number)

    threads = [threading.Thread(target=work, args=(actor,)) for actor in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line.close()
    found = [e for e in events(tmp_path / "timeline.json") if e["ph"] == "X"]
    seen = Counter((e["tid"], e["args"]["number"]) for e in found)
    assert len(seen) == 1600 and set(seen.values()) == {1}
    # Every actor is described once, before its first event.
    assert len({e["tid"] for e in found}) == 8


def test_a_long_run_is_cut_into_files_that_each_stand_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(timeline, "PART", 2000)
    line = Timeline(tmp_path / "timeline.json", ORIGIN)
    for step in range(30):
        line.span("learner-0", "update", ORIGIN + step, 0.5, step=step)
        line.flush()
    line.close()
    parts = files(tmp_path)
    assert [p.name for p in parts[:3]] == ["timeline.json", "timeline-2.json", "timeline-3.json"]
    for part in parts:
        assert part.stat().st_size < 2500
        assert {"thread_name", "process_name", "origin"} <= {e["name"] for e in events(part)}
    spans = read(parts).spans["learner-0"]
    assert [span.begin - ORIGIN for span in spans] == list(range(30))
    # The end of a file is enough for a live view.
    tail = read(parts[:1], last=700).spans["learner-0"]
    assert 0 < len(tail) < 10
    assert tail[-1] == read(parts[:1]).spans["learner-0"][-1]


def test_a_report_has_the_idle_time_of_each_actor_over_all_attempts(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: x")
    for busy_for in (3, 1):  # two attempts of 4 s
        line = attempt_timeline(tmp_path)
        line.span("learner-0", "update", ORIGIN, busy_for)
        line.span("rollout-10", "generate", ORIGIN, 4)
        line.span("rollout-9", "generate", ORIGIN + 1, 1)
        line.instant("rollout-9", "restart", ORIGIN + 2)
        line.instant("driver", "step", ORIGIN + 4)
        line.close()
    found = {a.name: (round(a.busy, 6), round(a.idle, 6), a.events) for a in actors(tmp_path)}
    assert list(found) == ["learner-0", "rollout-9", "rollout-10"]
    assert found == {
        "learner-0": (4, 0.5, {}),
        "rollout-9": (2, 0.75, {"restart": 2}),
        "rollout-10": (8, 0, {}),
    }
    page = write_report(tmp_path).read_text()
    for attempt in (1, 2):
        assert f'href="logs/attempt-{attempt}/timeline.json"' in page
    assert "50.0 %" in page and "restart 2" in page and "perfetto" in page


def test_every_attempt_has_a_timeline_of_its_own(tmp_path: Path):
    first = attempt_timeline(tmp_path)
    assert first.path == tmp_path / "logs" / "attempt-1" / "timeline.json"
    first.instant("driver", "step", first.origin)
    first.close()
    assert attempt_timeline(tmp_path).path.parent.name == "attempt-2"
    (tmp_path / "logs" / "attempt-2").mkdir()  # a driver's log made it
    assert attempt_timeline(tmp_path).path.parent.name == "attempt-2"
