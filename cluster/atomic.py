"""Small files that are whole or as they were."""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file; where that fails, what was there stays."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
