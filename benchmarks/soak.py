"""A long run: does the memory of a process grow, do object-store bytes, references, handles or threads leak?

    python benchmarks/soak.py [--minutes 60] [--set schedule.mode=async] [--show runs/soak-....jsonl]

The digits recipe as it ships, but for a small learning rate (thousands of steps at the shipped one leave
groups of equal rewards, and nothing to train on), evaluations and checkpoints every 200 steps. Every ten
seconds all processes below the run's: memory (pages that it wrote and no other process shares; USS also
counts programs and libraries that nobody else has loaded just then), open files, threads; the raylet's
bytes and objects in the object store; the driver's references. The last reading of the store is taken
while the run ends by SIGINT, after its last step.

What is asked of a line, after the warm-up:

    slope    least squares; its error holds for residuals that follow each other (lag-1 autocorrelation)
    grows    the slope's 95 % interval is above 0, and the slope makes more than 50 MiB in a day
    unclear  the interval holds 0, and reaches 1 GiB in a day: too little was seen
    flat     else
    leaks    the least open files, threads, objects or references of the last sixth, and their median,
             are above those of the first sixth by more than 2 (they swing within a step: the floor moves
             with the luck of a reading, the median with the mix of them; a leak lifts both)

The samples are in runs/soak-....jsonl, the table beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
from scipy import stats

EVERY = 10.0
DAY = 24 * 60
FLAT = 50 * 1024 / DAY  # KiB a minute
UNCLEAR = 1024 * 1024 / DAY
SPARE = 2  # handles, threads, references
LEAST = 12  # samples of a line
ENDING = 60.0  # seconds after the driver in which all else has to end
STALLED = 300.0  # seconds without a step
SETS = (
    "steps=10000000",
    "optimizer.learning_rate=1e-5",
    "evaluation.every=200",
    "checkpoints.every=200",
)
Row = dict[str, Any]


class Store:
    """The raylet's own numbers of its object store, asked from outside the cluster."""

    def __init__(self, raylet: psutil.Process, driver: int) -> None:
        from ray._private.grpc_utils import init_grpc_channel
        from ray._private.internal_api import get_state_from_address
        from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

        given = dict(part.split("=", 1) for part in raylet.cmdline()[1:] if "=" in part)
        (node,) = get_state_from_address(given["--gcs-address"]).node_table()
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self.stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        self.question = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        self.driver = driver

    def read(self) -> Row | None:
        """Bytes and objects in use, references that the driver holds; None where no raylet answers."""
        import grpc

        try:
            answer = self.stub.GetNodeStats(self.question, timeout=5)
        except grpc.RpcError:
            return None
        held = [
            w.num_object_refs_in_scope for w in answer.core_workers_stats if w.pid == self.driver
        ]
        return {
            "kind": "store",
            "bytes": answer.store_stats.object_store_bytes_used,
            "objects": answer.store_stats.num_local_objects,
            "references": sum(held),
        }


class Soak:
    """The run under observation."""

    def __init__(self, directory: Path, scratch: str, sets: Sequence[str]) -> None:
        # A token and a directory of its own: no other cluster of this machine is seen or joined.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [sys.executable, "-c", "from cluster.cli import main; main()", "run"]
        command.append("digits/flash_grpo")
        for part in (*SETS, f"run_dir={directory}", "name=soak", *sets):
            command += ["--set", part]
        self.metrics = directory / "soak" / "metrics.jsonl"
        self.run = subprocess.Popen(
            command, env=os.environ | {"RAY_TMPDIR": scratch}, start_new_session=True
        )
        self.driver = psutil.Process(self.run.pid)
        self.moved = (0, time.monotonic())
        self.seen: set[psutil.Process] = set()
        self.names: dict[int, str] = {}

    def step(self) -> int:
        """The last step that is logged."""
        from cluster.tracking import MetricsFile

        return max((row["step"] for row in MetricsFile(self.metrics).tail(2**16)), default=0)

    def start(self, patience: float) -> Store:
        """Wait for the first step."""
        deadline = time.monotonic() + patience
        while self.step() < 1:
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"no step within {patience:g} s")
            time.sleep(1)
        (raylet,) = [p for p in self.driver.children() if p.name() == "raylet"]
        return Store(raylet, self.run.pid)

    def check(self) -> None:
        """The run is on, and gets on."""
        if self.run.poll() is not None:
            raise SystemExit(f"the run ended by itself, status {self.run.returncode}")
        step, now = self.step(), time.monotonic()
        if step > self.moved[0]:
            self.moved = (step, now)
        elif step and now - self.moved[1] > STALLED:
            raise SystemExit(f"the run stands still after step {step}")

    def processes(self) -> Iterator[Row]:
        """A row for each process of the tree."""
        for process in [self.driver, *self.driver.children(recursive=True)]:
            with suppress(psutil.Error):
                row = {
                    "kind": "process",
                    "pid": process.pid,
                    "name": "driver" if process == self.driver else called(process),
                    "memory": sum(part.private_dirty for part in process.memory_maps()),
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
                self.seen.add(process)
                self.names[process.pid] = row["name"]
                yield row

    def stop(self, store: Store) -> Row:
        """End the run by SIGINT; the store's last reading, and what of the run is left."""
        last = store.read()
        self.run.send_signal(signal.SIGINT)
        while self.run.poll() is None and (reading := store.read()) is not None:
            last = reading
            time.sleep(0.02)
        status = self.run.wait(timeout=300)
        _, left = psutil.wait_procs(self.seen - {self.driver}, timeout=ENDING)
        names = [f"{self.names[process.pid]} ({process.pid})" for process in left]
        return (last or {}) | {"kind": "end", "status": status, "left": names, "step": self.step()}

    def end(self) -> None:
        """Nothing of the run is left, however the soak ended."""
        if self.run.poll() is None:
            self.run.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.run.wait(timeout=ENDING)
            self.run.kill()


def called(process: psutil.Process) -> str:
    """Ray's title of an actor without its method, a script's name, else the program's."""
    arguments = process.cmdline()
    if arguments and arguments[0].startswith("ray::"):
        return arguments[0].removeprefix("ray::").partition(".")[0]
    scripts = [Path(part).stem for part in arguments[1:4] if part.endswith(".py")]
    return scripts[0] if scripts else process.name()


def soak(minutes: float, sets: Sequence[str]) -> Path:
    """Run, sample, stop; returns the file of the samples."""
    directory = Path("runs") / time.strftime("soak-%Y%m%d-%H%M%S")
    directory.mkdir(parents=True)
    file = directory.with_suffix(".jsonl")
    # Short: a socket's path is bounded.
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        file.open("w", buffering=1) as out,
    ):
        run = Soak(directory, scratch, sets)
        # Who ends the soak ends the run too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            observe(run, minutes, out)
        finally:
            run.end()
    return file


def observe(run: Soak, minutes: float, out: TextIO) -> None:
    """Write samples of all processes until the time is over, then stop the run."""
    store, begun = run.start(patience=600), time.monotonic()

    def write(row: Row) -> None:
        minute = (time.monotonic() - begun) / 60
        out.write(json.dumps(row | {"minute": minute}) + "\n")

    while time.monotonic() - begun < 60 * minutes:
        due = time.monotonic() + EVERY
        run.check()
        for row in run.processes():
            write(row)
        write((store.read() or {"kind": "silent"}) | {"step": run.step()})
        time.sleep(max(due - time.monotonic(), 0))
    write(run.stop(store))


@dataclass(frozen=True)
class Trend:
    """A least-squares slope per unit of time, and its 95 % interval."""

    slope: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of KiB a minute; see above."""
        if self.low > 0 and self.slope > FLAT:
            return "grows"
        return "unclear" if self.low <= 0 and self.high > UNCLEAR else "flat"


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Of at least three values; residuals that follow each other count as fewer."""
    x, y = np.asarray(times, float), np.asarray(values, float)
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    power = float(rest @ rest)
    follow = max(float(rest[1:] @ rest[:-1]) / power, 0.0) if power else 0.0
    effective = max(len(x) * (1 - follow) / (1 + follow), 3.0)
    error = math.sqrt(power / (effective - 2) / (x @ x))
    wide = float(stats.t.ppf(0.975, effective - 2)) * error
    return Trend(slope, slope - wide, slope + wide)


def leaks(counts: Sequence[int]) -> bool:
    """Whether floor and median of the last sixth are above those of the first."""
    part = max(len(counts) // 6, 1)
    first, last = counts[:part], counts[-part:]
    return all(of(last) - of(first) > SPARE for of in (min, statistics.median))


def by_process(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each process under a name of its own: what it was called last, and a number."""
    found: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "process":
            found[row["pid"]].append(row)
    named: dict[str, list[Row]] = {}
    for pid in sorted(found):
        name, number = found[pid][-1]["name"], 0
        while f"{name} {number}" in named:
            number += 1
        named[f"{name} {number}"] = found[pid]
    return named


def counted(rows: Sequence[Row], warm: Sequence[Row], name: str) -> tuple[str, bool]:
    """First, last and largest count; whether it leaks."""
    all_of = [row[name] for row in rows]
    text = f"{all_of[0]} / {all_of[-1]} / {max(all_of)}"
    return text, leaks([row[name] for row in warm])


def line(
    name: str, rows: Sequence[Row], warm_up: float, size: str, counts: Sequence[str]
) -> list[str]:
    """A line of a table."""
    warm = [row for row in rows if row["minute"] >= warm_up]
    found = trend([row["minute"] for row in warm], [row[size] / 1024 for row in warm])
    cells = [counted(rows, warm, each) for each in counts]
    verdict = [
        found.verdict,
        *(f"{c} leak" for c, (_, leak) in zip(counts, cells, strict=True) if leak),
    ]
    sizes = [row[size] / 2**20 for row in (rows[0], warm[0], warm[-1])]
    return [
        name,
        *(f"{value:.1f}" for value in sizes),
        f"{found.slope:+.1f} ({found.low:+.1f}…{found.high:+.1f})",
        f"{found.slope * DAY / 1024:+.0f}",
        *(text for text, _ in cells),
        ", ".join(verdict),
    ]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]


def report(rows: Sequence[Row], warm_up: float) -> str:
    """The tables of a soak."""
    common = ["start, MiB", "warm, MiB", "end, MiB", "slope, KiB/min (95 %)", "MiB a day"]
    triple = "first / last / largest"
    lines, brief = [], 0
    for name, own in by_process(rows).items():
        if sum(row["minute"] >= warm_up for row in own) < LEAST:
            brief += 1
            continue
        lines.append(line(name, own, warm_up, "memory", ("files", "threads")))
    heads = ["process", *common, f"files, {triple}", f"threads, {triple}", "verdict"]
    text = table(heads, lines)
    stored = [row for row in rows if row["kind"] == "store"]
    heads = ["", *common, f"objects, {triple}", f"references, {triple}", "verdict"]
    of_store = line("object store", stored, warm_up, "bytes", ("objects", "references"))
    text += ["", *table(heads, [of_store])]
    text += [
        "",
        f"{stored[-1]['minute']:.0f} minutes, {stored[-1]['step']} steps; {brief} processes ",
    ]
    text[-1] += (
        f"lived too briefly for a line; {sum(r['kind'] == 'silent' for r in rows)} silences."
    )
    for row in rows:
        if row["kind"] == "end":
            text.append(
                f"At the end, by SIGINT after step {row['step']}: status {row['status']}, store "
                f"{row['bytes']} bytes in {row['objects']} objects, driver {row['references']} "
                f"references; left a minute later: {', '.join(map(str, row['left'])) or 'no process'}."
            )
    return "\n".join(text)


def main() -> None:
    """Soak, or show one again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=10, help="minutes")
    parser.add_argument(
        "--set", action="append", default=[], help="of the recipe, as in rectify run"
    )
    parser.add_argument("--show", type=Path, help="samples of an earlier soak")
    given = parser.parse_args()
    file = given.show or soak(given.minutes, given.set)
    rows = [json.loads(part) for part in file.read_text().splitlines()]
    text = report(rows, given.warm_up)
    file.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
