"""``rectify evaluate``: a run's own numbers come back exactly; others are judged alike; refusals."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster.cli_measure import curves, evaluate
from cluster.evaluate import evaluate_checkpoints
from cluster.launch import run_locally
from cluster.measured import MeasureError
from cluster.run import describe
from recipes.schema import AnyRecipe, Recipe, recipe_type
from recipes.source import load

DIGITS = [
    "steps=2",
    "rollout.steps=4",
    "evaluation={every: 1, samples: 20, steps: 3, rewards: [{kind: digit_held_out}]}",
    "optimizer.learning_rate=3e-2",
    "checkpoints={every: 1, keep_last: 9}",
]
STUDENT = [
    "steps=2",
    "distill.warmup_steps=1",
    "rollout.prompts_per_step=4",
    "rollout.batch_size=8",
    "learner.micro_batch=8",
    "evaluation={every: 2, samples: 20, rewards: []}",
    "optimizer.learning_rate=1e-3",
    "tracking=[]",
]
SUDOKU = [
    "steps=1",
    "prompts={kind: sudoku, count: 8}",
    "rollout.length=12",
    "rollout.block_length=4",
    "rollout.steps=6",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rewards=[{kind: function, path: 'tests.cluster.test_evaluate:length'}]",
    "learner.ranks=1",
    "evaluation={samples: 6, prompts: {kind: sudoku, split: validation, count: 4}}",
    "evaluation.gap={samples: 2, orders: 2}",
    "optimizer.learning_rate=3e-2",
    "optimizer.warmup_steps=0",
    "checkpoints={every: 1, keep_best: null}",
    "tracking=[]",
]

app = typer.Typer()
app.command()(evaluate)
app.command()(curves)


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random weights can already earn."""
    return [float(len(text)) for text in completions]


def finished(recipe: AnyRecipe, path: Path) -> Path:
    run_locally(recipe, path, Console(quiet=True))
    describe(path, recipe, recipe.prompts.load())
    return path


@pytest.fixture(scope="module")
def digits_run(
    digits_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return finished(digits_recipe(*DIGITS), tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def digits(digits_run: Path, tmp_path: Path) -> Path:
    """A run of its own that a test may damage."""
    return Path(shutil.copytree(digits_run, tmp_path / "digits"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load(Path("digits/two_step"), recipe_type, STUDENT).value
    return finished(recipe, tmp_path_factory.mktemp("runs") / "student")


@pytest.fixture(scope="module")
def sudoku(llada_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [*SUDOKU, f"policy.checkpoint={llada_directory}"]
    recipe = load(Path("sudoku/spg"), Recipe, overrides).value
    return finished(recipe, tmp_path_factory.mktemp("runs") / "sudoku")


def rectify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def logged(run: Path, step: int) -> dict[str, float]:
    """What the run measured itself by samples of its policy."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if row["kind"] == "evaluation" and row["step"] == step)
    return {key: row[key] for key in row if key.startswith(("evaluation/", "gap/"))}


def measured(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "evaluation.json").read_text())["checkpoints"]


def test_a_runs_own_recipe_gives_exactly_what_the_run_logged(digits_run: Path, tmp_path: Path):
    result = rectify(digits_run, digits_run / "recipe.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = measured(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["metrics"] == logged(digits_run, row["step"])
        assert (row["nfe"], row["samples"]) == (3, 20)  # evaluation.steps, not rollout.steps
    assert {"evaluation/digit_held_out/accuracy", "evaluation/digit_held_out/frechet"} <= set(
        rows[0]["metrics"]
    )
    assert rows[0]["metrics"] != rows[1]["metrics"] != logged(digits_run, 0)
    with (tmp_path / "out" / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [*table[0]][:4] == ["label", "step", "nfe_per_sample", "seconds"]
    for line, row in zip(table, rows, strict=True):
        assert (line["label"], line["step"]) == (f"digits step {row['step']}", str(row["step"]))
        assert {key: float(line[key]) for key in row["metrics"]} == row["metrics"]
    assert (tmp_path / "out" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "digits step 2" in page and 'src="data:image/svg+xml;base64,' in page
    assert "http://" not in page and "https://" not in page
    assert "digits step 1" in result.stdout and str(tmp_path / "out") in result.stdout


def test_texts_come_with_their_gap_as_the_run_logged_them(sudoku: Path, tmp_path: Path):
    recipe = load(sudoku / "recipe.yaml", recipe_type).value
    evaluate_checkpoints([sudoku / "checkpoints" / "step_000001"], recipe, out=tmp_path / "out")
    (row,) = measured(tmp_path / "out")
    assert row["metrics"] == logged(sudoku, 1)
    assert {"gap/gap", "evaluation/function/mean", "evaluation/eos_rate"} <= set(row["metrics"])


def test_a_student_is_drawn_its_own_way_and_judged_by_the_recipe(
    student: Path, digits_run: Path, tmp_path: Path
):
    policy = student / "checkpoints" / "step_000002" / "policy"
    arguments = [student, policy, digits_run, digits_run / "recipe.yaml", "--out", tmp_path / "out"]
    assert rectify(*arguments).exit_code == 0
    own, alone, first, second = measured(tmp_path / "out")
    # Draws, prompts and seed of the two recipes are one; sampler and plan are the student's.
    mean = "evaluation/digit_log_prob/mean"
    assert own["metrics"][mean] == logged(student, 2)[mean]
    assert [row["nfe"] for row in (own, alone, first, second)] == [2, 2, 3, 3]
    assert "evaluation/digit_held_out/frechet" in own["metrics"]
    assert "evaluation/digit_held_out/frechet" not in logged(student, 2)
    assert alone["step"] is None and alone["label"] == "policy"
    assert alone["metrics"][mean] == pytest.approx(own["metrics"][mean], abs=1e-4)
    assert second["metrics"] == logged(digits_run, 2)
    evaluate_checkpoints([student], load(student / "recipe.yaml", recipe_type).value,
                         out=tmp_path / "own")  # fmt: skip
    assert measured(tmp_path / "own")[0]["metrics"] == logged(student, 2)


def test_steps_samples_and_changes_are_followed(digits_run: Path, tmp_path: Path):
    recipe = digits_run / "recipe.yaml"
    options = ["--step", 2, "--samples", 6, "--set", "evaluation.steps=2"]
    assert rectify(digits_run, recipe, *options, "--out", tmp_path / "a").exit_code == 0
    again = [*options, "--set", "seed=7", "--out", tmp_path / "b"]
    assert rectify(digits_run, recipe, *again).exit_code == 0
    (row,), (other,) = measured(tmp_path / "a"), measured(tmp_path / "b")
    assert (row["step"], row["nfe"], row["samples"]) == (2, 2, 6)
    assert row["metrics"] != other["metrics"]


def test_directories_are_numbered_where_it_is_called(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation").mkdir()
    arguments = [digits_run, digits_run, digits_run / "recipe.yaml", "--step", 1, "--samples", 1]
    assert rectify(*arguments).exit_code == 0
    assert len(measured(tmp_path / "evaluation-2")) == 1  # a run given twice is one


def test_a_damaged_checkpoint_is_passed_over_unless_asked_for(digits: Path, tmp_path: Path):
    state = digits / "checkpoints" / "step_000002" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    recipe = digits / "recipe.yaml"
    result = rectify(digits, recipe, "--samples", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "passed over" in result.stderr and "step_000002 is damaged" in result.stderr
    assert [row["step"] for row in measured(tmp_path / "out")] == [1]
    for arguments in ([digits, recipe, "--step", 2], [state.parent, recipe]):
        result = rectify(*arguments, "--out", tmp_path / "not")
        assert result.exit_code == 2 and "step_000002 is damaged" in result.stderr
    shutil.rmtree(digits / "checkpoints")
    result = rectify(digits, recipe, "--out", tmp_path / "not")
    assert result.exit_code == 2 and "holds no checkpoint" in result.stderr
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits"], "the last argument is the RECIPE"),
        (["digits/recipe.yaml"], "the last argument is the RECIPE"),
        (["digits", "digits/flash_grp"], "no such recipe, did you mean 'digits/flash_grpo'"),
        (["nowhere", "digits/flash_grpo"], "nowhere is no directory; give a run"),
        (["digits/samples", "digits/flash_grpo"], "samples is no checkpoint: give a run"),
        (["digits", "sudoku/spg"], "images, and recipe sudoku-spg evaluates text; give a"),
        (["digits", "digits/flash_grpo", "--step", "9"], "are: step_000001, step_000002"),
        (["digits/checkpoints/step_000001", "digits/flash_grpo", "--step", "1"], "no run directory"),
        (["digits", "digits/moving_flash_grpo"], "makes images, and recipe moving-digits-flash-grpo"),
        (["digits", "digits/flash_grpo", "--set", "evaluation.prompts={kind: file, path: a.txt}"],
         "this model needs exactly one; give a recipe whose evaluation.prompts it can take"),
        (["digits", "digits/flash_grpo", "--out", "digits"], "give --out a new directory"),
        (["digits", "digits/flash_grpo", "--set", "evaluation.sample=1"], "did you mean 'samples'"),
        (["digits", "digits/flash_grpo", "--set", "evaluation.rewards.1.kind=sudoku",
          "--samples", "2"], "'sudoku' failed on 2 of 2 samples"),
        (["digits", "digits/two_step", "--set", "rewards=[]", "--set", "evaluation.rewards=[]"],
         "has no rewards; name some"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: list[str], words: str, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(digits.parent)
    (digits.parent / "a.txt").write_text("a horse")
    before = sorted(digits.parent.rglob("*"))
    result = rectify(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    assert sorted(digits.parent.rglob("*")) == before


def test_texts_are_not_judged_by_a_recipe_for_images(sudoku: Path, tmp_path: Path):
    recipe: Any = load(Path("digits/flash_grpo"), recipe_type).value
    for path in (sudoku, sudoku / "checkpoints" / "step_000001" / "policy"):
        with pytest.raises(MeasureError, match=r"makes text, .* give a recipe for text"):
            evaluate_checkpoints([path], recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
