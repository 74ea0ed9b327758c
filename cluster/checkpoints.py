"""Checkpoints that are whole or not there.

Written to ``.tmp-...``, every file fsynced, a manifest (name, size, sha256) last, then renamed and the
parent fsynced. There is no pointer file: the latest checkpoint is the highest step whose manifest
verifies, so a crash at any moment leaves the previous one in force.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from cluster.trained import STATE_FILE

M = TypeVar("M", bound=BaseModel)

MANIFEST = "manifest.json"
STATE = "state.json"
NEEDED = (STATE, STATE_FILE)  # without these a manifest that verifies is of something else
NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})")
ASIDE = ".old-"  # what was at the place of a checkpoint that is being put there


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where, after which step, and the driver's own state."""

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or a run that has none left: which file, why, what to do."""


class Entry(BaseModel, frozen=True, extra="forbid", strict=True):
    """A file of a checkpoint: its name below it, bytes, and their SHA-256 in hex."""

    name: str
    size: int
    sha256: str


class _Manifest(BaseModel, strict=True):
    files: list[Entry]


class _State(BaseModel, extra="allow", strict=True):
    """What the driver reads of its own state."""

    step: int
    costs: dict[str, float] = Field(default_factory=dict)
    best: tuple[float, int] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)


def name_of(step: int) -> str:
    """The directory of a checkpoint."""
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's directory, None for any other name."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(root: Path) -> list[int]:
    """Steps that have something of a checkpoint's name, ascending; damaged ones too."""
    names = (path.name.removeprefix(ASIDE) for path in root.glob("*step_*"))
    return sorted({step for name in names if (step := step_of(name)) is not None})


def write(root: Path, step: int, save: Callable[[Path], None], state: dict[str, Any]) -> Checkpoint:
    """Make a checkpoint: ``save`` fills a directory, ``state`` is the driver's part (JSON)."""
    final = root / name_of(step)
    scratch = scratch_for(final)
    try:
        save(scratch)
        (scratch / STATE).write_text(json.dumps({"step": step, **state}))
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        entries = [_entry(path, scratch) for path in files]
        (scratch / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
        install(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Checkpoint(final, step, state)


def scratch_for(final: Path) -> Path:
    """A new directory beside ``final`` to make it in."""
    scratch = final.parent / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _sync(final.parent.parent)
    return scratch


def install(scratch: Path, final: Path) -> None:
    """Make what is in ``scratch`` durable, then the checkpoint ``final``.

    What is there already (the same step again, after a resume from an earlier one) is set aside by a
    rename and removed at the very end, so that a crash loses neither: ``latest`` looks there too.
    """
    for path in scratch.rglob("*"):
        if not path.is_symlink():  # links of a pipeline lead to what is durable already
            _sync(path)
    _sync(scratch)
    aside = final.with_name(ASIDE + final.name)
    if os.path.lexists(final):
        _remove(aside)
        final.rename(aside)
    try:
        scratch.rename(final)
    except BaseException:
        if os.path.lexists(aside):
            aside.rename(final)
        raise
    _sync(final.parent)
    _remove(aside)


def latest(root: Path, tell: Callable[[str], object] = str) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where there is none of any kind.

    Args:
        tell: is told which damaged ones are passed over and why; default: nobody is.

    Raises:
        CheckpointError: there are some and none is valid; names each with its reason.
    """
    damaged: list[str] = []
    for step in reversed(steps_in(root)):
        for path in (root / name_of(step), root / (ASIDE + name_of(step))):
            if not os.path.lexists(path):
                continue
            try:
                found = read(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for problem in damaged:
                tell(f"{problem}; it is passed over")
            return found
    if damaged:
        raise CheckpointError(
            "\n".join(damaged)
            + f"\nno valid checkpoint is left in {root}: put one back from a copy, or begin again"
        )
    return None


def read(path: Path, expected: int | None = None) -> Checkpoint:
    """A checkpoint, every byte of it verified.

    Args:
        expected: its step; None: the one in its name, if that has one.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        entries = entries_of(_bytes(path, MANIFEST))
        for entry in entries:
            size = _regular(path, entry.name).stat().st_size
            if size != entry.size:
                raise ValueError(f"{entry.name} has {size} of {entry.size} bytes")
            if _digest(path / entry.name) != entry.sha256:
                raise ValueError(f"{entry.name} changed (sha256)")
        text = _bytes(path, STATE)
        step = _parsed(_State, STATE, text).step
        named = step_of(path.name.removeprefix(ASIDE)) if expected is None else expected
        if named not in (None, step):
            raise ValueError(f"{STATE} is of step {step}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    state = json.loads(text)
    return Checkpoint(path, state.pop("step"), state)


def verify(path: Path, expected: int | None = None) -> str | None:
    """What is wrong with a checkpoint, or None; see ``read``."""
    try:
        read(path, expected)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} is damaged: ")
    return None


def entries_of(manifest: bytes) -> list[Entry]:
    """The files of a checkpoint by its manifest.

    Raises:
        ValueError: it is none, leads out of its directory, or lacks what every checkpoint has.
    """
    entries = _parsed(_Manifest, MANIFEST, manifest).files
    names = [entry.name for entry in entries]
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{MANIFEST} names {name!r}, which is outside of the checkpoint")
    for name in NEEDED:
        if name not in names:
            raise ValueError(f"{MANIFEST} names no {name}")
    return entries


def size_of(path: Path) -> int:
    """Bytes of the files of a checkpoint; what links lead to is not counted."""
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def prune(root: Path, step: int, keep_last: int, spared: Collection[int]) -> None:
    """Remove what was there before ``step``, which was just written, and leftovers of crashes.

    The newest ``keep_last`` stay, and those in ``spared``. What is numbered higher is left from before
    a resume and is damaged: it neither counts nor goes.
    """
    for old in [s for s in steps_in(root) if s <= step][:-keep_last]:
        if old not in spared:
            _remove(root / name_of(old))
            _remove(root / (ASIDE + name_of(old)))
    for path in root.glob(".tmp-step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _parsed(kind: type[M], name: str, text: bytes) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f" {part}:" for part in first["loc"])
        raise ValueError(f"{name}:{place} {first['msg']}") from error


def _bytes(root: Path, name: str) -> bytes:
    return _regular(root, name).read_bytes()


def _regular(root: Path, name: str) -> Path:
    """A file of a checkpoint; what only looks like one could block its reader."""
    path = root / name
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} is no file")
    return path


def _entry(path: Path, root: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    return {"name": name, "size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Whatever is there, which damage may have made a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
