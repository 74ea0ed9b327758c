"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import checkpoints


def save(directory: Path) -> None:
    (directory / "policy").mkdir()
    (directory / "policy" / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (directory / "optimizer.safetensors").write_bytes(b"moments" * 100)


def make(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoints.write(root, step, save, {"costs": {"nfe": step}})


def test_latest_is_the_highest_and_carries_its_state(tmp_path: Path):
    make(tmp_path, 2, 10, 4)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (10, {"costs": {"nfe": 10}})
    assert checkpoints.latest(tmp_path / "none") is None


def test_a_failure_while_writing_leaves_the_previous_one(tmp_path: Path):
    make(tmp_path, 1)

    def full_disk(directory: Path) -> None:
        save(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.write(tmp_path, 2, full_disk, {})
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_crash_before_the_rename_is_not_a_checkpoint(tmp_path: Path):
    make(tmp_path, 1)
    (tmp_path / ".tmp-step_000002-99").mkdir()
    save(tmp_path / ".tmp-step_000002-99")
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step == 1
    checkpoints.prune(tmp_path, 1, 1, ())
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_pruning_spares_the_newest_and_the_best(tmp_path: Path):
    make(tmp_path, *range(1, 7))
    checkpoints.prune(tmp_path, 6, 2, {3})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000003",
        "step_000005",
        "step_000006",
    ]


def test_the_manifest_names_every_file(tmp_path: Path):
    make(tmp_path, 1)
    manifest = json.loads((tmp_path / "step_000001" / "manifest.json").read_text())
    assert [f["name"] for f in manifest["files"]] == [
        "optimizer.safetensors",
        "policy/weights.bin",
        "state.json",
    ]
    assert all(len(f["sha256"]) == 64 for f in manifest["files"])
