"""How much Ray would upload of a working directory, before it reads or packs any of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The walk that Ray packs by: whatever else would count something else than is sent.
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging

# Code and small data. Ray keeps a package in the head's memory, and holds none above 512 MiB.
LIMIT = 256 * 2**20
NAMED = 3


def check_size(directory: Path) -> str | None:
    """Why ``directory`` is not uploaded: it is none, or holds too much that is not ignored."""
    if not directory.is_dir():
        return f"--working-dir {directory}: no such directory"
    sizes = _uploaded(directory.resolve())
    total = sum(sizes.values())
    if total <= LIMIT:
        return None
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:NAMED]
    named = ", ".join(f"{path} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
    return (
        f"--working-dir {directory}: {total / 2**20:.0f} MiB in {len(sizes)} files is more than "
        f"{LIMIT / 2**20:.0f} MiB; largest: {named}. Name what the run does not need in .rayignore "
        "(or .gitignore), keep data on storage that the cluster shares, or give --installed"
    )


def _uploaded(directory: Path) -> dict[Path, int]:
    """Bytes of every file that Ray would pack."""
    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(directory)] = path.stat().st_size

    walk: Any = packaging._dir_travel  # pyright: ignore[reportPrivateUsage]
    excluded: Callable[[Path], bool] = packaging._get_excludes(  # pyright: ignore[reportPrivateUsage]
        directory, get_runtime_env_default_excludes()
    )
    ignored = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    walk(directory, [excluded], note, include_gitignore=ignored)
    return sizes
