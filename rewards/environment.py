"""Python environments of rewards whose libraries clash with the platform's.

``environments/NAME.txt`` says what is installed: requirements of pip, the one for torch first, and
lines that pip takes for comments:

    # alone: WORDS     requirements installed without what they ask for themselves
    # remove: WORDS    packages taken out again in the end
    # empty: WORDS     modules that have to be there but are not used
    # imports: WORDS   modules whose import proves that it works

Ray is added at the version that runs here. An environment counts once its marker is there, which is
written last, and as long as the marker says what is wanted today.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

FILES = Path(__file__).parent / "environments"
MARKER = "rectify.json"
OPERATORS = "rectify_torchvision"
NO_OPERATORS = "torchvision::nms does not exist"
LONGEST = 7200.0  # seconds that one installation may take

State = Literal["ready", "outdated", "unfinished", "absent"]


class EnvironmentFailed(RuntimeError):
    """An environment cannot be made, or another process is making it."""


@dataclass(frozen=True)
class Requirements:
    """What a file of requirements says; see this module."""

    file: Path
    listed: tuple[str, ...]
    alone: tuple[str, ...]
    remove: tuple[str, ...]
    empty: tuple[str, ...]
    imports: tuple[str, ...]

    @property
    def torch(self) -> str:
        """The requirement of torch."""
        return self.listed[0]

    @property
    def marker(self) -> dict[str, str]:
        """What an environment made of them here and now is marked with."""
        said = json.dumps([self.listed, self.alone, self.remove, self.empty, self.imports])
        return {
            "requirements": hashlib.sha256(said.encode()).hexdigest(),
            "python": platform.python_version(),
            "ray": metadata.version("ray"),
        }


def names() -> list[str]:
    """Of the environments there are requirements for."""
    return sorted(file.stem for file in FILES.glob("*.txt"))


def requirements(name: str) -> Requirements:
    """Of an environment.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names():
        raise ValueError(f"no environment {name!r}; there are: {', '.join(names())}")
    file = FILES / f"{name}.txt"
    text = file.read_text()
    words: dict[str, list[str]] = {"alone": [], "remove": [], "empty": [], "imports": []}
    for key, line in re.findall(rf"^# ({'|'.join(words)}): (.+)$", text, re.MULTILINE):
        words[key] += line.split()
    listed = tuple(line for line in text.splitlines() if line and not line.startswith("#"))
    return Requirements(file, listed, **{key: tuple(w) for key, w in words.items()})


def place_of(name: str) -> Path:
    """Where it is: RECTIFY_ENVIRONMENTS, or ``environments`` in RECTIFY_CACHE or ~/.cache/rectify."""
    root = os.environ.get("RECTIFY_ENVIRONMENTS")
    return (Path(root).expanduser() if root else _cache() / "environments").absolute() / name


def state(name: str) -> State:
    """What is there.

    Raises:
        ValueError: there is no environment of this name.
    """
    wanted, place = requirements(name).marker, place_of(name)
    try:
        found = json.loads((place / MARKER).read_text())
    except FileNotFoundError:
        return "unfinished" if place.is_dir() else "absent"
    return "ready" if found == wanted else "outdated"


def python_of(name: str) -> Path | None:
    """The interpreter of an environment that is ready."""
    return place_of(name) / "bin" / "python" if state(name) == "ready" else None


def missing(name: str) -> str | None:
    """Why a reward cannot use an environment, with the remedy; None if it can."""
    reasons = {
        "absent": "is not on this machine",
        "unfinished": "was not finished",
        "outdated": "was made for other requirements, another Python or another Ray",
    }
    found = state(name)
    if found == "ready":
        return None
    return f"its environment {name!r} {reasons[found]}: run 'rectify env create {name}'"


def create(name: str, report: Callable[[str], object]) -> Path:
    """Make an environment, anew where it is outdated or unfinished; returns its interpreter.

    ``report`` is told each step.

    Raises:
        ValueError: there is no environment of this name.
        EnvironmentFailed: a step failed, or another process makes the same one.
    """
    wanted, place = requirements(name), place_of(name)
    python = place / "bin" / "python"
    with _alone(place):
        if state(name) == "ready":
            return python
        if place.is_dir():
            report(f"{place}: deleting what is there")
            _delete(place)
        report(f"{place}: a new environment")
        _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
        _install(python, wanted, report)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
        for module in wanted.empty:
            (site / module).mkdir()
            (site / module / "__init__.py").touch()
        if (site / "torchvision").is_dir():
            _give_operators(python, site)
        report("trying it")
        _run([str(python), "-c", f"import {', '.join(('ray', *wanted.imports))}"])
        (place / MARKER).write_text(json.dumps(wanted.marker))
    return python


def remove(name: str) -> bool:
    """Delete an environment; whether there was anything.

    Raises:
        ValueError: there is no environment of this name.
        EnvironmentFailed: another process is making it.
    """
    if state(name) == "absent":
        return False
    with _alone(place_of(name)):
        _delete(place_of(name))
    return True


def size(name: str) -> int:
    """Bytes of its files."""
    return sum(file.lstat().st_size for file in place_of(name).rglob("*"))


def variables(threads: int) -> dict[str, str]:
    """What a process of an environment needs set: it sees its own libraries and this package.

    PYTHONPATH is a directory with nothing but a link to the package, for what stands beside the
    package is the platform's.
    """
    package = Path(__file__).resolve().parent
    key = hashlib.sha256(str(package).encode()).hexdigest()[:16]
    link = (_cache() / "packages" / key / package.name).absolute()
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # it leads to where its key says
        link.symlink_to(package, target_is_directory=True)
    return {
        "PYTHONPATH": str(link.parent),
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def _install(python: Path, wanted: Requirements, report: Callable[[str], object]) -> None:
    if not any(metadata.distributions(name="pip")):
        raise EnvironmentFailed(f"pip is not installed here: run '{sys.executable} -m ensurepip'")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--no-input"]
    report(f"installing {wanted.torch}")
    # First and alone: a wider range of another package would fetch another build of it.
    _run([*pip, "install", wanted.torch])
    ray = f"ray=={wanted.marker['ray']}"
    report(f"installing {wanted.file.name} and {ray} (minutes)")
    _run([*pip, "install", "-r", str(wanted.file), ray])
    if wanted.alone:
        _run([*pip, "install", "--no-deps", *wanted.alone])
    if wanted.remove:
        _run([*pip, "uninstall", "--yes", *wanted.remove])


def _give_operators(python: Path, site: Path) -> None:
    """Let torchvision be imported where its own library does not fit torch: see OPERATORS' file."""
    try:
        _run([str(python), "-c", "import torchvision"])
    except EnvironmentFailed as error:
        if NO_OPERATORS not in str(error):
            raise
        shutil.copyfile(FILES / f"{OPERATORS}.py", site / f"{OPERATORS}.py")
        (site / f"{OPERATORS}.pth").write_text(f"import {OPERATORS}\n")


def _run(command: Sequence[str]) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailed(f"{' '.join(command)} took over {LONGEST:g} s") from error
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise EnvironmentFailed(f"{' '.join(command)} ended with {done.returncode}:\n{last}")


def _delete(place: Path) -> None:
    """The marker first, so that what is half deleted does not count."""
    (place / MARKER).unlink(missing_ok=True)
    shutil.rmtree(place)


@contextmanager
def _alone(place: Path) -> Generator[None]:
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{place}: another process is making or deleting this environment"
            raise EnvironmentFailed(message) from error
        yield


def _cache() -> Path:
    return Path(os.environ.get("RECTIFY_CACHE") or Path.home() / ".cache" / "rectify")
