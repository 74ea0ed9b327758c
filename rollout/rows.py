"""Rows of prompts: of a file, of a directory, of what ``save_to_disk`` wrote, or of the hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

SUFFIXES = (".jsonl", ".json", ".parquet")
# What `datasets` and the hub put beside the rows.
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
# A suffix begins with a letter: the hub has names such as NuminaMath-1.5.
SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes


class Row(NamedTuple):
    """One row.

    Attributes:
        place: where it stands, for messages: ``file:line`` or ``file, row n``.
        number: that line or row, from 1.
        cells: plain Python by column.
    """

    place: str
    number: int
    cells: dict[str, Any]


class RowSource(BaseModel, frozen=True, extra="forbid"):
    """Options of prompts that come as rows of a dataset."""

    source: str = Field(
        min_length=1,
        description="A .jsonl, .json or .parquet file, a directory of them or of save_to_disk, "
        "or a dataset of the hub, e.g. openai/gsm8k.",
    )
    subset: str | None = Field(
        default=None,
        min_length=1,
        description="Configuration on the hub (main for openai/gsm8k), or folder of a directory.",
    )
    split: str = Field(
        default="train",
        pattern=r"^\w+(\.\w+)*$",
        description="Split of the hub or of a directory; a single file is read whole.",
    )
    limit: int | None = Field(default=None, ge=1, description="Only the first so many rows.")

    @property
    def on_hub(self) -> bool:
        """Whether ``source`` names a dataset of the hub and nothing on this machine."""
        here = os.path.exists(os.path.expanduser(self.source))
        return not here and not SUFFIX.search(self.source) and bool(HUB_ID.fullmatch(self.source))

    def check_hub_reader(self) -> None:
        """What can be said of a dataset of the hub before it is fetched.

        Raises:
            ValueError: the package that fetches it is not installed.
        """
        if importlib.util.find_spec("datasets") is None:
            raise _not_installed(self.source)

    def rows(self) -> Iterator[Row]:
        """All rows in order.

        Raises:
            ValueError: the source is missing, unreachable or of another type, it cannot be read, or
                a package is not installed.
        """
        path = Path(os.path.expanduser(self.source))
        if os.path.exists(path):
            return self._local_rows(path)
        if not self.on_hub:
            raise ValueError(
                f"{self.source}: no such file or directory (seen from {Path.cwd()}): correct the "
                "field 'source', or name a dataset of the hub such as openai/gsm8k"
            )
        return self._hub_rows()

    def _local_rows(self, path: Path) -> Iterator[Row]:
        if self.subset is not None:
            if not (path / self.subset).is_dir():
                raise ValueError(
                    f"{path}: has no folder {self.subset!r}: remove or correct the field 'subset'"
                )
            path = path / self.subset
        if not path.is_dir():
            return file_rows(path)
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _saved_rows(path, self.split)
        return chain.from_iterable(map(file_rows, _files_of(path, self.split)))

    def _hub_rows(self) -> Iterator[Row]:
        datasets = _package("datasets", self.source)
        # RuntimeError: a set that needs a script of its own.
        failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        try:
            rows = datasets.load_dataset(self.source, self.subset, split=self.split)
        except failures as error:
            raise ValueError(
                f"{self.source}: is no local path and cannot be read from the Hugging Face hub: "
                "check the fields 'source', 'subset' and 'split'; without network or with "
                "HF_HUB_OFFLINE=1 only a set that was downloaded before can be read, so set "
                "'source' to a local .jsonl, .json or .parquet file of it. "
                f"The reason given: {error}"
            ) from error
        name = "/".join(part for part in (self.source, self.subset, self.split) if part)
        return _numbered(name, _plain(rows))


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of one file.

    Raises:
        ValueError: it is of another type or cannot be read, or a package is not installed.
    """
    if path.suffix == ".jsonl":
        return (
            _row(f"{path}:{number}", number, _line(path, number, line))
            for number, line in numbered_lines(path)
        )
    if path.suffix == ".json":
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise ValueError(
        f"{path}: rows are read from {', '.join(SUFFIXES)} files: convert it to .jsonl"
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of the lines that are not blank; only a line feed ends a line.

    Raises:
        ValueError: it is not there or not UTF-8.
    """
    lines = enumerate(_content(path).split("\n"), 1)
    return ((number, line) for number, line in lines if line.strip())


def _files_of(directory: Path, split: str) -> list[Path]:
    """Files with rows below a directory, sorted; of one split if their paths name splits."""
    found: list[Path] = []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix in SUFFIXES and path.name not in METADATA and not hidden and path.is_file():
            found.append(path)
    if not found:
        raise ValueError(
            f"{directory}: holds no file {', '.join(SUFFIXES)}: correct the field 'source'"
        )
    named = {
        name: [path for path in found if _names(path.relative_to(directory), name)]
        for name in (split, *SPLITS)
    }
    chosen = named[split] if any(named.values()) else found
    if not chosen:
        others = ", ".join(name for name, paths in named.items() if paths)
        raise ValueError(
            f"{directory}: no file there is named for the split {split!r}, only for {others}: "
            "correct the field 'split', or set 'source' to one file"
        )
    suffixes = sorted({path.suffix for path in chosen})
    if len(suffixes) > 1:
        raise ValueError(
            f"{directory}: holds the rows of {split!r} as {' and '.join(suffixes)}, which may be "
            "copies of each other: set the field 'source' to one file or folder"
        )
    return chosen


def _names(path: Path, split: str) -> bool:
    """Whether a path has the split as a word: train.jsonl, train-00000-of-00001, train/a.json."""
    spaced, wanted = (re.sub(r"[\W_]+", " ", text.lower()) for text in (str(path), split))
    return f" {wanted} " in f" {spaced} "


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json file: a list of objects, or one object as MATH was released."""
    remedy = "it holds a list of objects; name it .jsonl if it has an object a line"
    try:
        content = json.loads(_content(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}: {remedy}") from error
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: is no list: {remedy}")
    return _numbered(str(path), rows)


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, read by pyarrow, which comes with `datasets`."""
    parquet = _package("pyarrow.parquet", str(path))
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as parquet; write it again: {error}") from error
    return _numbered(str(path), rows)


def _saved_rows(directory: Path, split: str) -> Iterator[Row]:
    """Rows of what save_to_disk wrote; the split matters where it wrote several."""
    datasets = _package("datasets", str(directory))
    try:
        saved = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory}: cannot be read as a dataset of save_to_disk; write it again: {error}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(
                f"{directory}: has no split {split!r}: set the field 'split' to one of "
                f"{', '.join(saved)}"
            )
        saved = saved[split]
    return _numbered(str(directory), _plain(saved))


def _plain(rows: Any) -> Any:
    """A dataset whose cells come as plain Python: media as their bytes, no arrays or tensors."""
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        if isinstance(feature, media):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    return (_row(f"{name}, row {number}", number, cells) for number, cells in enumerate(rows, 1))


def _row(place: str, number: int, cells: Any) -> Row:
    if not isinstance(cells, dict):
        raise ValueError(f'{place}: is no object: write it as {{"key": "value", ...}}')
    return Row(place, number, cells)


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not JSON: {error.msg} at column {error.colno}: a line is one object"
        ) from error


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _package(module: str, source: str) -> Any:
    """A module of the optional extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _not_installed(source) from error


def _not_installed(source: str) -> ValueError:
    return ValueError(
        f"{source}: reading it needs the package 'datasets': pip install 'rectify[math]', or give "
        "a .jsonl or .json file of it"
    )
