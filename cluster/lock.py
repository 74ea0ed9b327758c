"""One process at a time works on a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Generator
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = ".lock"
UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class RunLocked(ValueError):
    """Another process works on the run: which, where."""


@contextlib.contextmanager
def locked(run: Path) -> Generator[None]:
    """Hold ``run/.lock``, which names this process and its host.

    The kernel gives the lock back when its holder dies, so a file that is left is taken over.

    Raises:
        RunLocked: it is held.
    """
    path = run / NAME
    descriptor = _held(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _held(path: Path) -> int:
    """An open file that is locked and still has its name: its last holder removes it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except OSError as error:
            if error.errno in UNKNOWN:
                logger.warning("%s: this file system has no locks; nobody else is kept out", path)
                return descriptor
            if error.errno != errno.EWOULDBLOCK:
                raise
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise RunLocked(
                f"{path.parent} is worked on by {holder}: wait for its end, or end it"
            ) from error
        os.close(descriptor)
