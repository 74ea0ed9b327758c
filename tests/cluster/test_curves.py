"""``rectify curves``: groups, bands by hand, common axes, refusals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from cluster.cli_measure import curves, evaluate
from cluster.curves import band, compare_curves, grouped, read_run
from cluster.measured import MeasureError
from cluster.tracking import MetricsFile

app = typer.Typer()
app.command()(evaluate)
app.command()(curves)

MEAN = "evaluation/held/mean"
RECIPE: dict[str, Any] = {
    "name": "runs",
    "rl": {"kind": "flash_grpo", "clip_range": 1e-3},
    "rewards": [{"kind": "ink", "weight": 1.0}],
    "workers": {"count": 1},
}


def made(
    path: Path,
    values: Sequence[float | None],
    seed: int = 0,
    pace: float = 1.0,
    metric: str = MEAN,
    **changed: Any,
) -> Path:
    """A run evaluated every ten steps; a step is 5 network evaluations and ``pace`` seconds."""
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "seed": seed, **changed}))
    file = MetricsFile(path / "metrics.jsonl")
    for place, value in enumerate(values):
        step = 10 * place
        if step:
            costs = {"cost/forwards": 5.0 * step, "cost/seconds": pace * step}
            file.append({"kind": "train", "step": step, "time": 1e9, **costs})
        numbers = {metric: value, "evaluation/held/std": 0.1, "gap/gap": 0.5}
        file.append({"kind": "evaluation", "step": step, "time": 1e9, **numbers})
    return path


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def rectify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["curves", *map(str, arguments)])


def test_a_band_is_students_interval_of_the_mean():
    mean, low, high = band(np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]))
    # s = sqrt(7/3), t(0.975, 2) = 4.302653: half = t s / sqrt(3)
    assert mean == pytest.approx([7 / 3, 5])
    assert high - mean == pytest.approx([4.302653 * (7 / 3) ** 0.5 / 3**0.5, 0])
    assert mean - low == pytest.approx(high - mean)
    mean, low, high = band(np.array([[1.0, 2.0]]))
    assert list(mean) == [1, 2] and np.isnan(low).all() and np.isnan(high).all()


def test_seeds_make_a_group_wherever_they_ran(tmp_path: Path):
    one = made(tmp_path / "a", [0.0, 1.0, 2.0])
    two = made(tmp_path / "b", [0.0, 3.0, 4.0], 1, name="else", workers={"count": 2})
    measured = compare_curves([one, two], out=tmp_path / "out")
    rows = table(tmp_path / "out")
    assert [*rows[0]] == [
        "group", "metric", "step", "forwards", "seconds", "n", "mean", "low", "high"
    ]  # fmt: skip
    assert [row["step"] for row in rows] == ["0", "10", "20"]  # costs agree: no other rows
    assert {row["group"] for row in rows} == {"runs"} and {row["n"] for row in rows} == {"2"}
    numbers = [[float(row[key]) for key in ("forwards", "seconds", "mean")] for row in rows]
    assert numbers == [[0, 0, 0], [50, 10, 2], [100, 20, 3]]
    # Of 1 and 3: s = sqrt(2), t(0.975, 1) = 12.7062: half = t s / sqrt(2)
    assert float(rows[1]["high"]) == pytest.approx(2 + 12.7062, abs=1e-4)
    assert float(rows[1]["low"]) == pytest.approx(2 - 12.7062, abs=1e-4)
    assert measured.notes == []
    assert measured.table.rows == [
        ["held/mean", "runs", "2", "20", "100", "20", "3", "-9.706", "15.71"]
    ]


def test_where_seconds_differ_runs_are_interpolated_onto_the_range_that_all_have(tmp_path: Path):
    one = made(tmp_path / "a", [0.0, 1.0, 2.0])
    two = made(tmp_path / "b", [0.0, 1.0, 2.0], 1, pace=2.0)
    compare_curves([one, two], out=tmp_path / "out")
    rows = table(tmp_path / "out")
    at_steps = [row for row in rows if row["step"]]
    assert [float(row["seconds"]) for row in at_steps] == [0, 15, 30]
    between = [row for row in rows if not row["step"]]
    assert {row["forwards"] for row in between} == {""}
    assert [(float(r["seconds"]), float(r["mean"])) for r in between] == [
        (0, 0), (10, 0.75), (20, 1.5)
    ]  # fmt: skip
    assert float(between[1]["high"]) == pytest.approx(0.75 + 12.7062 * 0.25, abs=1e-4)


def test_a_group_is_shown_at_the_steps_that_all_of_its_runs_have(tmp_path: Path):
    one = made(tmp_path / "a", [0.0, None, 2.0, 3.0])  # not finite at step 10
    two = made(tmp_path / "b", [1.0, 1.0, 4.0], 1)
    compare_curves([one, two], out=tmp_path / "out")
    steps = [(float(r["step"]), float(r["mean"])) for r in table(tmp_path / "out") if r["step"]]
    assert steps == [(0, 0.5), (20, 3)]


def test_groups_are_named_by_what_differs(tmp_path: Path):
    rl = RECIPE["rl"]
    paths = [
        made(tmp_path / "a", [0.0, 1.0]),
        made(tmp_path / "b", [0.0, 2.0], 1),
        made(tmp_path / "c", [0.0, 3.0], rl={**rl, "clip_range": 0.01}),
    ]
    groups = grouped([read_run(path) for path in paths])
    assert [label for label, _ in groups] == ["rl.clip_range=0.001", "rl.clip_range=0.01"]
    assert [[run.path.name for run in own] for _, own in groups] == [["a", "b"], ["c"]]
    # What only one kind has is left out where the kind tells them apart.
    other = made(tmp_path / "d", [0.0, 1.0], rl={"kind": "spg", "beta": 2, "clip_range": 1e-3})
    labels = [label for label, _ in grouped([read_run(path) for path in (paths[0], other)])]
    assert labels == ["rl.kind=flash_grpo", "rl.kind=spg"]
    more = made(tmp_path / "e", [0.0, 1.0], rewards=[*RECIPE["rewards"], {"kind": "sudoku"}])
    labels = [label for label, _ in grouped([read_run(path) for path in (paths[0], more)])]
    assert labels == ["rewards.1.kind=-", "rewards.1.kind=sudoku"]


def test_two_runs_of_one_seed_are_said_to_be_no_two_samples(tmp_path: Path):
    paths = [made(tmp_path / "a", [0.0, 1.0]), made(tmp_path / "b", [0.0, 1.0])]
    (note,) = compare_curves([*paths, paths[0]], out=tmp_path / "out").notes
    assert "b has the seed 0 of another run" in note
    assert note in (tmp_path / "out" / "curves.html").read_text()


def test_metrics_are_chosen_with_or_without_the_prefix(tmp_path: Path):
    path = made(tmp_path / "a", [0.0, 1.0])
    compare_curves([path], ["held/std", "gap/gap", MEAN], tmp_path / "out")
    rows = table(tmp_path / "out")
    assert [r["metric"] for r in rows[::2]] == ["evaluation/held/std", "gap/gap", MEAN]
    assert {(r["n"], r["low"], r["high"]) for r in rows} == {("1", "", "")}


def test_runs_without_costs_have_curves_over_steps(tmp_path: Path):
    path = made(tmp_path / "a", [0.0, 1.0])
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if "train" not in line))
    compare_curves([path], out=tmp_path / "out")
    assert [(r["step"], r["seconds"]) for r in table(tmp_path / "out")] == [
        ("0", ""),
        ("10", ""),
    ]


def test_the_command_writes_and_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [0.0, 1.0])
    made(tmp_path / "b", [0.0, 2.0], rl={"kind": "<script>[/red]"})
    for name in ("curves", "curves-2"):
        result = rectify("a", "b")
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "curves.csv", "curves.html", "curves.png"
        ]  # fmt: skip
    assert "held/mean" in result.stdout and "curves-2/curves.html" in result.stdout
    page = (tmp_path / "curves" / "curves.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    assert (tmp_path / "curves" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is no run directory: it has no recipe.yaml"),
        (["a", "empty"], "metrics.jsonl holds no evaluation"),
        (
            ["a", "--metric", "held/man"],
            "did you mean 'evaluation/held/mean'? There are: eval",
        ),
        (["a", "other"], "no evaluated reward in common"),
        (["a", "never"], "at no step in common; leave out one of the runs"),
        (["a", "torn"], "recipe.yaml cannot be read"),
        (["a", "--out", "b"], "is a file or not empty; give --out a new directory"),
        (["a", "--out", "b/recipe.yaml/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", [None, 1.0])
    made(tmp_path / "b", [0.0], 1)
    made(tmp_path / "never", [1.0, None], 2)
    made(tmp_path / "empty", [])
    made(tmp_path / "other", [0.0, 1.0], metric="evaluation/else/mean")
    (made(tmp_path / "torn", [0.0]) / "recipe.yaml").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    result = rectify(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr.replace("\n", " ")
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_one_task_are_compared_in_what_all_have(tmp_path: Path):
    one = made(tmp_path / "a", [0.0, 1.0])
    two = made(tmp_path / "b", [0.0, 1.0], metric="evaluation/else/mean", rl={"kind": "spg"})
    assert compare_curves([one, two], ["gap/gap"], tmp_path / "out").table.rows[0][0] == "gap/gap"
    with pytest.raises(MeasureError, match="no metric 'held/mean' in every run"):
        compare_curves([one, two], ["held/mean"], tmp_path / "other")
