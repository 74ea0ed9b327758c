"""A full disk ends a run with one message and its last good checkpoint; the limits are real."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from cluster import checkpoints
from cluster.disk import DiskFull, check_room, writing
from cluster.progress import Progress
from cluster.run import RunDirectory
from cluster.tracking import MetricsFile
from rl.contracts import Sampled, Scored
from rollout.draws import Prompt, groups_for

MIB = 2**20
OTHERS = 20 * MIB  # what others took of a disk; a checkpoint here takes 2 MiB
SETTINGS = [
    *("steps=3", "rollout.prompts_per_step=4", "rollout.group_size=2"),
    *("rollout.batch_size=8", "rollout.steps=4", "rl.pool=[0]", "rl.minibatches=1"),
    *("evaluation.samples=4", "evaluation.every=1", "checkpoints.every=1", "workers.count=1"),
    *("checkpoints.keep_last=9", "learner.ranks=1"),
]


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel refuses writes past ``size`` bytes of a file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small(directory: Path) -> None:
    save_file({"weight": torch.zeros(4)}, directory / "optimizer.safetensors")


def large(directory: Path) -> None:
    save_file({"weight": torch.zeros(MIB)}, directory / "optimizer.safetensors")


def run_of(recipe: Any, path: Path) -> RunDirectory:
    path.mkdir()
    progress = Progress(recipe.steps, 0, Console(quiet=True))
    return RunDirectory(recipe, path, [], progress, lambda media: media)


@pytest.fixture
def run(digits_recipe: Callable[..., Any], tmp_path: Path) -> RunDirectory:
    """A run with a checkpoint of step 1."""
    run = run_of(digits_recipe("checkpoints.every=1"), tmp_path / "run")
    run.save = small
    run.checkpoint(1)
    return run


def said(error: pytest.ExceptionInfo[DiskFull], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, "checkpoints/step_000001 is whole", "rectify run --resume"):
        assert word in message


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(run: RunDirectory):
    run.save = large
    with files_at_most(MIB), pytest.raises(DiskFull) as error:
        run.checkpoint(2)
    said(error, "checkpoints/step_000002 could not be written: File too large;")
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000001"]
    found = checkpoints.latest(run.path / "checkpoints")
    assert found is not None and found.step == 1
    run.checkpoint(2)
    assert checkpoints.steps_in(run.path / "checkpoints") == [1, 2]


def test_metrics_that_cannot_be_written_end_the_run(run: RunDirectory):
    run.metrics.path.unlink(missing_ok=True)
    run.metrics.path.symlink_to("/dev/full")
    with pytest.raises(DiskFull) as error:
        run.log(2, {"time/step": 1.0})
    said(error, "metrics.jsonl could not be written: No space left on device")


def test_metrics_stay_whole_when_they_cannot_be_cut(run: RunDirectory):
    for step in range(100):
        run.metrics.append({"kind": "train", "step": step, "text": "x" * 100})
    before = run.metrics.path.read_bytes()
    found = checkpoints.latest(run.path / "checkpoints")
    assert found is not None
    with files_at_most(100), pytest.raises(DiskFull) as error:
        run.resume_from(found)
    said(error, "metrics.jsonl could not be written")
    assert run.metrics.path.read_bytes() == before
    assert {p.name for p in run.path.iterdir()} == {"checkpoints", "metrics.jsonl"}
    run.resume_from(found)
    assert [row["step"] for row in MetricsFile(run.metrics.path).read()] == [0, 1]


@pytest.mark.parametrize("place", ["evaluation/step_000002.json", "samples/step_000002"])
def test_an_evaluation_that_cannot_be_written_ends_the_run(place: str, run: RunDirectory):
    target = run.path / place
    target = target.with_name(f".tmp-{target.name}") if target.suffix else target / "grid.png"
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    with pytest.raises(DiskFull) as error:
        run.evaluated(2, {"evaluation/x/mean": 1.0, "time/evaluate": 1.0}, [scored()])
    said(error, f"{place} could not be written: No space left on device")
    assert not list((run.path / "evaluation").glob(".tmp*"))


def scored() -> Any:
    """One sample of one prompt, as an evaluation gives it."""
    (group,) = groups_for([Prompt("a", "one", {})], seed=0, step=0, count=1, size=1)
    media = np.zeros((1, 1, 8, 8, 1), dtype=np.uint8)
    facts: dict[str, Any] = {"job": 0, "replay": None, "summary": None, "facts": {}}
    facts |= {name: 0 for name in Sampled.__dataclass_fields__ if name not in facts}
    return Scored(Sampled(**facts | {"group": group, "media": media}), {})


def test_a_disk_without_room_is_found_before_writing(run: RunDirectory):
    root = run.path / "checkpoints"
    free = shutil.disk_usage(root).free
    with (root / "step_000001" / "more").open("wb") as file:
        file.truncate(free + 100 * MIB)  # a hole takes no room
    before = sorted(root.rglob("*"))
    with pytest.raises(DiskFull) as error:
        run.checkpoint(2)
    said(error, "checkpoints has no room for another checkpoint", "MiB are free and a checkpoint")
    assert sorted(root.rglob("*")) == before
    (root / "step_000001" / "more").unlink()
    check_room(root, run.path)


def test_other_errors_stay_what_they_are(tmp_path: Path):
    with pytest.raises(PermissionError), writing(tmp_path, tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def namespaces() -> bool:
    """Whether a file system can be mounted here without being seen elsewhere."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def on_tmpfs(place: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a small file system at ``place``."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {place}\n"
    return subprocess.run(
        ["unshare", "-rm", "bash", "-ec", mount + script],
        capture_output=True, text=True, timeout=950, env={**os.environ, "PY": sys.executable},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(not namespaces(), reason="needs user namespaces")
@pytest.mark.parametrize(
    ("room", "kept", "words"),
    [
        (MIB, [], "step_000001 could not be written: "),
        (7 * MIB // 2, ["step_000001"], "no room for another checkpoint: "),
    ],
)
def test_a_run_on_a_small_disk_stops_and_goes_on_with_room(
    room: int, kept: list[str], words: str, tmp_path: Path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    sets = " ".join(f"--set '{setting}'" for setting in [*SETTINGS, f"run_dir={disk}"])
    rectify = "$PY -c 'from cluster.cli import main; main()' run"
    run = f"{disk}/digits-flash-grpo"
    script = f"""
head -c {OTHERS} /dev/zero > {disk}/others
{rectify} digits/flash_grpo {sets} && status=0 || status=$?
echo "first $status"
find {disk} -name '.tmp*' -o -name .lock
ls {run}/checkpoints
rm {disk}/others
{rectify} --resume {run} && status=0 || status=$?
echo "second $status"
ls {run}/checkpoints
"""
    result = on_tmpfs(disk, str(OTHERS + room), script)
    output = result.stdout + result.stderr
    assert "Traceback" not in output and "Logging error" not in output, output
    first, second = result.stdout.split("first ")[1].split("second ")
    assert first.split()[:1] == ["1"] and second.split()[:1] == ["0"], output
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("stopped: ")]
    assert words in message and "Error" not in message
    assert f"make room, then: rectify run --resume {run}" in message
    safe = f"{run}/checkpoints/{kept[-1]} is whole" if kept else "there is no checkpoint yet"
    assert safe in message
    assert [line for line in first.splitlines()[1:] if line.startswith(("step_", "/"))] == kept
    assert second.split()[-3:] == ["step_000001", "step_000002", "step_000003"]
