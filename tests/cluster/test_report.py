"""Metrics files, trackers, reports."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from rich.console import Console

from cluster import report
from cluster.launch import run_locally
from cluster.media import write_evaluated
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


def test_evaluations_are_read_without_the_steps_between(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.evaluations() == []
    for step in range(6):
        kind = "train" if step % 3 else "evaluation"
        file.append({"kind": kind, "step": step, "reward/mean": float("nan"), "loss": 0.1 * step})
    with file.path.open("a") as handle:
        handle.write('{"kind": "evaluation", "step": 6, "lo')
    assert [row["step"] for row in file.evaluations()] == [0, 3]
    assert file.evaluations() == [row for row in file.read() if row["kind"] == "evaluation"]


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


def video_run(path: Path, prompt: str, *steps: int) -> Path:
    """A run directory with the videos of evaluations, as a run writes them."""
    (path / "recipe.yaml").write_text("name: videos")
    (path / "evaluation").mkdir()
    generator = np.random.default_rng(0)
    for step in steps:
        directory = path / "samples" / f"step_{step:06d}"
        directory.mkdir(parents=True)
        media = generator.integers(0, 256, (2, 4, 8, 8, 1), dtype=np.uint8)
        prompts = [prompt, "two"]
        write_evaluated(directory, media, prompts)
        samples = [{"prompt": text, "scores": {"ink": [0.25], "ocr": [None]}} for text in prompts]
        document = json.dumps({"step": step, "samples": samples})
        (path / "evaluation" / f"step_{step:06d}.json").write_text(document)
    return path


def sources(page: str, tag: str) -> list[str]:
    return re.findall(rf'<{tag}[^>]* src="([^"]*)"', page)


def test_videos_play_within_the_page_beside_their_contact_sheets(tmp_path: Path):
    run = video_run(tmp_path, "one", 0, 5, 10)
    page = write_report(run).read_text()
    for tag, kind, ending in (("video", "video/mp4", "mp4"), ("img", "image/jpeg", "jpg")):
        held = [
            base64.b64decode(s.removeprefix(f"data:{kind};base64,")) for s in sources(page, tag)
        ]
        files = [
            run / "samples" / f"step_{step:06d}" / f"{sample}.{ending}"
            for sample in ("000_one", "001_two")
            for step in (0, 10)
        ]
        assert held == [file.read_bytes() for file in files]
    assert page.count("step 000000, ink 0.25, ocr ") == 2
    assert page.count("Samples at the same seeds") == 1 and "image/png" not in page


def test_videos_too_large_for_the_page_are_linked_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "EMBEDDED", 100)
    run = video_run(tmp_path, "狐 & fox", 0, 5)
    page = write_report(run).read_text()
    linked = sources(page, "video")
    assert len(linked) == 4 and all("狐" not in address for address in linked)
    assert all((run / unquote(address)).is_file() for address in linked)
    assert "The videos lie in samples/ beside this file" in page


def test_prompts_of_videos_are_escaped(tmp_path: Path):
    prompt = '"><script>alert(1)</script>{{ 7 * 7 }}'
    page = write_report(video_run(tmp_path, prompt, 0)).read_text()
    assert "<script>" not in page and "49" not in re.sub(r'src="[^"]*"', "", page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}") == 2


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
