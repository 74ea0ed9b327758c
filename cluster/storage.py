"""Copies of runs in a storage that other machines reach too, through fsspec.

    STORAGE/<run name>/  recipe.yaml  data.sha256  versions.json
      step_000040/  metrics.jsonl, the checkpoint's files, manifest.json

Object stores have no rename: the manifest is written last and removed first, and a copy without it is
not there. Only these files are ever copied.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any

import fsspec

from cluster import checkpoints
from cluster.atomic import replace_text
from cluster.checkpoints import MANIFEST, CheckpointError, name_of, step_of
from recipes.schema import AnyRecipe
from recipes.storage_url import storage_problem

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
DESCRIBING = (RECIPE, "data.sha256", "versions.json")
CREDENTIALS = {
    "s3": "; credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws; AWS_ENDPOINT_URL",
    "gs": "; credentials: GOOGLE_APPLICATION_CREDENTIALS, or gcloud's application-default login",
    "hdfs": "; it needs JAVA_HOME, HADOOP_HOME and CLASSPATH, and kinit under Kerberos",
}


class StorageError(ValueError):
    """A storage that does not do what is asked: which, why, what to do."""


class Storage:
    """A directory of runs at an fsspec URL. Every method raises StorageError where it fails."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition("://")[0]
        if problem := storage_problem(url):
            raise StorageError(f"checkpoints.storage: {problem}")
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if self.scheme == "file":
            options["auto_mkdir"] = True
        with self._asked("open"):
            found: Any = fsspec.core.url_to_fs(self.url, **options)
        self.files, self.root = found[0], str(found[1]).rstrip("/")

    def prove(self) -> None:
        """Write, read and remove a small file."""
        path, content = f"{self.root}/.proof-{secrets.token_hex(8)}", b"rectify"
        with self._asked("write to"):
            self.files.pipe_file(path, content)
        with self._asked("read from"):
            if self.files.cat_file(path) != content:
                raise OSError("a file came back with another content")
        with self._asked("delete in"):
            self.files.rm_file(path)

    def names(self, run: str = "") -> set[str]:
        """What stands in a run's directory, or the runs."""
        place = f"{self.root}/{run}".rstrip("/")
        with self._asked("look into"):
            try:
                return {str(p).rstrip("/").rpartition("/")[2] for p in self.files.ls(place, False)}
            except FileNotFoundError:
                return set()

    def steps(self, run: str) -> list[int]:
        """Steps of which a copy was finished, ascending."""
        return [
            step for step in self._begun(run) if MANIFEST in self.names(f"{run}/{name_of(step)}")
        ]

    def read(self, run: str, name: str) -> bytes:
        """A small file of a run."""
        with self._asked(f"read {run}/{name} in"):
            return self.files.cat_file(f"{self.root}/{run}/{name}")

    def describe(self, run: Path) -> None:
        """Copy what says what the run in the directory ``run`` is.

        Raises:
            StorageError: also where another run of this name is there.
        """
        known = RECIPE in self.names(run.name)
        if known and self.read(run.name, RECIPE) != (run / RECIPE).read_bytes():
            raise StorageError(
                f"{self.url}/{run.name} holds another run than {run} (their {RECIPE} differ): "
                "give another checkpoints.storage"
            )
        with self._asked("write to"):
            for name in reversed(DESCRIBING):  # last the recipe, by which a run is known
                if not known and (run / name).is_file():
                    content = (run / name).read_bytes()
                    self.files.pipe_file(f"{self.root}/{run.name}/{name}", content)

    def copy(self, run: str, checkpoint: Path, metrics: bytes) -> None:
        """Copy a checkpoint; its manifest last."""
        place = f"{self.root}/{run}/{checkpoint.name}"
        with self._asked(f"copy {checkpoint.name} to"):
            manifest = (checkpoint / MANIFEST).read_bytes()
            self._remove(place)
            self.files.pipe_file(f"{place}/{METRICS}", metrics)
            for entry in checkpoints.entries_of(manifest):
                self.files.put_file(str(checkpoint / entry.name), f"{place}/{entry.name}")
                size = self.files.size(f"{place}/{entry.name}")
                if size != entry.size:
                    raise OSError(f"{entry.name} arrived with {size} of {entry.size} bytes")
            self.files.pipe_file(f"{place}/{MANIFEST}", manifest)

    def prune(self, run: str, step: int, keep_last: int, spared: Collection[int]) -> None:
        """As ``checkpoints.prune``; copies that were not finished go too."""
        finished = self.steps(run)
        kept = {*[s for s in finished if s <= step][-keep_last:], *spared}
        with self._asked("delete in"):
            for old in self._begun(run):
                if old not in finished or (old <= step and old not in kept):
                    self._remove(f"{self.root}/{run}/{name_of(old)}")

    def fetch(self, run: str, step: int, target: Path) -> None:
        """Copy a checkpoint back into the run directory ``target``, verified, with its metrics.

        Raises:
            StorageError: it cannot be read, or does not fit. CheckpointError: it is damaged.
        """
        name = name_of(step)
        place, final = f"{self.root}/{run}/{name}", target / "checkpoints" / name
        manifest, metrics = (
            self.read(run, f"{name}/{MANIFEST}"),
            self.read(run, f"{name}/{METRICS}"),
        )
        try:
            entries = checkpoints.entries_of(manifest)
        except ValueError as error:
            raise CheckpointError(f"{self.url}/{run}/{name} is damaged: {error}") from error
        need = sum(entry.size for entry in entries)
        if need > shutil.disk_usage(target).free:
            raise StorageError(f"{target} has no room for the {need} bytes of {name}")
        scratch = checkpoints.scratch_for(final)
        try:
            for entry in entries:
                (scratch / entry.name).parent.mkdir(parents=True, exist_ok=True)
                # One that is not there is named below.
                missing = contextlib.suppress(FileNotFoundError)
                with self._asked(f"read {run}/{name}/{entry.name} in"), missing:
                    self.files.get_file(f"{place}/{entry.name}", str(scratch / entry.name))
            (scratch / MANIFEST).write_bytes(manifest)
            if problem := checkpoints.verify(scratch, step):
                raise CheckpointError(f"{self.url}/{run}/{name} is damaged: {problem}")
            replace_text(target / METRICS, metrics.decode(errors="replace"))
            checkpoints.install(scratch, final)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _begun(self, run: str) -> list[int]:
        """Steps of which there is anything, ascending."""
        return sorted(step for name in self.names(run) if (step := step_of(name)) is not None)

    def _remove(self, place: str) -> None:
        """A copy, or what there is of one: without its manifest it is gone at once."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{place}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(place, recursive=True)

    @contextlib.contextmanager
    def _asked(self, what: str) -> Generator[None]:
        """Every driver has errors of its own; none of them is the run's end."""
        try:
            yield
        except (CheckpointError, StorageError):
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise StorageError(
                f"cannot {what} {self.url} ({type(error).__name__}: {reason})"
                f"{CREDENTIALS.get(self.scheme, '')}"
            ) from error


def proved(recipe: AnyRecipe) -> Storage | None:
    """The recipe's storage, if it has one, known to take and give files.

    Raises:
        StorageError: it does not.
    """
    if recipe.checkpoints.storage is None:
        return None
    storage = Storage(recipe.checkpoints.storage)
    storage.prove()
    return storage


def begun(recipe: AnyRecipe) -> str | None:
    """What a run of the recipe's name left, a directory here or a URL; None: nothing to go on with.

    Raises:
        StorageError: the storage gives no answer.
    """
    # Both are written before anything is started.
    if all((recipe.directory / name).is_file() for name in ("recipe.yaml", "data.sha256")):
        return str(recipe.directory)
    url = recipe.checkpoints.storage
    stored = url is not None and recipe.name in Storage(url).names()
    return f"{url}/{recipe.name}" if stored else None


def fetch_newer(storage: Storage, run: str, target: Path, tell: Callable[[str], object]) -> None:
    """Fetch the newest valid copy of a run, unless the newest valid checkpoint here is as new.

    Args:
        target: a run directory. tell: is told what is fetched, and which damaged ones are passed over.

    Raises:
        StorageError: a copy cannot be read or does not fit here.
    """
    try:
        here = checkpoints.latest(target / "checkpoints")
    except CheckpointError:
        here = None
    for step in reversed(storage.steps(run)):
        if here is not None and step <= here.step:
            return
        tell(f"fetching {storage.url}/{run}/{name_of(step)}")
        try:
            storage.fetch(run, step, target)
        except CheckpointError as error:
            logger.warning("%s; it is passed over", error)
            tell(f"{error}; it is passed over")
        else:
            return


def located(url: str) -> tuple[Storage, str]:
    """The storage and the name of the run at ``STORAGE/NAME``, where there is one.

    Raises:
        StorageError: there is none.
    """
    place, _, name = url.rstrip("/").rpartition("/")
    if problem := storage_problem(url):
        raise StorageError(f"--resume: {problem}")
    if place.endswith("/"):
        raise StorageError(f"--resume: {url} names no run: give STORAGE/NAME")
    storage = Storage(place)
    if RECIPE not in storage.names(name):
        runs = ", ".join(sorted(run for run in storage.names() if RECIPE in storage.names(run)))
        raise StorageError(f"{place} holds no run {name}; there are: {runs or 'none'}")
    if not storage.steps(name):
        raise StorageError(f"{url} holds no checkpoint; run its recipe instead")
    return storage, name


@contextlib.contextmanager
def describing(storage: Storage, run: str) -> Generator[Path]:
    """A directory, for a while, with the files that say what a run is."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in DESCRIBING:
            (Path(scratch) / name).write_bytes(storage.read(run, name))
        yield Path(scratch)


def fetch_run(storage: Storage, run: str, path: Path, tell: Callable[[str], object]) -> Path:
    """Make the run directory ``path``, which is not there yet, of a stored run.

    Raises:
        StorageError: no run, nothing valid, or ``path`` is taken.
    """
    if os.path.lexists(path):
        raise StorageError(
            f"{path} is there already: continue it by --resume {path}, which takes the newest "
            "checkpoint of both, or give another --set run_dir"
        )
    scratch = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        for name in DESCRIBING:
            (scratch / name).write_bytes(storage.read(run, name))
        fetch_newer(storage, run, scratch, tell)
        if checkpoints.latest(scratch / "checkpoints") is None:
            raise StorageError(f"{storage.url}/{run}: none of its checkpoints is valid")
        scratch.rename(path)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(f"{path} cannot be written: {error}") from error
        raise
    return path
