"""Where each process of a run writes its log."""

from __future__ import annotations

import faulthandler
import logging
import signal
from pathlib import Path


def log_to(path: str | None) -> None:
    """Send this process's log records to ``path`` as well; None leaves logging as it is.

    SIGUSR1 adds the stack of each thread, also of one that hangs in Python.
    """
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    stream = Path(path).open("a")  # noqa: SIM115  as long as the process
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # A full disk must not fill the terminal with a traceback for each record.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
