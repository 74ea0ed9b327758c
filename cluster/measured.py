"""What the measuring verbs write: a directory with JSON, CSV, PNG and a page that needs nothing else."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class MeasureError(Exception):
    """What cannot be measured or written, where, and what to do instead."""


@dataclass(frozen=True)
class Table:
    """Numbers as they are shown."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Measured:
    """What a verb wrote: the table for the console, the files, what to know about the numbers."""

    table: Table
    files: list[Path]
    notes: list[str]


def number(value: Any) -> str:
    """Four digits; nothing for what is not known."""
    return "" if value is None or np.isnan(value) else f"{value:.4g}"


def output_directory(name: str, out: Path | None) -> Path:
    """``out``, or ``name``, ``name-2`` ... of the current directory; nothing is made yet.

    Raises:
        MeasureError: ``out`` is a file, or not empty.
    """
    if out is None:
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(path for path in map(Path, names) if not path.exists())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise MeasureError(f"{out} is a file or not empty; give --out a new directory")
    return out


def save_page(
    directory: Path,
    name: str,
    rows: Sequence[Sequence[Any]],
    tables: Sequence[Table],
    figures: Sequence[tuple[str, str]],
    notes: list[str],
    files: Mapping[str, bytes],
) -> Measured:
    """Write ``files``, ``name.csv`` of ``rows`` (head first) and ``name.html`` of the rest.

    Args:
        figures: title and data address. files: by name.

    Raises:
        MeasureError: the directory cannot be made or written.
    """
    from jinja2 import Environment, PackageLoader

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    templates = Environment(loader=PackageLoader("cluster", "templates"), autoescape=True)
    page = templates.get_template("measured.html.j2").render(
        title=directory.name, tables=tables, figures=figures, notes=notes
    )
    contents = {**files, f"{name}.csv": buffer.getvalue().encode(), f"{name}.html": page.encode()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (directory / file).write_bytes(content)
    except OSError as error:
        raise MeasureError(f"{directory} cannot be written: {error}; give --out another") from error
    return Measured(tables[0], [directory / file for file in contents], notes)
