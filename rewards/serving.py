"""Serving one reward: in a process of the platform, or in one of an environment of the reward's own.

In the latter only this package of the platform can be imported, and of it what needs numpy and
pydantic alone; a reward crosses as its class's name and its fields, scores as plain types and numpy.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.calling import RewardFailed, Scores, call_reward
from rewards.contract import RewardSettings, SetMetric
from rewards.environment import missing, python_of, variables

if TYPE_CHECKING:
    from rewards.catalogue import RewardConfig

BUILDING = 1800.0  # seconds in which a reward is built, models loaded
ENDING = 30.0  # seconds that a process takes to end after it closed its pipe


class RewardServer:
    """Holds one reward and scores chunks of media, or of texts."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.function = config.build()

    def health(self) -> int:
        """The process id."""
        return os.getpid()

    def score(
        self, prompts: list[str], columns: dict[str, list[Any]], *media: Sequence[Any]
    ) -> tuple[Scores, float]:
        """Scores of all samples of ``media`` (a group's media or texts each), and the seconds taken."""
        started = time.perf_counter()
        completions = list(itertools.chain.from_iterable(media))
        name, size = self.config.name or self.config.kind, self.config.batch_size
        scores = call_reward(name, self.function, prompts, completions, columns, size)
        return scores, time.perf_counter() - started

    def describe(
        self, prompts: list[str], columns: dict[str, list[Any]], *media: Sequence[Any]
    ) -> dict[str, float]:
        """Numbers of the whole set, from a reward that has any."""
        if not isinstance(self.function, SetMetric):
            return {}
        completions = list(itertools.chain.from_iterable(media))
        return self.function.describe_set(prompts, completions, **columns)


class EnvironmentServer(RewardServer):
    """The same in a process of an environment: made from what ``crossing`` gives."""

    def __init__(self, path: str, fields: Mapping[str, Any], log: str | None = None) -> None:
        if log is not None:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            logging.basicConfig(filename=log, level=logging.INFO)
        _leave_platform()
        module, _, name = path.partition(":")
        kind: type[RewardConfig] = getattr(importlib.import_module(module), name)
        super().__init__(kind.model_validate(fields))


class EnvironmentProcess:
    """A reward served by a child process, which ends with this object or this process."""

    def __init__(self, config: RewardConfig, threads: int) -> None:
        """Returns when the reward is built.

        Raises:
            RewardFailed: its environment is missing, or it cannot be built there.
        """
        self.config = config
        ours, theirs = Pipe()
        self.connection: Any = ours
        # -P: the directory we are in is no place to import from there.
        self.process = subprocess.Popen(
            [str(interpreter(config)), "-P", "-m", __name__, str(theirs.fileno())],
            env={**os.environ, **process_variables(config, threads)},
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self.built = False
        self.ask(*crossing(config))
        self.built = True

    def health(self) -> int:
        """See ``RewardServer``."""
        return self.ask("health")

    def score(
        self, prompts: list[str], columns: dict[str, list[Any]], *media: Sequence[Any]
    ) -> tuple[Scores, float]:
        """See ``RewardServer``."""
        return self.ask("score", prompts, columns, *media)

    def describe(
        self, prompts: list[str], columns: dict[str, list[Any]], *media: Sequence[Any]
    ) -> dict[str, float]:
        """See ``RewardServer``."""
        return self.ask("describe", prompts, columns, *media)

    def ask(self, *words: Any) -> Any:
        """What the process answers.

        Raises:
            RewardFailed: it answers with an error, not in time, or ends.
        """
        name = self.config.name or self.config.kind
        seconds = self.config.deadline if self.built else BUILDING
        try:
            self.connection.send(words)
            if not self.connection.poll(seconds):
                self.process.kill()
                raise RewardFailed(f"reward {name!r}: no answer within {seconds:g} s (deadline)")
            answer, error = self.connection.recv()
        except (EOFError, OSError) as lost:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING)
            self.process.kill()
            status = self.process.wait()
            raise RewardFailed(f"reward {name!r}: its process ended with {status}") from lost
        if error is not None:
            raise RewardFailed(f"reward {name!r}: {error}")
        return answer


def interpreter(config: RewardSettings) -> Path:
    """Of a reward's environment.

    Raises:
        RewardFailed: it is missing.
    """
    assert config.served_in is not None
    python = python_of(config.served_in)
    if python is None:
        raise RewardFailed(missing(config.served_in))
    return python


def process_variables(config: RewardSettings, threads: int) -> dict[str, str]:
    """What the process of a reward in an environment needs set; GPUs are hidden where it asks none."""
    return variables(threads) | ({} if config.gpus else {"CUDA_VISIBLE_DEVICES": ""})


def crossing(config: RewardSettings) -> tuple[str, dict[str, Any]]:
    """A reward in plain types: module:class, and fields."""
    kind = type(config)
    return f"{kind.__module__}:{kind.__qualname__}", config.model_dump(mode="json")


def _leave_platform() -> None:
    """Off the path with the directories of the driver, which Ray puts on that of every worker."""
    own = [sys.prefix, sys.base_prefix, *os.environ["PYTHONPATH"].split(os.pathsep)]
    sys.path[:] = [p for p in sys.path if any(Path(p).is_relative_to(place) for place in own)]


def _serve(connection: Any) -> None:
    """Answer until the other side is gone; the first message makes the reward."""
    server: EnvironmentServer | None = None
    with suppress(EOFError, ConnectionResetError):
        while True:
            words = connection.recv()
            try:
                if server is None:
                    server, answer = EnvironmentServer(*words), None
                else:
                    answer = getattr(server, words[0])(*words[1:])
            except Exception:  # noqa: BLE001  the reward is somebody else's code: pass its error on
                connection.send((None, traceback.format_exc()))
            else:
                connection.send((answer, None))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
