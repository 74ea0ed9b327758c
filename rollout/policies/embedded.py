"""Where embedded base models live: trained once on this machine, cached whole or not there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def cached(name: str) -> Path:
    """The directory of an embedded base: under RECTIFY_CACHE or ~/.cache/rectify."""
    root = os.environ.get("RECTIFY_CACHE") or Path.home() / ".cache" / "rectify"
    return Path(root) / name


def ensure(name: str, train: Callable[[Path], None]) -> Path:
    """``cached(name)``, filled by ``train`` first where it is not there.

    A directory appears by a rename, so what is there is whole; processes that train at the same time
    make the same thing, and the first one's stays.
    """
    target = cached(name)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        logger.info("training the embedded base %s (once, minutes)", name)
        train(scratch)
        try:
            os.rename(scratch, target)
        except OSError:  # another process finished first; its result is the same
            shutil.rmtree(scratch)
    return target
