"""Checkpoints on their way to a storage, beside training: one at a time, and only the newest waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints import name_of
from cluster.storage import METRICS, Storage, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """A checkpoint to copy, with the metrics up to it and the best step by then.

    ``known``: it was there when the process began, so there may be a copy already.
    """

    step: int
    metrics: bytes
    best: int | None
    known: bool


class Copies:
    """Copies the checkpoints of one run. A copy that fails is a warning; the next one is tried.

    Attributes:
        run: the run directory. keep_last: newest copies that stay. tell: is told what fails.
    """

    def __init__(
        self, storage: Storage, run: Path, keep_last: int, tell: Callable[[str], object]
    ) -> None:
        self.storage, self.run, self.keep_last, self.tell = storage, run, keep_last, tell
        self._changed = threading.Condition()
        self._last: _Job | None = None
        self._waiting: _Job | None = None
        self._now: _Job | None = None
        self._copied = -1
        self._problem = ""

    def copy(self, step: int, best: int | None, known: bool = False) -> None:
        """Have the checkpoint of ``step`` copied; returns at once. It must stay while ``in_use``."""
        file = self.run / METRICS
        metrics = file.read_bytes() if file.is_file() else b""
        self._submit(_Job(step, metrics, best, known))

    def in_use(self) -> set[int]:
        """Steps whose directories are still read."""
        with self._changed:
            return {job.step for job in (self._now, self._waiting) if job is not None}

    def finish(self, timeout: float) -> None:
        """Wait until the last checkpoint is copied, try once more where it was not, and say so."""
        last = self._last
        if last is None:
            return
        for attempt in range(2):
            with self._changed:
                ended = self._changed.wait_for(lambda: self._now is None, timeout)
            if ended and self._copied == last.step:
                return
            if not ended:
                self._problem = f"no end after {timeout:g} s"
                break
            if attempt == 0:
                self._submit(last)
        name = name_of(last.step)
        self._warn(
            f"{name} is NOT in {self.storage.url} ({self._problem}), only in "
            f"{self.run / 'checkpoints' / name}; to copy it: rectify run --resume {self.run}"
        )

    def _submit(self, job: _Job) -> None:
        with self._changed:
            self._last = self._waiting = job
            if self._now is None:
                self._now = job
                threading.Thread(target=self._work, name="copies", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                job, self._waiting = self._waiting, None
                self._now = job
                if job is None:
                    self._changed.notify_all()
                    return
            self._copy(job)

    def _copy(self, job: _Job) -> None:
        storage, run, name = self.storage, self.run.name, name_of(job.step)
        try:
            if not (job.known and job.step in storage.steps(run)):
                storage.copy(run, self.run / "checkpoints" / name, job.metrics)
                logger.info("%s is copied to %s", name, storage.url)
            self._copied = job.step
            spared = set() if job.best is None else {job.best}
            storage.prune(run, job.step, self.keep_last, spared)
        except StorageError as error:
            self._problem = str(error)
            if self._copied == job.step:
                self._warn(f"old checkpoints stay in the storage: {error}")
            else:
                self._warn(f"{name} was not copied: {error}; the next one will be tried")

    def _warn(self, message: str) -> None:
        logger.warning(message)
        self.tell(f"warning: {message}")
