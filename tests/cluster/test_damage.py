"""Damaged checkpoints: every one is named and passed over, or refused; nothing is changed by looking."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster import checkpoints
from cluster.checkpoints import CheckpointError
from cluster.cli import app
from cluster.launch import run_locally
from cluster.run import describe

SMALL = ("checkpoints.every=1", "evaluation.samples=4", "rollout.steps=4", "rl.pool=[0]")
Damage = Callable[[Path, random.Random], str]


def save(directory: Path) -> None:
    (directory / "policy").mkdir()
    (directory / "policy" / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (directory / "optimizer.safetensors").write_bytes(b"moments" * 100)


def seal(path: Path) -> None:
    """A manifest that verifies, of whatever is there."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    entries = [
        {
            "name": p.relative_to(path).as_posix(),
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    ]
    (path / "manifest.json").write_text(json.dumps({"files": entries}))


def on_file(change: Callable[[Path, random.Random], object]) -> Damage:
    """A damage of any one file, which is told by its name."""

    def damage(path: Path, generator: random.Random) -> str:
        files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        name = generator.choice(files)
        change(path / name, generator)
        return name

    return damage


def cut(file: Path, generator: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])


def flip(file: Path, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)


def instead(make: Callable[[Path], object]) -> Damage:
    def change(file: Path, generator: random.Random) -> None:
        file.unlink()
        make(file)

    return on_file(change)


def written(name: str, content: str | bytes, sealed: bool = False) -> Damage:
    def damage(path: Path, generator: random.Random) -> str:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if sealed:
            seal(path)
        return name

    return damage


def entry(**changes: Any) -> Damage:
    """A manifest with an entry that says something else."""

    def damage(path: Path, generator: random.Random) -> str:
        manifest = json.loads((path / "manifest.json").read_text())
        changed = generator.choice(manifest["files"])
        name = changed["name"]
        changed.update(changes)
        (path / "manifest.json").write_text(json.dumps(manifest))
        return f"{name} changed" if changes == {"sha256": "0" * 64} else "manifest.json"

    return damage


def without(name: str) -> Damage:
    """A manifest that verifies and names too little."""

    def damage(path: Path, generator: random.Random) -> str:
        (path / name).unlink()
        seal(path)
        return f"manifest.json names no {name}"

    return damage


def outside(path: Path, generator: random.Random) -> str:
    """A manifest that leads to a file of another checkpoint, which is whole."""
    other = json.loads((path.parent / "step_000001" / "manifest.json").read_text())["files"]
    own = json.loads((path / "manifest.json").read_text())
    own["files"] += [{**e, "name": f"../step_000001/{e['name']}"} for e in other]
    (path / "manifest.json").write_text(json.dumps(own))
    return "outside of the checkpoint"


def replaced(make: Callable[[Path], object]) -> Damage:
    """Something else in the checkpoint's place."""

    def damage(path: Path, generator: random.Random) -> str:
        shutil.rmtree(path)
        make(path)
        return "manifest.json"

    return damage


def of_another_step(path: Path, generator: random.Random) -> str:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step_000001", path)
    return "state.json is of step 1"


STATE = {"step": 2, "costs": {"nfe": 2.0}, "best": None, "extra": {}}
DAMAGES: dict[str, Damage] = {
    "cut": on_file(cut),
    "flipped": on_file(flip),
    "removed": on_file(lambda file, generator: file.unlink()),
    "emptied": on_file(lambda file, generator: file.write_bytes(b"")),
    "grown": on_file(lambda file, generator: file.write_bytes(file.read_bytes() + b"more")),
    "directory for a file": instead(Path.mkdir),
    "pipe for a file": instead(os.mkfifo),
    "file that cannot be read": instead(lambda file: file.symlink_to("/proc/self/mem")),
    "file linked to itself": instead(lambda file: file.symlink_to(file.name)),
    "no JSON": written("manifest.json", b"\x89PNG\r\n\x00"),
    "empty manifest": written("manifest.json", "{}"),
    "list": written("manifest.json", "[]"),
    "no list": written("manifest.json", '{"files": null}'),
    "no file": written("manifest.json", '{"files": []}'),
    "numbers": written("manifest.json", '{"files": [1, 2]}'),
    "deep": written("manifest.json", "[" * 100_000),
    "size in words": entry(size="many"),
    "size missing": entry(size=None),
    "digest a number": entry(sha256=12),
    "digest of another": entry(sha256="0" * 64),
    "name a list": entry(name=["state.json"]),
    "absolute": entry(name="/etc/hostname"),
    "upwards": outside,
    "without weights": without("optimizer.safetensors"),
    "without state": without("state.json"),
    "state no JSON": written("state.json", "step: 2", sealed=True),
    "state a list": written("state.json", "[2]", sealed=True),
    "state without a step": written("state.json", '{"costs": {}}', sealed=True),
    "state deep": written("state.json", '{"step": 2, "extra": ' + "[" * 100_000, sealed=True),
    "of another step": of_another_step,
    "a file": replaced(lambda path: path.write_text("x")),
    "nothing in it": replaced(Path.mkdir),
    "linked to itself": replaced(lambda path: path.symlink_to(path.name)),
    "linked to nothing": replaced(lambda path: path.symlink_to("gone")),
} | {
    f"state with {key} {value!r}": written("state.json", json.dumps(STATE | {key: value}), True)
    for key, value in [
        ("step", "2"),
        ("step", True),
        ("step", 2.5),
        ("step", 3),
        ("costs", ["nfe"]),
        ("costs", {"nfe": "two"}),
        ("best", 0.5),
        ("best", [0.5, "two"]),
        ("extra", "none"),
    ]
}
# What may strike any of the files does so at several places.
CASES = [(name, seed) for name in DAMAGES for seed in range(3 if name in list(DAMAGES)[:4] else 1)]


def fingerprint(root: Path) -> dict[str, str]:
    """What is there, links and pipes as what they are."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "pipe" if path.is_fifo() else "directory"
    return found


def spoil(root: Path, name: str, seed: int = 0) -> str:
    """Damage step 2; returns what a message must say."""
    return DAMAGES[name](root / "step_000002", random.Random(seed))


def test_there_are_fifty_damages():
    assert len(CASES) >= 50


@pytest.mark.parametrize(("name", "seed"), CASES, ids=lambda value: str(value).replace("/", " "))
def test_a_damaged_checkpoint_falls_back_to_the_last_good_one(name: str, seed: int, tmp_path: Path):
    for step in (1, 2):
        checkpoints.write(tmp_path, step, save, {"costs": {"nfe": step}})
    words = spoil(tmp_path, name, seed)
    before, told = fingerprint(tmp_path), []
    found = checkpoints.latest(tmp_path, told.append)
    assert found is not None and (found.step, found.state) == (1, {"costs": {"nfe": 1}})
    (message,) = told
    assert "step_000002 is damaged" in message and words in message and "\n" not in message
    if name != "of another step":
        shutil.rmtree(tmp_path / "step_000001")
        before = {k: v for k, v in before.items() if not k.startswith("step_000001")}
        with pytest.raises(CheckpointError, match="no valid checkpoint is left"):
            checkpoints.latest(tmp_path)
    assert fingerprint(tmp_path) == before


def test_what_is_not_called_like_a_checkpoint_is_none(tmp_path: Path):
    checkpoints.write(tmp_path, 2, save, {})
    for name in ("step_", "step_3", "step_000009x", "step_0000009", "step_-00009", "step_٠٠٠٠٠٩"):
        shutil.copytree(tmp_path / "step_000002", tmp_path / name)
    told: list[str] = []
    found = checkpoints.latest(tmp_path, told.append)
    assert found is not None and found.step == 2 and not told


def test_steps_beyond_a_million_come_last(tmp_path: Path):
    for step in (999_999, 1_000_000):
        checkpoints.write(tmp_path, step, save, {})
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step == 1_000_000


def test_pruning_does_not_count_what_is_damaged_and_higher(tmp_path: Path):
    for step in (1, 2, 9):
        checkpoints.write(tmp_path, step, save, {})
    (tmp_path / "step_000009" / "state.json").unlink()
    checkpoints.prune(tmp_path, 2, 1, ())
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step == 2
    assert checkpoints.steps_in(tmp_path) == [2, 9]


@pytest.mark.parametrize("name", ["a file", "linked to itself", "cut"])
def test_a_damaged_checkpoint_is_written_again(name: str, tmp_path: Path):
    for step in (1, 2):
        checkpoints.write(tmp_path, step, save, {})
    spoil(tmp_path, name)
    checkpoints.write(tmp_path, 2, save, {"costs": {"again": 1}})
    found = checkpoints.latest(tmp_path)
    assert found is not None and (found.step, found.state) == (2, {"costs": {"again": 1}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def rectify(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """One message, status 2, nothing raised."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output.replace("\n", " ")


@pytest.mark.parametrize("name", ["upwards", "deep", "state a list", "pipe for a file", "a file"])
def test_a_run_without_a_valid_checkpoint_is_not_continued(
    name: str, digits_recipe: Callable[..., Any], tmp_path: Path
):
    recipe, run = digits_recipe(), tmp_path / "run"
    run.mkdir()
    describe(run, recipe, recipe.prompts.load())
    for step in (1, 2):
        checkpoints.write(run / "checkpoints", step, save, {})
    spoil(run / "checkpoints", name)
    (run / "checkpoints" / "step_000001" / "state.json").write_text("")
    before = fingerprint(tmp_path)
    refused(rectify("run", "--resume", run), "step_000002 is damaged", "step_000001 is damaged")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", b"\xff\xfe"),
        ("recipe.yaml", b"[1, 2"),
        ("recipe.yaml", b""),
        ("data.sha256", None),
        ("data.sha256", b"\xff\xfe"),
        ("metrics.jsonl", None),
    ],
)
def test_a_damaged_run_directory_is_refused(
    name: str, content: bytes | None, digits_recipe: Callable[..., Any], tmp_path: Path
):
    recipe, run = digits_recipe(), tmp_path / "run"
    run.mkdir()
    describe(run, recipe, recipe.prompts.load())
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir() if content is None else (run / name).write_bytes(content)
    before = fingerprint(tmp_path)
    for given in ([], ["digits/flash_grpo"]):
        if given or name == "recipe.yaml":
            refused(rectify("run", *given, "--resume", run), name.split(".")[0])
    assert fingerprint(tmp_path) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_recipe: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    recipe = digits_recipe(*SMALL)
    path.mkdir()
    describe(path, recipe, recipe.prompts.load())
    run_locally(recipe, path, Console(quiet=True))
    return path


def test_a_run_continues_from_the_last_good_one_and_says_why(
    trained: Path, digits_recipe: Callable[..., Any], tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run / "checkpoints", "flipped")
    console = Console(record=True, width=400, file=io.StringIO())
    run_locally(digits_recipe(*SMALL), run, console)
    said = console.export_text()
    assert "step_000002 is damaged" in said and "passed over" in said
    assert "continuing after step 1" in said
    state = "checkpoints/step_000002/optimizer.safetensors"
    assert (run / state).read_bytes() == (trained / state).read_bytes()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("name", ["pipe for a file", "linked to itself", "state a list", "cut"])
def test_sample_and_evaluate_name_what_is_damaged(name: str, trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run / "checkpoints", name)
    damaged, out, before = run / "checkpoints" / "step_000002", tmp_path / "out", fingerprint(run)
    refused(rectify("sample", run, "--step", 2, "--out", out), "step_000002")
    refused(rectify("sample", damaged, "--out", out), "step_000002")
    recipe = run / "recipe.yaml"
    refused(rectify("evaluate", run, recipe, "--step", 2, "--out", out), "step_000002")
    refused(rectify("evaluate", damaged, recipe, "--out", out), "step_000002")
    shutil.rmtree(run / "checkpoints" / "step_000001")
    refused(rectify("sample", run, "--out", out), "step_000002", "no valid checkpoint")
    refused(rectify("evaluate", run, recipe, "--out", out), "step_000002")
    assert not out.exists()
    assert fingerprint(run) == {k: v for k, v in before.items() if "step_000001" not in k or
                                k.startswith(("samples", "evaluation"))}  # fmt: skip


def test_sample_falls_back_to_the_last_good_one(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run / "checkpoints", "without weights")
    result = rectify("sample", run, "--count", 1, "--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["step"] == 1
