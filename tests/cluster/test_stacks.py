"""Stacks of actors that hang, on a real Ray: what they were doing is in the files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster import stacks
from cluster.learner_group import LearnerLost, RayLearner
from cluster.ray_cluster import connected
from recipes.schema import Recipe

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def placement(digits_recipe: Callable[..., Recipe]) -> Iterator[Any]:
    with connected(digits_recipe("learner.ranks=2")) as placement:
        yield placement


def sleeper() -> tuple[Any, int]:
    """An actor and its process; the class is sent along, for no worker can import this file."""

    class Sleeper:
        """Ways to hang."""

        def pid(self) -> int:
            return os.getpid()

        def sleeps_in_vain(self) -> None:
            time.sleep(600)

        def waits_for_a_lock(self) -> None:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()

        def computes_forever(self) -> None:
            while True:
                sum(range(1000))

    kind: Any = ray.remote(Sleeper)
    actor = kind.options(num_cpus=0).remote()
    return actor, ray.get(actor.pid.remote(), timeout=60)


def test_each_way_to_hang_is_told_by_name(placement, tmp_path: Path, caplog):
    ways = ["sleeps_in_vain", "waits_for_a_lock", "computes_forever", "pid"]
    actors = {way: sleeper() for way in ways}
    for way, (actor, _) in actors.items():
        getattr(actor, way).remote()
    stopped = actors["pid"][1]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)
    try:
        files = stacks.keep_stacks(
            {way: actor for way, (actor, _) in actors.items()}, str(tmp_path)
        )
    finally:
        for actor, pid in actors.values():
            ray.kill(actor)
            psutil.Process(pid).kill()
    assert [file.name for file in files] == [f"{way}-1.txt" for way in ways]
    for way, file in zip(ways[:3], files[:3], strict=True):
        assert f"Sleeper.{way} (" in file.read_text()
        assert f"stack of {way}: {file}" in caplog.text
    assert "Thread" in files[3].read_text() and "MainThread" in files[3].read_text()


def test_an_actor_that_is_gone_is_said_in_the_file(placement, tmp_path: Path):
    actor, pid = sleeper()
    psutil.Process(pid).kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    for number in (1, 2):
        (file,) = stacks.keep_stacks({"gone": actor}, str(tmp_path))
        assert file.name == f"gone-{number}.txt"
        assert "py-spy could not read it" in file.read_text()


def test_a_stopped_process_ends_though_it_hears_nothing(placement, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stacks, "GRACE", 0.5)
    (stopped, pid), (well, _) = sleeper(), sleeper()
    os.kill(pid, signal.SIGSTOP)
    stacks.end_processes([stopped], 0.5)
    gone = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
    assert ray.get(well.pid.remote(), timeout=30) != pid
    stacks.end_process(os.getpid(), 0.0)  # no actor: not touched
    ray.kill(well)


def test_a_node_that_does_not_answer_costs_no_more_than_the_deadline(
    placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stacks, "DEADLINE", 0.0)
    actor, _ = sleeper()
    started = time.monotonic()
    (file,) = stacks.keep_stacks({"late": actor}, str(tmp_path))
    assert time.monotonic() - started < 5
    assert "its node gave no answer: GetTimeoutError" in file.read_text()
    ray.kill(actor)


WRITES = """
import sys, time
from cluster.logs import log_to
log_to(sys.argv[1])
def hangs_here():
    print("up", flush=True)
    time.sleep(60)
hangs_here()
"""


def test_without_py_spy_a_process_writes_its_own_stack(tmp_path: Path):
    log = str(tmp_path / "a" / "one.log")
    for code, found in ((WRITES, True), ("print(flush=True); __import__('time').sleep(60)", False)):
        process = subprocess.Popen([sys.executable, "-c", code, log], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            text = stacks.told_by_itself(process.pid, log)
            assert ("hangs_here" in text) == found
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_hung_learner_is_lost_with_the_stacks_of_all_ranks(
    digits_recipe, placement, tmp_path: Path
):
    recipe = digits_recipe("learner.ranks=2")
    learner = RayLearner(recipe, placement, str(tmp_path))
    pids = learner.start()
    learner.recipe = recipe.model_copy(
        update={"cluster": recipe.cluster.model_copy(update={"job_timeout": 4.0})}
    )
    os.kill(pids[0], signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(LearnerLost, match="no answer within 4 s"):
        learner.publish(0)
    assert time.monotonic() - started < 4 + stacks.DEADLINE
    kept = sorted(file.name for file in (tmp_path / "stacks").iterdir())
    assert kept == ["learner-0-1.txt", "learner-1-1.txt"]
    learner.stop(lost=True)
    again = RayLearner(recipe, replace(placement), str(tmp_path))
    try:
        assert not set(again.start()) & set(pids)
        assert again.publish(3).version == 3
    finally:
        again.stop()
    gone = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < gone:
        time.sleep(0.2)
    assert not any(map(psutil.pid_exists, pids))
