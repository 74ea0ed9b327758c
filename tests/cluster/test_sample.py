"""``rectify sample``: a run's samples come back bit for bit; bad input is one message and no file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cluster.cli import app, main
from cluster.launch import run_locally
from cluster.run import describe
from cluster.sample import SampleError, draw, open_checkpoint, write
from recipes.schema import Recipe, recipe_type
from recipes.source import load
from rollout.masked import DecodePlan
from tests.cluster.test_full_disk import files_at_most

DIGITS = [
    "steps=3",
    "rollout.steps=4",
    "evaluation.rewards=[]",
    "evaluation.every=1",
    "optimizer.learning_rate=3e-2",
    "checkpoints={every: 1, keep_last: 9}",
]
SUDOKU = [
    "steps=1",
    "prompts={kind: sudoku, count: 8}",
    "rollout.length=12",
    "rollout.block_length=4",
    "rollout.steps=6",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rewards=[{kind: function, path: 'tests.cluster.test_sample:length'}]",
    "learner.ranks=1",
    "evaluation={samples: 6, steps: 3, prompts: {kind: sudoku, split: validation, count: 4}}",
    "optimizer.learning_rate=3e-2",
    "optimizer.warmup_steps=0",
    "checkpoints={every: 1, keep_best: null}",
    "tracking=[]",
]


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random weights can already earn."""
    return [float(len(text)) for text in completions]


def finished(recipe: Recipe, path: Path) -> Path:
    run_locally(recipe, path, Console(quiet=True))
    describe(path, recipe, recipe.prompts.load())
    return path


@pytest.fixture(scope="module")
def digits_run(
    digits_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return finished(digits_recipe(*DIGITS), tmp_path_factory.mktemp("digits"))


@pytest.fixture
def digits(digits_run: Path, tmp_path: Path) -> Path:
    """A run of its own that a test may damage."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def sudoku(llada_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [*SUDOKU, f"policy.checkpoint={llada_directory}"]
    recipe = load(Path("sudoku/spg"), Recipe, overrides).value
    return finished(recipe, tmp_path_factory.mktemp("sudoku"))


@pytest.fixture(scope="module")
def video_policy(random_wan: Callable[..., Path]) -> Path:
    """Of clips of three frames."""
    return random_wan([1, 3, 8, 8], [["cat", "dog"], ["left", "right"]])


def rectify_sample(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def document(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "samples.json").read_text())


def test_a_checkpoint_gives_the_evaluation_samples_of_its_step(digits: Path, tmp_path: Path):
    grids: set[bytes] = set()
    for step in (1, 3):
        out = tmp_path / f"out-{step}"
        result = rectify_sample(digits, "--step", step, "--count", 20, "--out", out)
        assert result.exit_code == 0, result.stderr
        evaluated = json.loads((digits / "evaluation" / f"step_{step:06d}.json").read_text())
        made = document(out)
        assert made["step"] == step and made["seed"] == 0 and made["sampler"]["steps"] == 4
        for mine, theirs in zip(made["samples"], evaluated["samples"], strict=True):
            assert (mine["prompt"], mine["seed"]) == (theirs["prompt"], theirs["seed"])
        grid = (out / "grid.png").read_bytes()
        assert grid == (digits / "samples" / f"step_{step:06d}" / "grid.png").read_bytes()
        grids.add(grid)
    assert len(grids) == 2


def test_a_full_disk_is_one_message(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments = ["rectify", "sample", str(digits), "--count", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with files_at_most(100), pytest.raises(SystemExit) as ended:
        main()
    written, said = capsys.readouterr()
    assert ended.value.code == 1
    assert (written, len(said.splitlines())) == ("", 1)
    assert "File too large; make room and repeat the command" in said


def test_the_weights_are_the_averaged_ones(digits: Path):
    source = open_checkpoint(digits)
    assert source.step == 3
    state = load_file(source.label / "optimizer.safetensors")
    trained = source.policy.trainable()
    for name, parameter in trained.items():
        assert torch.equal(parameter, state[f"{name}.ema"])
    assert any(not torch.equal(p, state[f"{n}.weight_fp32"]) for n, p in trained.items())


def test_the_same_command_gives_the_same_files_and_another_seed_others(
    digits: Path, tmp_path: Path
):
    checkpoint = digits / "checkpoints" / "step_000002"
    made: list[dict[str, bytes]] = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = tmp_path / name
        rectify_sample(checkpoint, "--count", 3, "--seed", seed, "--out", out)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    names = ["000_a-handwritten-0.png", "001_a-handwritten-1.png", "002_a-handwritten-2.png"]
    assert sorted(made[0]) == [*names, "grid.png", "samples.json"]
    assert all(made[0][name] != made[2][name] for name in names)


def test_prompts_come_in_turn_and_files_hold_the_pixels(digits: Path, tmp_path: Path):
    drawn = draw(open_checkpoint(digits, 2), ["eight: 8", "3"], count=5, steps=2)
    out = write(drawn, tmp_path / "out")
    made = document(out)
    assert [s["prompt"] for s in made["samples"]] == ["eight: 8", "3", "eight: 8", "3", "eight: 8"]
    assert len({s["seed"] for s in made["samples"]}) == 5
    assert made["sampler"]["steps"] == 2
    for sample, rollout in zip(made["samples"], drawn.rollouts, strict=True):
        assert np.array_equal(
            np.asarray(Image.open(out / sample["file"])), np.asarray(rollout.media)[0, 0, ..., 0]
        )
        assert rollout.forwards == 2


def test_directories_are_never_written_into(digits: Path, tmp_path: Path):
    before = sorted(path for path in (digits / "samples").rglob("*"))
    for name in ("samples-2", "samples-3"):  # samples is the run's own
        assert rectify_sample(digits, "--count", 1).exit_code == 0
        assert (digits / name / "samples.json").is_file()
    assert sorted(path for path in (digits / "samples").rglob("*")) == before
    result = rectify_sample(digits, "--out", digits / "samples-2")
    assert result.exit_code == 2 and "not empty" in result.stderr
    (tmp_path / "empty").mkdir()
    assert rectify_sample(digits, "--count", 1, "--out", tmp_path / "empty").exit_code == 0


def test_a_damaged_checkpoint_is_passed_over_unless_asked_for(digits: Path):
    state = digits / "checkpoints" / "step_000003" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert open_checkpoint(digits).step == 2
    for arguments in ([digits, "--step", 3], [state.parent]):
        result = rectify_sample(*arguments)
        assert result.exit_code == 2
        assert "step_000003 is damaged: optimizer.safetensors has" in result.stderr
    assert not (digits / "samples-2").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["."], "is no checkpoint: give a run directory"),
        (["run/checkpoints/step_000003/policy"], "is no checkpoint"),  # an adapter alone
        (["run", "--step", "9"], "no checkpoint of step 9; there are: step_000001, step_000002"),
        (["run/checkpoints/step_000003", "--step", "1"], "is no run directory"),
        (["run", "--prompt", "3", "--prompt", "a horse"], "'a horse' names 0 of 0, 1, 2"),
        (["run", "--temperature", "1"], "--temperature is for text"),
        (["run", "--out", "run/recipe.yaml"], "is a file"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: list[str], words: str, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(digits.parent)
    before = sorted(digits.parent.rglob("*"))
    result = rectify_sample(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(digits.parent.rglob("*")) == before


def test_a_run_without_a_valid_checkpoint_or_with_another_recipe_is_refused(digits: Path):
    file = digits / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["policy"]["lora"]["rank"] = 8
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SampleError, match=r"does not fit .*was the run's recipe.yaml changed"):
        open_checkpoint(digits)
    file.write_text(yaml.safe_dump({**recipe, "stepz": 1}))
    result = rectify_sample(digits)
    assert result.exit_code == 2 and "did you mean 'steps'" in result.stderr
    shutil.rmtree(digits / "checkpoints")
    with pytest.raises(SampleError, match=r"checkpoints holds no valid checkpoint"):
        open_checkpoint(digits)


def test_completions_are_the_evaluated_ones(sudoku: Path, tmp_path: Path):
    result = rectify_sample(sudoku, "--count", 6, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    mine, theirs, before = (
        [json.loads(line) for line in (path / "completions.jsonl").read_text().splitlines()]
        for path in (tmp_path / "out", *sorted((sudoku / "samples").iterdir(), reverse=True))
    )
    assert [r["prompt"] for r in mine] == [r["prompt"] for r in theirs]
    assert [r["completion"] for r in mine] == [r["completion"] for r in theirs]
    assert [r["completion"] for r in mine] != [r["completion"] for r in before]
    made = document(tmp_path / "out")
    assert [r["seed"] for r in mine] == [s["seed"] for s in made["samples"]]
    sampler = made["sampler"]
    assert (sampler["temperature"], sampler["steps"], sampler["cache"]) == (0.0, 3, "none")


def test_text_at_a_temperature_differs_between_samples(sudoku: Path):
    source = open_checkpoint(sudoku)
    texts = [
        {r.media[0] for r in draw(source, ["1"], count=4, temperature=t).rollouts}
        for t in (None, 2.0)
    ]
    assert [len(found) for found in texts] == [1, 4]
    with pytest.raises(SampleError, match=r"a multiple of 3 \(its blocks\), at most 12"):
        draw(source, count=1, steps=4)


def test_a_policy_directory_is_drawn_by_its_kinds_default(sudoku: Path, tmp_path: Path):
    """All parameters train in this run, so that its policy directory is a whole model."""
    run = open_checkpoint(sudoku)
    source = open_checkpoint(run.label / "policy")
    assert source.plan == DecodePlan(temperature=0.0, exact=True)
    assert source.sampler.config.length == 24
    for name, parameter in run.policy.trainable().items():
        assert torch.equal(parameter, source.policy.trainable()[name])
    assert source.home == sudoku
    with pytest.raises(SampleError, match="no prompts of its own; give --prompt"):
        draw(source)


def test_videos_become_mp4_or_the_gif_that_is_asked_for(video_policy: Path, tmp_path: Path):
    words = ["cat-left", "cat-right", "dog-left", "dog-right", "cat-left"]
    for kind, extra in (("mp4", []), ("gif", ["--format", "gif"])):
        out = tmp_path / kind
        result = rectify_sample(video_policy, "--count", 5, "--steps", 2, "--out", out, *extra)
        assert result.exit_code == 0, result.stderr
        names = [sample["file"] for sample in document(out)["samples"]]
        assert names == [f"{i:03d}_{word}.{kind}" for i, word in enumerate(words)]
    drawn = draw(open_checkpoint(video_policy), count=5, steps=2)
    for name, rollout in zip(names, drawn.rollouts, strict=True):
        clip: Any = Image.open(tmp_path / "gif" / name)
        with av.open(tmp_path / "mp4" / name.replace(".gif", ".mp4")) as video:
            frames = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
        assert clip.n_frames == len(frames) == 3
        for i in range(3):
            clip.seek(i)
            pixels = np.asarray(rollout.media)[0, i, ..., 0]
            assert np.array_equal(np.asarray(clip.convert("L")), pixels)
            blocks = frames[i].reshape(8, 16, 8, 16).mean((1, 3))
            assert np.abs(blocks - pixels).max() < 2


def test_a_missing_writer_of_videos_is_named_before_anything_is_drawn(
    video_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "av", None)
    result = rectify_sample(video_policy, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "pip install av, or take gif" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_are_damaged_is_refused(video_policy: Path, tmp_path: Path):
    copy = Path(shutil.copytree(video_policy, tmp_path / "model"))
    (weights,) = (copy / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    result = rectify_sample(copy)
    assert result.exit_code == 2 and "model: its model cannot be loaded" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("noise", ["same", "fresh"])
def test_a_students_samples_come_back_from_run_and_pipeline(tmp_path: Path, noise: str):
    """Of a run the evaluation's own picture; of the saved pipeline alone the same samples."""
    small = [
        "steps=2", "distill.warmup_steps=1", f"distill.noise={noise}",
        "rollout.prompts_per_step=4", "rollout.batch_size=16", "learner.micro_batch=8",
        "evaluation={every: 2, samples: 20, rewards: []}", "optimizer.learning_rate=1e-3",
    ]  # fmt: skip
    recipe: Any = load(Path("digits/two_step"), recipe_type, small).value
    run = finished(recipe, tmp_path / "run")
    drawn = draw(open_checkpoint(run), count=20)
    write(drawn, tmp_path / "of-run")
    own = (run / "samples" / "step_000002" / "grid.png").read_bytes()
    assert (tmp_path / "of-run" / "grid.png").read_bytes() == own
    asked = [rollout.group.prompt for rollout in drawn.rollouts]
    policy = open_checkpoint(run / "checkpoints" / "step_000002" / "policy")
    again = draw(policy, asked, count=20, seed=recipe.seed)
    for one, other in zip(drawn.rollouts, again.rollouts, strict=True):
        assert one.forwards == other.forwards == 2
        # Groups of other prompt ids have other seeds, hence other noise.
        assert one.group.prompt == other.group.prompt
    assert policy.policy.sigmas == pytest.approx((1.0, 0.75, 0.0))
    assert policy.policy.renoise == (noise == "fresh")
    state = load_file(run / "checkpoints" / "step_000002" / "optimizer.safetensors")
    for name, parameter in policy.policy.trainable().items():
        assert torch.equal(parameter, state[f"student:{name}.ema"]), name
