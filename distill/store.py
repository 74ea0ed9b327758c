"""Teacher samples on disk: drawn by one command, read by many runs.

A store is a directory::

    store.json                what the samples are: identity, number of shards, dtype
    shard_000012.safetensors  "seeds" (rows,), "x0" (rows, C, F, H, W); prompts in the metadata
    shard_000012.json         its size, sha256 and the number of samples of each group

The index is the union of the small files: writers of different shards share no file. A file is
written elsewhere, fsynced and renamed, the shard before its small file, so that a crash loses at most
the shard being written. Start noise is not stored; it comes from the seeds (:func:`initial_noise`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout.draws import Draw

logger = logging.getLogger(__name__)
HEADER = "store.json"
COMMAND = "rectify teacher RECIPE"
Dtype = Literal["float32", "bfloat16"]


class StoreError(ValueError):
    """A teacher store cannot be used as asked."""


class StoreIncomplete(StoreError):
    """There are no samples, or not yet all of them."""


class StoreCorrupt(StoreError):
    """A file of the store is not what was written."""


class StoreMismatch(StoreError):
    """The samples are others than those asked for, or their noise cannot be drawn here."""


@dataclass(frozen=True)
class StoredGroup:
    """The teacher's samples of one prompt.

    Attributes:
        prompt_id, prompt, columns: as in ``rollout.draws.Prompt``; the columns are JSON.
        seeds: int64 (n,), the seeds of the samples' draws.
        x0: fp32 (n, C, F, H, W), the samples.
    """

    prompt_id: str
    prompt: str
    columns: dict[str, Any]
    seeds: np.ndarray
    x0: np.ndarray


@dataclass(frozen=True)
class StoredReference:
    """Where a group is: directory of the store, shard, place in the shard; samples it has."""

    path: Path
    shard: int
    group: int
    rows: int

    def read(self) -> StoredGroup:
        """The group; only its rows are read, after one check of the shard in this process.

        Raises:
            StoreCorrupt: the shard is not what was written.
            StoreMismatch: this torch draws other noise from the seeds.
        """
        _verify(self.path, self.shard)
        file, _ = _files(self.path, self.shard)
        with safe_open(file, framework="pt") as tensors:
            groups: list[dict[str, Any]] = json.loads(tensors.metadata()["groups"])
            facts = groups[self.group]
            first = sum(group["rows"] for group in groups[: self.group])
            rows = slice(first, first + facts["rows"])
            # Copies: a slice is a view that keeps the whole shard mapped.
            seeds = tensors.get_slice("seeds")[rows].clone().numpy()
            x0 = tensors.get_slice("x0")[rows].to(torch.float32, copy=True).numpy()
        return StoredGroup(facts["id"], facts["prompt"], facts["columns"], seeds, x0)


def initial_noise(seeds: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The noise z that samples started from: fp32 (n, \\*shape), CPU, a function of the seeds."""
    rows = [Draw(0, 0, "", 0, int(seed)).noise("initial", shape)[None] for seed in seeds]
    return torch.cat([torch.empty(0, *shape), *rows])


class _Header(BaseModel, frozen=True, extra="forbid"):
    """``store.json``."""

    format: Literal[1] = 1
    shards: int = Field(ge=1)
    dtype: Dtype
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        """A name for the facts, which every shard carries."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class _Entry(BaseModel, frozen=True, extra="forbid"):
    """The small file beside a shard; ``seeds`` and ``noise`` are of its first sample, if any."""

    store: str
    size: int
    sha256: str
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    noise: str
    torch: str


class TeacherStore:
    """A directory of teacher samples: made with :meth:`create`, read with :meth:`open`."""

    def __init__(self, directory: Path, header: _Header) -> None:
        self.directory = directory
        self.shards, self.identity = header.shards, header.identity
        self.dtype: Dtype = header.dtype
        self._digest = header.digest
        self._references: list[StoredReference] | None = None
        drawn = [entry for entry in self._survey()[0].values() if entry.seeds]
        for entry in drawn[:1]:  # the others when their shards are read
            _check_noise(directory, entry)

    @classmethod
    def create(
        cls, directory: Path, identity: Mapping[str, Any], shards: int, dtype: Dtype = "float32"
    ) -> TeacherStore:
        """The store to fill: a new one, or the one that is there to go on with.

        Args:
            identity: JSON facts that determine the samples (checkpoint, sampler, seed, ...).
            dtype: of x0 on disk; bfloat16 rounds.

        Raises:
            StoreMismatch: the directory holds other samples, or was filled with other noise.
            StoreCorrupt: ``store.json`` is not readable.
        """
        asked = _Header(shards=shards, dtype=dtype, identity=dict(identity))
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / HEADER).exists():
            with _published(directory / HEADER) as file:
                file.write_text(json.dumps(asked.model_dump(), indent=1))
        stored = _header(directory)
        if stored.digest != asked.digest:
            raise StoreMismatch(
                f"{directory}: holds other teacher samples: {_differences(stored, asked)}: "
                "name another directory, or remove this one"
            )
        return cls(directory, stored)

    @classmethod
    def open(cls, directory: Path) -> TeacherStore:
        """A complete store. Sizes are compared here, checksums when a shard is first read.

        Raises:
            StoreIncomplete: there is none, or shards are missing.
            StoreCorrupt: a shard or the index is not what was written.
            StoreMismatch: this torch draws other noise from the seeds.
        """
        directory = Path(directory).absolute()
        store = cls(directory, _header(directory))
        store._index()
        return store

    def missing(self) -> list[int]:
        """Shards still to be written. Reads all that is there; a damaged shard is missing."""
        entries, damaged = self._survey(contents=True)
        for error in damaged:
            logger.warning("%s", error)
        return [shard for shard in range(self.shards) if shard not in entries]

    def write(self, shard: int, groups: Sequence[StoredGroup]) -> None:
        """Write one shard whole; other processes may write other shards at the same time.

        Raises:
            ValueError: there is no such shard, or a group cannot be stored.
        """
        if not 0 <= shard < self.shards:
            raise ValueError(f"{self.directory}: shard {shard} of {self.shards}")
        tensors = _joined(groups, self.dtype)
        facts = [_facts(group) for group in groups]
        final, sidecar = _files(self.directory, shard)
        for leftover in self.directory.glob(f".tmp-{final.stem}.*"):  # of a writer that died
            shutil.rmtree(leftover, ignore_errors=True)
        with _published(final) as file:
            save_file(tensors, file, {"groups": json.dumps(facts)})
            # Else only the owner may read it: safetensors writes through a temporary file.
            file.chmod(stat.S_IMODE((self.directory / HEADER).stat().st_mode))
            size, sha256 = file.stat().st_size, _digest(file)
        shape, first = tuple(tensors["x0"].shape[1:]), tuple(tensors["seeds"][:1].tolist())
        entry = _Entry(
            store=self._digest,
            size=size,
            sha256=sha256,
            rows=tuple(len(group.seeds) for group in groups),
            shape=shape,
            seeds=first,
            noise=_noise(first, shape),
            torch=str(torch.__version__),
        )
        with _published(sidecar) as file:
            file.write_text(entry.model_dump_json(indent=1))
        self._references = None

    def __len__(self) -> int:
        """Groups of all shards. Raises like :meth:`open`."""
        return len(self._index())

    def reference(self, position: int) -> StoredReference:
        """Where group ``position`` is, counted over all shards in order. Raises like :meth:`open`,
        and IndexError."""
        references = self._index()
        if not 0 <= position < len(references):
            raise IndexError(f"{self.directory}: group {position} of {len(references)}")
        return references[position]

    def _index(self) -> list[StoredReference]:
        if self._references is None:
            entries, damaged = self._survey()
            if damaged:
                raise damaged[0]
            absent = [shard for shard in range(self.shards) if shard not in entries]
            if absent:
                raise StoreIncomplete(
                    f"{self.directory}: {len(absent)} of {self.shards} shards of teacher samples "
                    f"are missing, the first is {absent[0]}: `{COMMAND}` draws them"
                )
            self._references = [
                StoredReference(self.directory, shard, group, rows)
                for shard, entry in entries.items()
                for group, rows in enumerate(entry.rows)
            ]
        return self._references

    def _survey(self, contents: bool = False) -> tuple[dict[int, _Entry], list[StoreCorrupt]]:
        """The shards that are there, in order, and what is wrong with those that are damaged."""
        entries: dict[int, _Entry] = {}
        damaged: list[StoreCorrupt] = []
        for shard in range(self.shards):
            try:
                entry = _entry(self.directory, shard, contents)
            except StoreCorrupt as error:
                damaged.append(error)
            else:
                if entry is not None and entry.store == self._digest:
                    entries[shard] = entry
        return entries, damaged


def _header(directory: Path) -> _Header:
    path = directory / HEADER
    if not path.exists():
        raise StoreIncomplete(f"{directory}: holds no teacher samples: `{COMMAND}` draws them")
    try:
        return _Header.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreCorrupt(f"{path}: remove it and run `{COMMAND}` again: {error}") from error


def _entry(directory: Path, shard: int, contents: bool) -> _Entry | None:
    """What the index says of a shard; None where one of its two files is not there. Raises
    StoreCorrupt for an unreadable index, another size or (with ``contents``) another sha256."""
    file, sidecar = _files(directory, shard)
    if not (sidecar.exists() and file.exists()):
        return None
    try:
        entry = _Entry.model_validate_json(sidecar.read_bytes())
    except ValidationError as error:
        raise _corrupt(directory, shard, f"{sidecar.name} is not readable") from error
    size = file.stat().st_size
    if size != entry.size:
        raise _corrupt(directory, shard, f"{file.name} has {size} of {entry.size} bytes")
    if contents and _digest(file) != entry.sha256:
        raise _corrupt(directory, shard, f"{file.name} changed (sha256)")
    return entry


@functools.cache
def _verify(directory: Path, shard: int) -> None:
    """Check a shard before its first read in this process."""
    entry = _entry(directory, shard, contents=True)
    if entry is None:
        raise _corrupt(directory, shard, "its files are gone")
    _check_noise(directory, entry)


def _noise(seeds: Sequence[int], shape: Sequence[int]) -> str:
    noise = initial_noise(np.array(seeds, np.int64), shape)
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()


def _check_noise(directory: Path, entry: _Entry) -> None:
    if _noise(entry.seeds, entry.shape) != entry.noise:
        raise StoreMismatch(
            f"{directory}: torch {torch.__version__} on this processor does not draw the noise "
            f"that these samples started from, torch {entry.torch} did: use that version, or "
            f"fill another directory with `{COMMAND}`"
        )


def _corrupt(directory: Path, shard: int, problem: str) -> StoreCorrupt:
    text = f"{directory}: shard {shard} is damaged: {problem}: `{COMMAND}` writes it again"
    return StoreCorrupt(text)


def _joined(groups: Sequence[StoredGroup], dtype: Dtype) -> dict[str, Tensor]:
    """Samples of all groups, one after the other."""
    shape = groups[0].x0.shape[1:] if groups else (0, 0, 0, 0)
    for group in groups:
        found = (str(group.seeds.dtype), group.seeds.shape, str(group.x0.dtype), group.x0.shape)
        wanted = ("int64", (len(group.seeds),), "float32", (len(group.seeds), *shape))
        if found != wanted:
            raise ValueError(f"group {group.prompt_id!r}: seeds, x0 are {found}, not {wanted}")
    seeds = np.concatenate([np.zeros(0, np.int64), *(group.seeds for group in groups)])
    x0 = np.concatenate([np.zeros((0, *shape), np.float32), *(group.x0 for group in groups)])
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    return {"seeds": torch.from_numpy(seeds), "x0": torch.from_numpy(x0).to(stored)}


def _facts(group: StoredGroup) -> dict[str, Any]:
    """A group without its arrays, for JSON."""
    text = {"id": group.prompt_id, "prompt": group.prompt, "columns": group.columns}
    if repr(json.loads(json.dumps(text))) != repr(text):  # a tuple, say; NaN is not equal to NaN
        raise ValueError(f"group {group.prompt_id!r}: not plain JSON: {text}")
    return {**text, "rows": len(group.seeds)}


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {key: json.dumps(value, ensure_ascii=False)}
    inner = [_flat(item, f"{key}.{name}" if key else name) for name, item in value.items()]
    return {path: text for facts in inner for path, text in facts.items()}


def _differences(stored: _Header, asked: _Header) -> str:
    there, here = _flat(stored.model_dump()), _flat(asked.model_dump())
    pairs = {key: (there.get(key, "nothing"), here.get(key, "nothing")) for key in there | here}
    return ", ".join(f"{k} (there {a}, asked for {b})" for k, (a, b) in pairs.items() if a != b)


def _files(directory: Path, shard: int) -> tuple[Path, Path]:
    """A shard and the small file beside it."""
    name = f"shard_{shard:06d}"
    return directory / f"{name}.safetensors", directory / f"{name}.json"


@contextmanager
def _published(path: Path) -> Generator[Path]:
    """A file to fill, in a directory of its own; it becomes ``path`` when nothing failed."""
    scratch = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    try:
        yield scratch / path.name
        _sync(scratch / path.name)
        os.replace(scratch / path.name, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
