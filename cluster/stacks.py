"""What a process that gives no answer is doing, kept in the run's logs; and its end.

py-spy reads it from outside, so a process that hangs in C code or is stopped tells it too. Where that
is forbidden (containers without SYS_PTRACE) the process is asked by a signal, which ``log_to`` answers.

``ray.kill`` asks the process itself; one that is stopped may never hear it, and keeps its cores.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

# Seconds: all stacks of a call, one attempt of py-spy, and what a process has to write its own.
DEADLINE = 40.0
ATTEMPT = 10.0
WRITING = 2.0
# Seconds in which a process that Ray was told to end does so by itself.
GRACE = 8.0


def keep_stacks(actors: Mapping[str, Any], log_dir: str) -> list[Path]:
    """Write the stacks of actors that hang; returns the files, ``stacks/NAME-N.txt``.

    Takes at most ``DEADLINE`` seconds and raises nothing about the actors: what could not be had is
    said in the file.

    Args:
        actors: handles by the names of their logs. log_dir: of the attempt.
    """
    asked: list[tuple[str, Any]] = []
    for name, actor in actors.items():
        place = _place(actor)
        log = f"{log_dir}/{name}.log"
        asked.append((name, place and _at(place[0], stack_of).remote(place[1], log)))
    deadline = time.monotonic() + DEADLINE
    return [
        _write(Path(log_dir) / "stacks", name, _answer(call, deadline - time.monotonic()))
        for name, call in asked
    ]


def end_processes(actors: Iterable[Any], grace: float = GRACE) -> None:
    """See to it that the processes of actors that are being killed end, without waiting for it."""
    for actor in actors:
        if (place := _place(actor)) is not None:
            _at(place[0], end_process).remote(place[1], grace)


def end_process(pid: int, grace: float) -> None:
    """Kill an actor's process of this machine that is still there after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    while _is_actor(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(grace / 20)


def stack_of(pid: int, log: str) -> str:
    """The Python stack of each thread of a process of this machine, or why it is not to be had."""
    problems: list[str] = []
    # A stopped process cannot be paused: it holds still anyway.
    for options in ((), ("--nonblocking",)):
        found, text = _spied(pid, options)
        if found:
            return text
        problems.append(text)
    reason = f"py-spy could not read it: {problems[0]}\n"
    return reason + (told_by_itself(pid, log) or "nor did it write one when signalled\n")


def told_by_itself(pid: int, log: str) -> str:
    """What a process adds to its log when it gets SIGUSR1; empty where it does not catch that."""
    if not _catches(pid, signal.SIGUSR1):
        return ""
    path = Path(log)
    before = path.stat().st_size if path.exists() else 0
    os.kill(pid, signal.SIGUSR1)
    time.sleep(WRITING)
    return path.read_bytes()[before:].decode(errors="replace") if path.exists() else ""


def _spied(pid: int, options: tuple[str, ...]) -> tuple[bool, str]:
    """Whether py-spy could, and the stack or its complaint."""
    spy = Path(sysconfig.get_path("scripts")) / "py-spy"
    command = [str(spy), "dump", "--pid", str(pid), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ATTEMPT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    if done.returncode == 0:
        return True, done.stdout
    complaint = done.stderr.partition("Stack backtrace")[0]
    return False, " ".join(complaint.split())


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = (int(s.split()[1], 16) for s in status.splitlines() if s.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def _place(actor: Any) -> tuple[str, int] | None:
    """Node and process id of an actor, as the cluster knows them."""
    # The public API for this needs the dashboard, which a local cluster has not.
    entry: Any = state.actors(actor._actor_id.hex())
    node, pid = entry.get("Address", {}).get("NodeID"), entry.get("Pid")
    return (node, pid) if node and pid else None


def _at(node: str, function: Callable[..., Any]) -> Any:
    """A function as a task for a node."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def _is_actor(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _answer(call: Any, seconds: float) -> str:
    if call is None:
        return "it has no process\n"
    try:
        return ray.get(call, timeout=max(seconds, 0.0))
    except RayError as error:
        ray.cancel(call, force=True)
        return f"its node gave no answer: {type(error).__name__}: {error}\n"


def _write(directory: Path, name: str, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(directory.glob(f"{name}-*.txt")))
    path = directory / f"{name}-{number}.txt"
    path.write_text(f"{datetime.now(UTC).isoformat(timespec='seconds')} {name}\n{text}")
    logger.warning("stack of %s: %s", name, path)
    return path
