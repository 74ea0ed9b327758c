"""Metrics files, trackers, reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.launch import run_locally
from cluster.monitors import widening
from cluster.plots import sample_grid
from cluster.report import write_report
from cluster.run import describe
from cluster.tracking import MetricsFile, TensorBoardTracker


def test_metrics_survive_a_torn_line_and_truncate(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        file.append({"kind": "train", "step": step, "loss": float("nan") if step == 1 else 0.5})
    with file.path.open("a") as handle:
        handle.write('{"kind": "train", "step": 4, "lo')
    assert [row["step"] for row in file.read()] == [0, 1, 2, 3]
    assert file.read()[1]["loss"] is None
    file.truncate(2)
    assert [row["step"] for row in file.read()] == [0, 1, 2]
    file.append({"kind": "train", "step": 3})
    assert all(json.loads(line) for line in file.path.read_text().splitlines())


def test_tensorboard_gets_every_number(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]


def test_a_report_is_one_file_with_all_parts(digits_recipe, tmp_path: Path):
    recipe = digits_recipe("steps=2", f"run_dir={tmp_path}")
    path = tmp_path / "run"
    run_locally(recipe, path, Console(quiet=True))
    describe(path, recipe, recipe.prompts.load())
    page = write_report(path).read_text()
    parts = ["Before and after", "Samples at the same seeds", "By timestep", "Seconds per step"]
    parts += ["Idle share", "digit_held_out/accuracy", "Fréchet", "nfe", "deepspeed", "group_size"]
    for part in parts:
        assert part in page, part
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:image/png;base64,' in page


def test_names_are_escaped_and_an_empty_run_reports(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: <script>alert(1)</script>")
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert "No evaluation yet" in page


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no recipe\.yaml"):
        write_report(tmp_path)


def test_video_frames_lie_side_by_side():
    import io

    from PIL import Image

    media = np.zeros((3, 4, 8, 8, 1), np.uint8)
    image = Image.open(io.BytesIO(sample_grid(media, scale=1)))
    assert image.size == (3 * 33 + 1, 10)


@pytest.mark.parametrize(
    ("gaps", "since"),
    [
        ([0.1, 0.2, 0.3, 0.4], 3),
        ([0.4, 0.1, 0.2, 0.3, 0.4, 0.5], 4),
        ([0.1, 0.2, 0.3], 0),
        ([0.1, 0.2, 0.3, 0.3], 0),
        ([0.1, None, 0.2, 0.3, 0.4], 3),
        ([], 0),
    ],
)
def test_a_gap_that_widens_several_evaluations_in_a_row_is_noticed(
    gaps: list[float | None], since: int
):
    assert widening(gaps) == since
