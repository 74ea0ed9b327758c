"""Where each process of a run writes its log."""

from __future__ import annotations

import logging
from pathlib import Path


def log_to(path: str | None) -> None:
    """Send this process's log records to ``path`` as well; None leaves logging as it is."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # A full disk must not fill the terminal with a traceback for each record.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
