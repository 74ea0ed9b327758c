"""A real Ray cluster of two nodes on one machine, and what there is to kill in it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

ACTORS = {
    "rollout": "ray::RolloutWorker",
    "reward": "ray::RewardWorker",
    "learner": "ray::RankActor",
}
LONG = 240.0
# For the nodes: a lost one is found in seconds instead of half a minute, and what a worker returns stays
# in the store of its node, as larger samples do, instead of travelling to the driver at once.
TUNED = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "6",
    "RAY_max_direct_call_object_size": "128",
}


def wait_for(what: Callable[[], Any], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def descendants(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def called(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those whose command line has ``name``, oldest first."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Arena:
    """The head and a second node, one core each; ``environment`` reaches them, ``tuned`` is theirs."""

    def __init__(self, scratch: Path, tuned: Mapping[str, str]) -> None:
        self.scratch, self._tuned = scratch, tuned
        gcs, dashboard, client, *self._agents = free_ports(5)
        self.address = f"127.0.0.1:{gcs}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }  # fmt: skip
        self.head = self._start(
            "head", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--temp-dir={scratch}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={self._agents[0]}",
        )  # fmt: skip
        wait_for(self._nodes)
        self.second = self._join()

    def kill_node(self, away: float) -> None:
        """The second node dies, and another one joins ``away`` seconds later."""
        (raylet,) = called(descendants(self.second), "raylet/raylet")
        raylet.kill()
        time.sleep(away)
        end(self.second)
        self.second = self._join()

    def actors(self, kind: str) -> list[psutil.Process]:
        """Processes of a kind of actor."""
        return called([*descendants(self.head), *descendants(self.second)], ACTORS[kind])

    def idle(self) -> bool:
        """Whether no actor of a run is left."""
        return not any(self.actors(kind) for kind in ACTORS)

    def stop(self) -> None:
        """End all processes."""
        for node in (self.second, self.head):
            end(node)

    def _start(self, name: str, *options: str) -> subprocess.Popen[Any]:
        log = (self.scratch / f"{name}.log").open("a")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        return subprocess.Popen(
            [*command, *options], env=self.environment | dict(self._tuned), stdout=log, stderr=log,
            cwd=self.scratch, start_new_session=True,
        )  # fmt: skip

    def _join(self) -> subprocess.Popen[Any]:
        port = free_ports(1)[0]
        before = self._nodes()
        node = self._start(
            "second", f"--address={self.address}", f"--dashboard-agent-listen-port={port}"
        )
        wait_for(lambda: self._nodes() - before)
        return node

    def _nodes(self) -> set[str]:
        """Ids of the nodes that are up."""
        bearer = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with suppress(requests.RequestException, KeyError):
            answer = requests.get(f"{self.dashboard}/api/v0/nodes", headers=bearer, timeout=20)
            nodes = answer.json()["data"]["result"]["result"]
            return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}
        return set()


def end(process: subprocess.Popen[Any]) -> None:
    """A ``ray start`` and what it started, and nothing else."""
    family = descendants(process)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for one in [*family, *descendants(process)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()


@contextmanager
def arena(tuned: Mapping[str, str] = TUNED) -> Iterator[Arena]:
    """A cluster for the length of a test."""
    # Short, because sockets lie in it.
    scratch = Path(tempfile.mkdtemp(prefix="rectify-", dir="/tmp"))
    cluster = Arena(scratch, tuned)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(scratch, ignore_errors=True)
