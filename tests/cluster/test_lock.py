"""A run directory has one process at a time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import checkpoints
from cluster.cli import app
from cluster.lock import RunLocked, locked
from cluster.run import describe

HOLD = """
import sys
from pathlib import Path
from cluster.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run: Path) -> subprocess.Popen[str]:
    """A process that works on the run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_taken_over(
    digits_recipe: Callable[..., Any], tmp_path: Path
):
    recipe, run = digits_recipe(), tmp_path / "run"
    run.mkdir()
    describe(run, recipe, recipe.prompts.load())
    first = holder(run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = f"worked on by process {first.pid} on {socket.gethostname()}"
    with pytest.raises(RunLocked, match=said), locked(run):
        pass
    result = CliRunner().invoke(app, ["run", "--resume", str(run)])
    assert result.exit_code == 2 and said in result.output.replace("\n", " ")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    first.kill()
    first.wait()
    assert (run / ".lock").read_text() == f"process {first.pid} on {socket.gethostname()}"
    with locked(run):
        assert f"process {os.getpid()} on" in (run / ".lock").read_text()
    assert not (run / ".lock").exists()


def test_a_lock_that_is_given_back_leaves_nothing(tmp_path: Path):
    process = holder(tmp_path)
    process.communicate("")
    assert process.returncode == 0 and list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def write(root: Path, content: bytes, renames: int | None = None) -> None:
    """Write step 1; with ``renames``, in a process that is gone when it would rename once more."""

    def save(directory: Path) -> None:
        (directory / "optimizer.safetensors").write_bytes(content)

    if renames is None:
        checkpoints.write(root, 1, save, {"extra": {"content": content.decode()}})
        return
    child = os.fork()
    if child == 0:
        done, rename = iter(range(renames)), Path.rename
        Path.rename = lambda path, target: (  # type: ignore[method-assign]
            rename(path, target) if next(done, None) is not None else os._exit(7)
        )
        checkpoints.write(root, 1, save, {"extra": {"content": content.decode()}})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def content_of(root: Path) -> str:
    found = checkpoints.latest(root)
    assert found is not None
    return found.state["extra"]["content"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_a_checkpoint_is_replaced_loses_none(renames: int, tmp_path: Path):
    write(tmp_path, b"old")
    write(tmp_path, b"new", renames)
    assert content_of(tmp_path) == "old"
    write(tmp_path, b"newest")
    assert content_of(tmp_path) == "newest"
    checkpoints.prune(tmp_path, 1, 1, ())
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
