"""``rectify audit``: files that say what moved, repeatable; refusals leave nothing behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from cluster.audit import audit, write
from cluster.cli_audit import audit as verb
from cluster.sample import Source, open_checkpoint
from rollout.policies.digits import ensure_base, training_digits
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy

app = typer.Typer()
app.command()(verb)


@pytest.fixture(scope="module")
def digits() -> Path:
    """The embedded model's directory; the tests never write beside it."""
    return ensure_base("digits")


@pytest.fixture(scope="module")
def source(digits: Path) -> Source:
    return open_checkpoint(digits)


def rectify_audit(*arguments: object) -> Result:
    quick = ["--count", "4", "--cycles", "2", "--steps", "3"]
    return CliRunner().invoke(app, [*quick, *map(str, arguments)])


def document(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "audit.json").read_text())


def test_the_files_agree_with_each_other(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = rectify_audit(digits, "--gamma", 0.7, "--gamma", 0.05, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"audit: {out}" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "audit.csv", "audit.json", "audit.png", "cycles-0.05.png", "cycles-0.7.png",
    ]  # fmt: skip
    made = document(out)
    assert made["references"] == {"name": "training images of digits", "count": 897}
    assert [sample["prompt"] for sample in made["samples"]] == ["0", "1", "2", "3"]
    assert made["sampler"] == {"steps": 3, "shift": 3.0, "guidance": 1.0}
    near, far = made["levels"]
    assert (near["gamma"], far["gamma"]) == (0.05, 0.7)
    # A little noise brings every sample back, a lot brings another one.
    assert near["fixed"] == 1 and far["fixed"] == 0
    assert near["moved"][-1] < near["moved_gaussian"] < far["moved"][-1] < 1.5
    rows = list(csv.DictReader((out / "audit.csv").open()))
    assert len(rows) == 2 * 4 * 2
    for level in made["levels"]:
        for cycle in (1, 2):
            mine = [
                row
                for row in rows
                if float(row["gamma"]) == level["gamma"] and int(row["cycle"]) == cycle
            ]
            assert [row["prompt"] for row in mine] == ["0", "1", "2", "3"]
            fixed = [int(row["fixed"]) for row in mine]
            assert np.mean(fixed) == level["fixed_by_cycle"][cycle - 1]
            assert fixed == [float(row["moved"]) < made["threshold"] for row in mine]
            assert all(0 < float(row["nearest"]) < 2 for row in mine)
    with Image.open(out / "cycles-0.7.png") as grid:
        wide, high = (3 * 9 + 1), (4 * 9 + 1)  # three states across, four samples down
        assert grid.width % wide == 0 and grid.height == grid.width // wide * high


def test_the_same_command_gives_the_same_files_and_another_seed_others(
    digits: Path, tmp_path: Path
):
    made: list[dict[str, bytes]] = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = tmp_path / name
        assert rectify_audit(digits, "--gamma", 0.5, "--seed", seed, "--out", out).exit_code == 0
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert all(made[0][name] != made[2][name] for name in made[0])


def test_directories_are_numbered_beside_the_policy(base_policy: WanPolicy, tmp_path: Path):
    policy = tmp_path / "policy"
    base_policy.save(policy, base_policy.trainable())
    for name in ("audit", "audit-2"):
        assert rectify_audit(policy, "--gamma", 0.5).exit_code == 0
        assert document(tmp_path / name)["step"] is None
    result = rectify_audit(policy, "--out", tmp_path / "audit")
    assert result.exit_code == 2 and "not empty" in result.stderr


def test_training_images_start_under_their_own_labels(source: Source, tmp_path: Path):
    audited = audit(source, [0.3], count=6, cycles=1, steps=3, start="references", seed=2)
    images, labels = training_digits()
    known = torch.from_numpy(images)[:, None, None]
    for state, prompt in zip(audited.start.states, audited.start.prompts, strict=True):
        (row,) = (known == state).flatten(1).all(1).nonzero().flatten().tolist()
        assert prompt == str(labels[row])
    nearest = audited.levels[0].moved.nearest
    assert nearest is not None and (nearest[0] == 0).all() and (nearest[1] > 0.05).all()
    assert document(write(audited, tmp_path / "out"))["start"] == "references"


def test_a_directory_of_pictures_and_arrays_can_be_the_references(
    digits: Path, source: Source, tmp_path: Path
):
    images, _ = training_digits()
    folder = tmp_path / "known"
    folder.mkdir()
    pixels = ((images[:3] + 1) * 127.5).round().astype(np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    np.save(folder / "b.npy", pixels[1][None, :, :, None])
    np.save(folder / "c.npy", (pixels[2:3, None, :, :, None] / 255).astype(np.float32))
    (folder / "notes.txt").write_text("not a picture")
    audited = audit(source, [0.3], 3, 1, folder, steps=2, start="references")
    assert audited.settings["references"] == {"name": str(folder), "count": 3}
    assert audited.start.prompts == [""] * 3
    begun = sorted(audited.start.states.flatten(1).tolist())
    assert begun == [
        pytest.approx(image, abs=5e-3)
        for image in sorted((pixels / 127.5 - 1).reshape(3, 64).tolist())
    ]
    result = rectify_audit(digits, "--references", folder, "--out", tmp_path / "out")
    assert result.exit_code == 0 and document(tmp_path / "out")["references"]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["."], "is no checkpoint: give a run directory"),
        (["digits", "--gamma", "1"], "gamma 1.0 is not inside (0, 1)"),
        (["digits", "--count", "1"], "count"),
        (["digits", "--prompt", "a horse"], "'a horse' names 0 of 0, 1, 2"),
        (["digits", "--references", "empty"], "holds no .png"),
        (["digits", "--references", "large"], "a.png is (1, 9, 9, 1), not"),
        (["digits", "--references", "dark"], "must be uint8, or floats in [0, 1]"),
        (["digits", "--references", "broken"], "cannot be read"),
        (["digits", "--references", "missing"], "does not exist"),
    ],
)
def test_bad_input_is_one_message_and_no_file(
    arguments: list[str], words: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("empty", "large", "dark", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "large" / "a.png")
    np.save(tmp_path / "dark" / "a.npy", np.full((1, 8, 8, 1), -1.0))
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    places = [str(digits) if argument == "digits" else argument for argument in arguments]
    result = rectify_audit(*places, "--out", "out")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("out").exists()


def test_text_and_few_step_students_are_refused(llada_directory: Path, tmp_path: Path):
    result = rectify_audit(llada_directory, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "text has no continuous noise level" in result.stderr
    student = TwoStepPolicy(WanConfig(), "shared", (1.0, 0.8, 0.0))
    place = tmp_path / "student"
    student.save(place, student.trainable())
    result = rectify_audit(place, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "audit its teacher" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_video_model_has_moving_references_and_a_row_of_clips_a_sample(
    moving_digits: Path, tmp_path: Path
):
    audited = audit(open_checkpoint(moving_digits), [0.4], count=3, cycles=2, steps=2)
    assert audited.settings["references"]["count"] == 4 * 897
    assert audited.levels[0].media.shape == (3, 3, 4, 8, 8, 1)
    path = write(audited, tmp_path / "out")
    with Image.open(path / "cycles-0.4.png") as grid:
        wide, high = (3 * (4 * 8 + 1) + 1), (3 * 9 + 1)
        assert grid.width % wide == 0 and grid.height == grid.width // wide * high
