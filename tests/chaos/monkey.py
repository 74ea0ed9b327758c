"""Runs that a seeded monkey disturbs: what it does when, and the run that takes it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arena import LONG, Arena, wait_for

KINDS = ("rollout", "reward", "learner", "node", "driver")
# What a clock decides, what the monkey did, and what a resumed run proves anew.
TIMED = (
    "time", "busy/", "idle/", "cost/seconds", "cost/actor_seconds", "cost/gpu_seconds",
    "rollout/restarts", "drift/",
)  # fmt: skip


@dataclass(frozen=True)
class Blow:
    """One act of the monkey.

    Attributes:
        victim: of ``KINDS``. stop: it is stopped, so that it hangs, instead of killed.
        rows: lines of metrics that are there before. steps: further steps' time until it strikes.
        which: draws the process among several. away: seconds until a lost node's successor starts.
    """

    victim: str
    stop: bool
    rows: int
    steps: float
    which: int
    away: float

    def __str__(self) -> str:
        act = "hangs" if self.stop else "dies"
        return f"{self.victim} {act} {self.steps:.2f} steps after row {self.rows}"


def blows(seed: int, rows: int) -> list[Blow]:
    """What the monkey of ``seed`` does to a run of ``rows`` lines of metrics, in order."""
    draw = random.Random(seed)
    found: list[Blow] = []
    for number in range(draw.choice((1, 2, 2, 3))):
        # Over consecutive seeds each kind comes first equally often.
        victim = KINDS[seed % len(KINDS)] if number == 0 else draw.choice(KINDS)
        actor = victim in ("rollout", "reward", "learner")
        # A driver or a node that is gone before the run has begun is no loss of a run.
        after = draw.randrange(0 if actor else 1, rows - 2)
        stop = actor and after > 0 and draw.random() < 0.35
        found.append(
            Blow(victim, stop, after, draw.random(), draw.randrange(8), draw.uniform(0, 3))
        )
    return sorted(found, key=lambda blow: blow.rows + blow.steps)


@dataclass
class Disturbed:
    """A run through the command on the arena's cluster; its driver is started again when killed.

    Attributes:
        pace: seconds of a step, about. struck: the blows that landed.
    """

    arena: Arena
    recipe: str
    settings: Sequence[str]
    path: Path
    pace: float = 0.5
    starts: int = 0
    struck: list[str] = field(default_factory=list[str])

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path / self.recipe.replace("/", "-").replace("_", "-")

    def play(self, planned: Sequence[Blow]) -> Path:
        """From the start to the end, through all blows; returns the run directory."""
        self.path.mkdir(exist_ok=True)
        wait_for(self.arena.idle)
        self._start()
        for blow in planned:
            wait_for(lambda blow=blow: len(rows(self.run)) >= blow.rows or self._ended())
            time.sleep(blow.steps * self.pace)
            if self._ended():
                break
            self._strike(blow)
        try:
            assert self.driver.wait(LONG) == 0, self.output()[-4000:]
        finally:
            self.driver.kill()
        return self.run

    def output(self) -> str:
        """What the drivers printed."""
        return (self.path / "output.txt").read_text()

    def _strike(self, blow: Blow) -> None:
        if blow.victim == "node":
            self.arena.kill_node(blow.away)
        elif blow.victim == "driver":
            self.driver.kill()
            self.driver.wait()
            self._start("--resume", str(self.run))
        else:
            wait_for(lambda: self.arena.actors(blow.victim) or self._ended())
            there = self.arena.actors(blow.victim)
            if not there:
                return
            there[blow.which % len(there)].send_signal(
                signal.SIGSTOP if blow.stop else signal.SIGKILL
            )
        self.struck.append(str(blow))

    def _ended(self) -> bool:
        return self.driver.poll() is not None

    def _start(self, *arguments: str) -> None:
        where = (f"cluster.address={self.arena.address}", f"run_dir={self.path}")
        sets = [part for s in (*self.settings, *where) for part in ("--set", s)]
        self.starts += 1
        with (self.path / "output.txt").open("a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", "from cluster.cli import main; main()", "run", self.recipe,
                 *sets, *arguments],
                env=self.arena.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def numbers(run: Path) -> list[dict[str, Any]]:
    """All that does not depend on a clock."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows(run)]


def scores(run: Path) -> dict[str, Any]:
    """Prompts, seeds and scores of each evaluation."""
    files = sorted((run / "evaluation").glob("*.json"))
    return {file.name: json.loads(file.read_text())["samples"] for file in files}


def weights(run: Path) -> bytes:
    """All tensors of the last checkpoint."""
    return max((run / "checkpoints").glob("step_*/optimizer.safetensors")).read_bytes()


def restarts(game: Disturbed) -> dict[str, int]:
    """How often the logs tell of what."""
    logs = "".join(p.read_text() for p in (game.run / "logs").glob("attempt-*/driver.log"))
    words = {"quarantined": "quarantined", "jobs again": "runs again", "stacks": "stack of",
             "back": "going back to the last checkpoint"}  # fmt: skip
    return {name: (logs + game.output()).count(word) for name, word in words.items()}


def pace_of(run: Path) -> float:
    """Seconds of a step of a run."""
    times = [row["time"] for row in rows(run)]
    return (times[-1] - times[0]) / (len(times) - 1)
