"""URLs of a storage for checkpoints: which there are, and what each needs."""

from __future__ import annotations

import importlib.util
from urllib.parse import urlsplit

from recipes.errors import nearest

# The package that reaches a scheme, and the extra that installs it; None: nothing more is needed.
DRIVERS: dict[str, tuple[str, str] | None] = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "hdfs": ("pyarrow", "hdfs"),
    "file": None,
    "memory": None,
}


def storage_problem(url: str) -> str | None:
    """What is wrong with a URL, or which package it lacks; secrets in it are not repeated."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in DRIVERS:
        hint = nearest(scheme, DRIVERS) if mark else ""
        return f"expected a URL of {', '.join(f'{s}://' for s in DRIVERS)}{hint}"
    name, at, _ = rest.rpartition("@")
    if at and (scheme != "hdfs" or ":" in name):
        return (
            "credentials do not belong in a URL: take out what stands before '@' and give them to "
            f"{scheme}'s driver by its environment variables or files"
        )
    parts = urlsplit(url)
    if scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        return "name an absolute directory: file:///shared/checkpoints"
    if scheme in ("s3", "gs") and not parts.netloc:
        return f"names no bucket: {scheme}://bucket/prefix"
    driver = DRIVERS[scheme]
    if driver is not None and importlib.util.find_spec(driver[0]) is None:
        return f"{scheme}:// needs {driver[0]}: pip install 'rectify[{driver[1]}]'"
    return None
