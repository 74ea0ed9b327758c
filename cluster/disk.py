"""A disk that is full: told from other failures, and what the user is told."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path

from ray.exceptions import OutOfDiskError, RayTaskError
from safetensors import SafetensorError

from cluster import checkpoints

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Safetensors' error is a text of Rust's.
IN_TEXT = re.compile(rf"\(os error ({'|'.join(map(str, FULL))})\)")
MEBIBYTE = 2**20


class DiskFull(RuntimeError):
    """Nothing can be written any more; names the place, what is safe and how to go on."""


@contextlib.contextmanager
def writing(place: Path, run: Path) -> Generator[None]:
    """Where ``place`` of the directory ``run`` is written.

    Raises:
        DiskFull: there is no room; other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError, RayTaskError, OutOfDiskError) as error:
        if not is_full(error):
            raise
        raise DiskFull(_said(f"{place} could not be written: {_reason(error)}", run)) from error


def check_room(root: Path, run: Path) -> None:
    """Refuse to begin a checkpoint that is larger than what is free, if it is as large as the last.

    Raises:
        DiskFull: so it is.
    """
    steps = checkpoints.steps_in(root)
    if not steps:
        return
    need = checkpoints.size_of(root / checkpoints.name_of(steps[-1]))
    free = shutil.disk_usage(root).free
    if need > free:
        have = f"{_mebibytes(free)} are free and a checkpoint takes {_mebibytes(need)}"
        raise DiskFull(_said(f"{root} has no room for another checkpoint: {have}", run))


def is_full(error: BaseException | None) -> bool:
    """Whether this, what caused it, or what failed in an actor, is for want of room."""
    while error is not None:
        if isinstance(error, OutOfDiskError) or getattr(error, "errno", None) in FULL:
            return True
        if isinstance(error, SafetensorError) and IN_TEXT.search(str(error)):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


def no_room(error: BaseException) -> str:
    """One line on a verb that ended for want of room; ``is_full(error)``."""
    name = getattr(error, "filename", None)
    place = f"{name} could not be written: " if name else ""
    return f"{place}{_reason(error)}; make room and repeat the command"


def _reason(error: BaseException) -> str:
    """The system's words, without an actor's traceback."""
    cause = getattr(error, "cause", None) or error
    if rust := IN_TEXT.search(str(cause)):
        return os.strerror(int(rust[1]))
    return getattr(cause, "strerror", None) or str(cause).splitlines()[0]


def _said(what: str, run: Path) -> str:
    try:
        found = checkpoints.latest(run / "checkpoints")
    except checkpoints.CheckpointError:
        found = None
    safe = f"{found.path} is whole" if found else "there is no checkpoint yet"
    return f"{what}; {safe}; make room, then: rectify run --resume {run}"


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:.1f} MiB"
