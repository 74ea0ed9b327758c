"""Checkpoints that are whole or not there.

Written to ``.tmp-...``, every file fsynced, a manifest (name, size, sha256) last, then renamed and the
parent fsynced. There is no pointer file: the latest checkpoint is the highest step whose manifest
verifies, so a crash at any moment leaves the previous one in force.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where, after which step, and the driver's own state."""

    path: Path
    step: int
    state: dict[str, Any]


def write(root: Path, step: int, save: Callable[[Path], None], state: dict[str, Any]) -> Checkpoint:
    """Make a checkpoint: ``save`` fills a directory, ``state`` is the driver's part (JSON)."""
    final = root / f"step_{step:06d}"
    scratch = root / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save(scratch)
        (scratch / STATE).write_text(json.dumps({"step": step, **state}))
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        entries = [_entry(path, scratch) for path in files]
        (scratch / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
        for path in [*files, scratch / MANIFEST, *_directories(scratch)]:
            _sync(path)
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        scratch.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Checkpoint(final, step, state)


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning."""
    for path in sorted(root.glob("step_*"), reverse=True):
        problem = verify(path)
        if problem is None:
            state = json.loads((path / STATE).read_text())
            return Checkpoint(path, state.pop("step"), state)
        logger.warning("checkpoint %s is passed over: %s", path.name, problem)
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
        for entry in entries:
            file = path / entry["name"]
            if file.stat().st_size != entry["size"]:
                return f"{entry['name']} has {file.stat().st_size} of {entry['size']} bytes"
            if _digest(file) != entry["sha256"]:
                return f"{entry['name']} changed (sha256)"
        if not isinstance(json.loads((path / STATE).read_text())["step"], int):
            return f"{STATE} names no step"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def prune(root: Path, keep_last: int, best: int | None) -> None:
    """Remove all but the newest ``keep_last`` and the ``best`` step; leftovers of crashes too."""
    for path in sorted(root.glob("step_*"))[:-keep_last]:
        if best is None or path.name != f"step_{best:06d}":
            shutil.rmtree(path)
    for path in root.glob(".tmp-step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _entry(path: Path, root: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    return {"name": name, "size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _directories(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_dir()] + [root]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
