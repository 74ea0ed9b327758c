"""What the one controller can take: the real dispatcher and fleet over 1 to 256 timed rollout actors.

    python benchmarks/scaling.py [--actors 1 2 4 ...] [--seconds 0.25 2 10] [--hosts 8] [--window 10]

A timed actor sleeps for its job and answers like a rollout worker: records, and a replay and a media
array for each group. ``load`` takes the blob from the object store and sleeps for the time of a copy
at ``--copy`` GB/s. Many live in one process, each in a concurrency group of one thread, so that what
it is sent runs in order and one at a time, as on a process of its own; what Ray spends on a connection
to each of 256 processes is therefore not in these numbers. Job times vary by 10 % about their mean.

Once every actor has answered, for a window of at least ``--window`` seconds and three jobs:

    jobs/s       jobs that actors did in the window, against actors / job time
    idle         share of the actors' time without a job
    gap          from a job's end to the next one's start on the actor (the second one waits there)
    handled      from a job's end on its actor until the dispatcher has handled the answer
    events       the longest queue of the dispatcher's events when it handled an answer
    CPU          of the driver's process for a job; of its dispatching thread

Then blobs of ``--blobs`` MB are loaded one after the other:

    reached      from ``load`` until the last actor has begun a job with the new weights; two jobs are
                 with every actor, so at least one job time and at most two, and the copy
    held         the longest gap between the last job with old weights and the first with new ones

The limit: jobs a second that one core of the driver can handle, and how many actors that is. The actors'
processes share the machine with the driver here, so jobs/s falls earlier than the driver alone would
let it; CPU for a job is the figure to go by. Writes docs/benchmarks/scaling.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.dispatch import Cancelled, Dispatcher
from cluster.fleet import Fleet
from cluster.weights import Weights
from cluster.workers import Health, Record
from recipes.schema import ClusterConfig
from rollout.draws import Group
from rollout.flow import FlowPlan
from rollout.flow_sampler import FlowSummary

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "scaling.md"
SIZE = 8  # samples of a group
SPREAD = 0.1
GOOD = 0.9  # of the ideal


@dataclass(frozen=True)
class Load:
    """What is asked of the actors.

    Attributes:
        seconds: of a job. groups: of a job. kib: of each replay and of each media array.
        copy: GB/s of a weight sync on the actor.
    """

    seconds: float
    groups: int
    kib: int
    copy: float


@dataclass(frozen=True)
class Ran:
    """A job on an actor: ``time.time()`` of its begin and end, version of the weights."""

    begin: float
    end: float
    version: int


class Host:
    """Timed actors of one process."""

    def __init__(self, number: int) -> None:
        self.boot = str(number)
        self.load_of: Load | None = None
        self.jobs: dict[int, list[Ran]] = {}
        self.versions: dict[int, tuple[int, str]] = {}

    def reset(self, load: Load) -> None:
        """Begin anew; all are idle."""
        self.load_of = load
        self.jobs.clear()
        self.versions.clear()

    def health(self, index: int) -> Health:
        """See ``RolloutWorker``."""
        return Health(f"{self.boot}-{index}", os.getpid(), None)

    def load(self, index: int, data: np.ndarray, version: int, checksum: str) -> int:
        """See ``RolloutWorker``; reads a byte of every page."""
        assert self.load_of is not None
        touched = int(data[::4096].sum())
        time.sleep(data.nbytes / (self.load_of.copy * 1e9))
        self.versions[index] = (version, checksum)
        return touched

    def generate(
        self, index: int, groups: Sequence[Group], plans: Sequence[FlowPlan], checksum: str
    ) -> list[Any]:
        """See ``RolloutWorker``."""
        load, (version, held) = self.load_of, self.versions[index]
        assert load is not None and held == checksum
        began = time.time()
        time.sleep(load.seconds * (1 + SPREAD * (2 * (groups[0].seed % 1000) / 999 - 1)))
        ended = time.time()
        self.jobs.setdefault(index, []).append(Ran(began, ended, version))
        seconds = (ended - began) / len(groups)
        summary = FlowSummary(nodes=SIZE, branches=1)
        record = Record(summary, forwards=SIZE, started=began, seconds=seconds, version=version)
        parts = [np.full(load.kib * 1024, index % 256, np.uint8) for _ in range(2 * len(groups))]
        return [[record] * len(groups), *parts]

    def journal(self) -> dict[int, list[Ran]]:
        """All jobs since ``reset``, by actor."""
        return self.jobs


class Method:
    """A method of one timed actor, called as one of an actor of its own."""

    def __init__(self, method: Any, index: int, options: dict[str, Any]) -> None:
        self.method, self.index, self.given = method, index, options

    def options(self, **options: Any) -> Method:
        """As Ray's."""
        return Method(self.method, self.index, self.given | options)

    def remote(self, *arguments: Any) -> Any:
        """As Ray's."""
        return self.method.options(**self.given).remote(self.index, *arguments)


class Handle:
    """A timed actor as the dispatcher sees it."""

    def __init__(self, host: Any, index: int, place: int) -> None:
        own = {"concurrency_group": f"actor_{place}"}
        self.generate = Method(host.generate, index, own)
        self.load = Method(host.load, index, own)
        self.health = Method(host.health, index, own)


@dataclass
class Watch:
    """What the dispatching thread sees as it is told of jobs."""

    dispatcher: Any = None
    handled: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    backlog: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    holds: dict[int, int] = field(default_factory=dict[int, int])
    thread: float = 0.0

    def told(self, index: int, groups: Sequence[Group], records: Sequence[Record]) -> None:
        """See ``dispatch.Finished``."""
        now = time.time()
        end = records[0].started + sum(record.seconds for record in records)
        self.handled.append((now, now - end))
        self.backlog.append((now, self.dispatcher._events.qsize()))
        self.holds[index] = records[0].version
        self.thread = time.thread_time()


@dataclass(frozen=True)
class Sync:
    """Of one blob: MB, seconds until the last actor began with it, the longest gap it made."""

    mb: float
    reached: float
    held: float


@dataclass(frozen=True)
class Measured:
    """A row; see the module. Times in seconds."""

    actors: int
    load: Load
    rate: float
    idle: float
    gap: float
    handled: tuple[float, float]
    events: int
    cpu: float
    thread: float
    syncs: list[Sync]

    @property
    def share(self) -> float:
        """Of the ideal rate."""
        return self.rate * self.load.seconds / self.actors


class Bench:
    """Processes of timed actors, and measurements on the first of them."""

    def __init__(self, hosts: int, actors: int) -> None:
        per = math.ceil(actors / hosts)
        names = {f"actor_{place}": 1 for place in range(per)}
        remote: Any = ray.remote
        kind = remote(num_cpus=0, concurrency_groups=names | {"health": 1})(Host)
        self.hosts = [kind.remote(number) for number in range(hosts)]
        self.handles = [Handle(self.hosts[i % hosts], i, i // hosts) for i in range(hosts * per)]

    def measure(self, actors: int, load: Load, window: float, blobs: Sequence[float]) -> Measured:
        """One row."""
        ray.get([host.reset.remote(load) for host in self.hosts])
        watch = Watch()
        fleet = Fleet(self.handles[:actors], ClusterConfig(), lambda member, event: None)
        watch.dispatcher = dispatcher = Dispatcher(fleet, load.groups * SIZE, 600.0, watch.told)
        fleet.start()
        dispatcher.start()
        dispatcher.latest = blob(0, 0.01)
        window = max(window, 3 * load.seconds)
        # Enough for all of it, twice.
        jobs = 2 * math.ceil(actors * ((window + 3) / load.seconds + 4 + 6 * len(blobs)))
        groups = list(drawn(jobs * load.groups))
        call = dispatcher.call(groups, [FlowPlan()] * len(groups), None)
        taker = threading.Thread(target=take, args=(call,), daemon=True)
        taker.start()
        wait(lambda: len(watch.holds) == actors)
        begin, cpu, thread = time.time(), time.process_time(), watch.thread
        time.sleep(window)
        end, cpu, thread = time.time(), time.process_time() - cpu, watch.thread - thread
        synced: list[tuple[float, float, int]] = []
        for version, mb in enumerate(blobs, 1):
            weights, loaded = blob(version, mb), time.time()
            dispatcher.latest = weights
            wait(lambda version=version: all(v >= version for v in watch.holds.values()))
            synced.append((mb, loaded, version))
        dispatcher.cancel()
        taker.join()
        dispatcher.close()
        # In the actors' own groups, so after the jobs that are still with them.
        ray.get([handle.health.remote() for handle in self.handles[:actors]])
        return self._row(actors, load, watch, (begin, end), (cpu, thread), synced)

    def _row(
        self,
        actors: int,
        load: Load,
        watch: Watch,
        window: tuple[float, float],
        cpu: tuple[float, float],
        synced: Sequence[tuple[float, float, int]],
    ) -> Measured:
        journals: list[list[Ran]] = []
        for journal in ray.get([host.journal.remote() for host in self.hosts]):
            journals += journal.values()
        begin, end = window
        # A job at the window's edge counts by its part: actors that go in step would shift the rate.
        inside = [
            (max(min(job.end, end) - max(job.begin, begin), 0.0), job.end - job.begin)
            for jobs in journals
            for job in jobs
        ]
        busy, ended = sum(part for part, _ in inside), sum(part / all_of for part, all_of in inside)
        gaps = [
            after.begin - before.end
            for jobs in journals
            for before, after in itertools.pairwise(jobs)
            if begin <= after.begin < end
        ]
        late = [late for at, late in watch.handled if begin <= at < end]
        return Measured(
            actors, load, ended / (end - begin), 1 - busy / (actors * (end - begin)),
            statistics.median(gaps), (statistics.median(late), float(np.quantile(late, 0.99))),
            max(count for at, count in watch.backlog if begin <= at < end),
            cpu[0] / len(late), cpu[1] / len(late),
            [Sync(mb, *cost(journals, loaded, version)) for mb, loaded, version in synced],
        )  # fmt: skip


def cost(journals: Sequence[Sequence[Ran]], loaded: float, version: int) -> tuple[float, float]:
    """Seconds until the last actor began a job with a version, and the longest gap before one."""
    reached, held = [], []
    for jobs in journals:
        first = next(i for i, job in enumerate(jobs) if job.version == version)
        reached.append(jobs[first].begin - loaded)
        held.append(jobs[first].begin - jobs[first - 1].end)
    return max(reached), max(held)


def drawn(count: int) -> Iterator[Group]:
    """Groups as a recipe of short prompts has them."""
    for number in range(count):
        seed = (number * 2654435761) % 2**31
        yield Group(0, number, f"p{number}", "a red cat on a blue chair", {"digit": 3}, SIZE, seed)


def blob(version: int, mb: float) -> Weights:
    """Published weights of a size, in the object store."""
    data = np.full(int(mb * 1e6), version, np.uint8)
    return Weights(version, f"{version:064d}", ray.put(data))


def take(call: Iterator[Any]) -> None:
    """Be who takes the samples, until the call is cancelled."""
    with suppress(Cancelled):
        for _ in call:
            pass


def wait(true: Any) -> None:
    """Look a hundred times a second."""
    deadline = time.monotonic() + 300
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit("nothing happened within 300 s")
        time.sleep(0.01)


def table(rows: Sequence[Measured]) -> list[str]:
    """Markdown, a line for each row."""
    blobs = [sync.mb for sync in rows[0].syncs]
    heads = ["job, s", "actors", "jobs/s", "of ideal", "idle", "gap, ms"]
    heads += ["handled, ms (99 %)", "events", "CPU a job, ms", "of it dispatching"]
    heads += [f"{mb:g} MB reached, s (held, ms)" for mb in blobs]
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row.load.seconds:g}", str(row.actors), f"{row.rate:.2f}", f"{row.share:.3f}"]
        cells += [f"{row.idle:.3f}", f"{1e3 * row.gap:.1f}"]
        cells.append(f"{1e3 * row.handled[0]:.1f} ({1e3 * row.handled[1]:.1f})")
        cells += [str(row.events), f"{1e3 * row.cpu:.2f}", f"{1e3 * row.thread:.2f}"]
        cells += [f"{sync.reached:.2f} ({1e3 * sync.held:.0f})" for sync in row.syncs]
        text.append(f"| {' | '.join(cells)} |")
    return text


def limits(rows: Sequence[Measured]) -> list[str]:
    """Where the controller ends, for each job time."""
    text: list[str] = []
    for seconds in sorted({row.load.seconds for row in rows}):
        own = [row for row in rows if row.load.seconds == seconds]
        good = [row.actors for row in own if row.share >= GOOD]
        most = max(own, key=lambda row: row.actors)
        text.append(
            f"* Jobs of {seconds:g} s: {GOOD:.0%} of the ideal up to {max(good, default=0)} actors here; "
            f"at {most.actors} actors a job costs the driver {1e3 * most.cpu:.2f} ms, so one core "
            f"handles {1 / most.cpu:.0f} jobs/s, {seconds / most.cpu:.0f} actors."
        )
    return text


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    powers = [2**power for power in range(9)]
    parser.add_argument("--actors", type=int, nargs="+", default=powers)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.25, 2.0, 10.0])
    parser.add_argument("--blobs", type=float, nargs="+", default=[1.0, 100.0], help="MB")
    parser.add_argument("--hosts", type=int, default=8, help="processes of actors")
    parser.add_argument("--window", type=float, default=10.0, help="seconds, at least three jobs")
    parser.add_argument("--groups", type=int, default=4, help="of a job")
    parser.add_argument("--kib", type=int, default=48, help="of each replay and media array")
    parser.add_argument("--copy", type=float, default=5.0, help="GB/s")
    given = parser.parse_args()
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    bench = Bench(given.hosts, max(given.actors))
    rows: list[Measured] = []
    for seconds in given.seconds:
        load = Load(seconds, given.groups, given.kib, given.copy)
        for actors in given.actors:
            rows.append(bench.measure(actors, load, given.window, given.blobs))
            print(table(rows[-1:])[-1], flush=True)
    ray.shutdown()
    text = "\n".join([*table(rows), "", *limits(rows)])
    OUT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
