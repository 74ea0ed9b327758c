"""The live view reads a run directory alone, whatever state it is in."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.timeline import Timeline
from cluster.top import NoRun, duration, order, render, snapshot, sparkline

NOW = 1_800_000_000.0


def keep(run: Path, step: int) -> None:
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")


def make_run(path: Path, steps: int = 100, done: int = 60) -> Path:
    """Steps of 2 s, 10 samples each; an evaluation of 20 s in the middle of the last 40."""
    path.mkdir()
    (path / "recipe.yaml").write_text(f"name: x\nsteps: {steps}\n")
    (path / "versions.json").write_text('{"rectify": "0.1.0", "torch": "2.13.0"}')
    keep(path, 50)
    (path / "checkpoints" / "step_000060").mkdir()  # being written
    attempt = path / "logs" / "attempt-2"
    attempt.mkdir(parents=True)
    (path / "logs" / "attempt-1").mkdir()
    (attempt / "driver.log").write_text(
        "2026-01-01 10:00:00,000 INFO cluster.run: checkpoint\n"
        "2026-01-01 10:00:01,000 WARNING cluster.pool: rollout actor 1 \x1b[2Jlost\n"
    )
    rows = []
    for step in range(1, done + 1):
        if step == 40:
            rows.append({"kind": "evaluation", "step": 40, "time/evaluate": 20.0,
                         "evaluation/ink/mean": 0.75, "time": NOW - 2 * (done - step)})  # fmt: skip
        rows.append({"kind": "train", "step": step, "time": NOW - 2 * (done - step),
                     "time/step": 2.0, "time/rollout": 1.25, "reward/ink/mean": step / 100,
                     "reward/[bold]/mean": None, "rollout/samples": 10, "idle/rollout": 0.25,
                     "rollout/staleness_mean": 0.5, "cost/nfe": 1000.0 * step})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timeline = Timeline(attempt / "timeline.json", NOW - 1000)
    timeline.span("rollout-0", "generate", NOW - 900, 900)
    timeline.span("rollout-10", "generate", NOW - 60, 45)
    timeline.span("rollout-2", "generate", NOW - 30, 30)
    timeline.flush()  # still open
    return path


def shown(run: Path, now: float = NOW, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(snapshot(run, now)))
    return console.export_text()


def test_all_parts_are_computed_from_the_files(tmp_path: Path):
    shot = snapshot(make_run(tmp_path / "run"), NOW + 1)
    assert (shot.step, shot.total, shot.age, shot.checkpoint) == (60, 100, 1.0, "step_000050")
    # 40 steps of 2 s and an evaluation of 20 s among them.
    assert shot.pace == pytest.approx(2.5)
    assert shot.idle == pytest.approx({"rollout-0": 0.0, "rollout-2": 0.5, "rollout-10": 0.25})
    text = shown(tmp_path / "run", NOW + 1)
    for part in ("60/100", "ETA 1 min 40 s", "24 steps/min", "5 samples/s", "ink", "0.6",
                 "rollout 1.25 s", "idle in the last step: rollout 25%", "staleness 0.5",
                 "nfe 60,000", "evaluation at step 40", "0.75", "actor 1", "torch 2.13.0",
                 "[bold]"):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text and "\N{REPLACEMENT CHARACTER}[2Jlost" in text
    assert "no line for" not in text
    assert [text.index(f"rollout-{i}") for i in (0, 2, 10)] == sorted(
        text.index(f"rollout-{i}") for i in (0, 2, 10)
    )


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for step in (999_999, 1_000_000):
        keep(run, step)
    assert snapshot(run, NOW).checkpoint == "step_1000000"


def test_a_run_that_writes_nothing_any_more_is_told_from_one_that_is_done(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert "no line for 1 h 0 min" in shown(run, NOW + 3600)
    assert "no line for" not in shown(run, NOW + 9)
    done = make_run(tmp_path / "done", steps=60)
    text = shown(done, NOW + 3600)
    assert "done" in text and "no line for" not in text and "ETA" not in text


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("steps: 7\n")
    text = shown(tmp_path)
    assert "0/7" in text and "no step yet" in text and "no checkpoint" in text


def test_an_evaluation_further_back_than_the_tail_is_found(tmp_path: Path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("cluster.top.TAIL", 600)
    assert snapshot(run, NOW).evaluation is None
    (run / "evaluation").mkdir()
    document = {"step": 40, "metrics": {"evaluation/ink/mean": 0.75}, "samples": []}
    (run / "evaluation" / "step_000040.json").write_text(json.dumps(document))
    shot = snapshot(run, NOW)
    assert len(shot.train) == 2 and shot.step == 60
    assert shot.evaluation == {"step": 40, "evaluation/ink/mean": 0.75}
    (run / "evaluation" / "step_000060.json").write_text('{"step": 60, "met')
    assert snapshot(run, NOW).evaluation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no run directory: recipe.yaml cannot be read"),
        ("steps: [", "is damaged"),
        ("- 1", "says no number of steps"),
    ],
)
def test_what_is_no_run_is_one_message_and_status_2(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(NoRun, match=message):
        snapshot(tmp_path, NOW)
    result = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert result.exit_code == 2
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) <= 3


def test_where_no_terminal_is_it_prints_once(tmp_path: Path):
    result = CliRunner().invoke(app, ["top", str(make_run(tmp_path / "run"))])
    assert result.exit_code == 0
    assert result.output.count("60/100") == 1


def test_in_a_terminal_it_looks_again_and_q_ends_it(tmp_path: Path):
    run = make_run(tmp_path / "run")
    ours, theirs = pty.openpty()
    program = (
        "from cluster import cli_top; cli_top.EVERY = 0.1; from cluster.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "top", str(run)],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )  # fmt: skip
    os.close(theirs)
    try:
        wait_for(ours, "60/100")
        with (run / "metrics.jsonl").open("a") as file:
            row = {"kind": "train", "step": 61, "time": time.time(), "time/step": 2.0}
            file.write(json.dumps(row) + "\n")
        wait_for(ours, "61/100")
        os.write(ours, b"q")
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                read(ours)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other side is closed
        return ""


def wait_for(terminal: int, text: str) -> None:
    seen, deadline = "", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([terminal], [], [], 0.2)[0]:
            seen += read(terminal)


def test_small_parts():
    assert sparkline([0, None, 7, 3.5]) == "▁ █▅"
    assert sparkline([2, 2]) == "▄▄" and sparkline([None]) == ""
    assert [duration(s) for s in (0, 59, 61, 7260, 90000)] == [
        "0 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"
    ]  # fmt: skip
    tracks = ["rollout-10", "driver", "rollout-9", "reward-ink-2-1"]
    assert sorted(tracks, key=order) == ["driver", "reward-ink-2-1", "rollout-9", "rollout-10"]
