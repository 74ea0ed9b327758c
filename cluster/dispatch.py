"""A thread of the driver that keeps rollout actors busy: dispatch, loss, deadlines, re-dispatch.

A job is a pure function of its draws and the weights, so a lost job is simply run again. Weights
travel with the first job that wants them: an actor loads between two jobs, none waits for another,
and evaluation and training sets of different weights can be under way at once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import ray
from ray.exceptions import ObjectLostError

from cluster.fleet import QUEUE, Fleet, Member
from cluster.jobs import partition, sampled
from cluster.ray_cluster import LOST, ClusterError
from cluster.weights import Weights
from cluster.workers import Failed, Record
from rl.contracts import Plan, Sampled
from rollout.draws import Group

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
MAX_DROPPED = 0.1
# How often deadlines and lost actors are looked after.
TICK = 0.5

# Told of a finished job: the actor's index, the groups and their records.
Finished = Callable[[int, Sequence[Group], Sequence[Record]], None]


class Cancelled(RuntimeError):
    """The run went on without the rest of this call."""


@dataclass(eq=False)
class Job:
    """Groups that an actor samples in one call."""

    call: Call
    number: int
    groups: Sequence[Group]
    plans: Sequence[Plan]
    attempts: int = 0


class Call(Iterator[Sampled]):
    """What one ``generate`` asked for, and the iterator that gives it.

    ``weights``: of all its jobs; None: those loaded last when a job is sent.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        plans: Sequence[Plan],
        batch_size: int,
        weights: Weights | None,
        wake: Callable[[], None],
    ) -> None:
        spans = partition(groups, batch_size) if groups else []
        self.todo = deque(Job(self, i, groups[s], plans[s]) for i, s in enumerate(spans))
        self.weights, self.size = weights, len(groups)
        # Evaluation has the lowest step there is: the loop waits for it, so it goes first.
        self.step = groups[0].step if groups else 0
        self.unfinished = len(spans)
        self.given = self.taken = 0  # one is the dispatcher's to count, the other the caller's
        self.dropped: list[str] = []
        self._wake = wake
        self._results: queue.SimpleQueue[list[Sampled] | BaseException] = queue.SimpleQueue()
        self._found: deque[Sampled] = deque()
        self._left = len(spans)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Sampled:
        while not self._found:
            if not self._left:
                self._check()
                raise StopIteration
            answer = self._results.get()
            if isinstance(answer, BaseException):
                self._left = 0
                raise answer
            self._left -= 1
            self.taken += 1
            self._wake()
            self._found.extend(answer)
        return self._found.popleft()

    @property
    def ahead(self) -> int:
        """Jobs that are in flight, or done and not taken yet."""
        return self.unfinished - len(self.todo) + self.given - self.taken

    def give(self, samples: list[Sampled], dropped: Sequence[str]) -> None:
        """A job's samples, and why the others of its groups are missing."""
        self.unfinished -= 1
        self.given += 1
        self.dropped += dropped
        self._results.put(samples)

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        self.unfinished = 0
        self.todo.clear()
        self._results.put(error)

    def _check(self) -> None:
        if len(self.dropped) > MAX_DROPPED * self.size:
            raise ClusterError(
                f"{len(self.dropped)} of {self.size} groups failed: {self.dropped[0]}"
            )
        for problem in self.dropped:
            logger.warning("group dropped: %s", problem)
        self.dropped.clear()


@dataclass(eq=False)
class _Running:
    member: Member
    job: Job
    parts: list[Any]
    deadline: float
    loading: Any = field(repr=False)


class Dispatcher:
    """Serves calls of any thread, in the order of their steps.

    A call has no more jobs in flight and results waiting than the actors can queue: what nobody takes
    is not sampled. Answers and calls arrive as events, so the thread's work does not grow with the
    number of actors.
    """

    def __init__(
        self, fleet: Fleet, batch_size: int, job_timeout: float, finished: Finished
    ) -> None:
        self.fleet = fleet
        self.latest: Weights | None = None
        self._batch_size, self._job_timeout, self._told = batch_size, job_timeout, finished
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls: list[Call] = []
        self._running: set[_Running] = set()
        self._failed: BaseException | None = None
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rollout dispatch", daemon=True)

    def start(self) -> None:
        """Begin; the fleet is up."""
        self._thread.start()

    def call(self, groups: Sequence[Group], plans: Sequence[Plan], weights: Weights | None) -> Call:
        """Samples of ``groups`` as their jobs complete, the groups of a job together."""
        call = Call(groups, plans, self._batch_size, weights, partial(self._events.put, _nothing))
        self._events.put(partial(self._begin, call))
        if self._failed is not None:
            call.fail(self._failed)
        return call

    def cancel(self) -> None:
        """End all calls; what is in flight for them is not waited for."""
        done = threading.Event()

        def end() -> None:
            self._fail_all(Cancelled("the run went back to its last checkpoint"))
            done.set()

        self._events.put(end)
        if self._thread.is_alive():
            done.wait(self._job_timeout)

    def close(self) -> None:
        """End the thread."""
        self._events.put(None)
        if self._thread.is_alive():
            self._thread.join(self._job_timeout)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except ClusterError as error:
            self._end(error)
        except BaseException as error:
            self._end(error)
            raise

    def _begin(self, call: Call) -> None:
        # Looked up here: another thread may have seen the list that ``_dispatch`` then replaces.
        self._calls.append(call)

    def _turn(self) -> bool:
        """Handle what happened; False at the end."""
        quiet = not self._calls and not self._running and self.fleet.whole
        try:
            event = self._events.get(timeout=None if quiet else self._until_look())
            while True:
                if event is None:
                    return False
                event()
                event = self._events.get_nowait()
        except queue.Empty:
            pass
        if time.monotonic() - self._looked >= TICK:
            self._looked = time.monotonic()
            self._give_up_overdue()
            self.fleet.readmit()
        self._dispatch()
        return True

    def _until_look(self) -> float:
        return max(self._looked + TICK - time.monotonic(), 0.0)

    def _dispatch(self) -> None:
        self._calls = [call for call in self._calls if call.unfinished]
        room = QUEUE * len(self.fleet.members)
        for call in sorted(self._calls, key=lambda call: call.step):
            while call.todo and call.ahead < room:
                member = self.fleet.free()
                if member is None:
                    return
                self._submit(member, call.todo.popleft())

    def _submit(self, member: Member, job: Job) -> None:
        weights = job.call.weights or self.latest
        loading, wanted = None, None
        if weights is not None:
            wanted = weights.checksum
            if member.holds != wanted:
                loading = member.handle.load.remote(weights.data, weights.version, wanted)
                member.holds = wanted
        call = member.handle.generate.options(num_returns=1 + 2 * len(job.groups))
        records, *parts = call.remote(job.groups, job.plans, wanted)
        job.attempts += 1
        member.jobs += 1
        deadline = time.monotonic() + self._job_timeout * member.jobs
        running = _Running(member, job, parts, deadline, loading)
        self._running.add(running)
        records.future().add_done_callback(
            lambda future: self._events.put(partial(self._answered, running, future))
        )

    def _answered(self, running: _Running, future: Future[list[Record] | Failed]) -> None:
        if running not in self._running:
            return  # it was given up: the job has run elsewhere, or its call has ended
        self._running.remove(running)
        member, job = running.member, running.job
        member.jobs -= 1
        error = future.exception()
        if isinstance(error, LOST):
            self.fleet.quarantine(member, error)
            self._again(job, str(error))
        elif not job.call.unfinished:
            return
        elif error is not None:
            job.call.fail(error)
        elif isinstance(answer := future.result(), Failed):
            self._not_run(running, answer)
        else:
            self._told(member.index, job.groups, answer)
            problems = [record.problem for record in answer if record.problem is not None]
            found = sampled(job.number, job.groups, answer, running.parts)
            job.call.give(list(found), problems)

    def _not_run(self, running: _Running, answer: Failed) -> None:
        if running.loading is not None:
            try:
                ray.get(running.loading, timeout=self._job_timeout)
            except ObjectLostError as error:  # with the node of the learner that published them
                running.job.call.fail(error)
                return
            except LOST:
                pass
            except (RuntimeError, ValueError) as error:  # the weights were refused
                running.job.call.fail(error)
                return
        running.member.holds = None
        self._again(running.job, answer.message)

    def _give_up_overdue(self) -> None:
        now = time.monotonic()
        for running in [r for r in self._running if now > r.deadline]:
            self._running.remove(running)
            running.member.jobs -= 1
            message = f"no answer within {self._job_timeout:g} s"
            self.fleet.replace(running.member, ClusterError(message))
            self._again(running.job, message)

    def _again(self, job: Job, message: str) -> None:
        if not job.call.unfinished:
            return
        if job.attempts >= MAX_ATTEMPTS:
            job.call.fail(
                ClusterError(f"a rollout job failed {MAX_ATTEMPTS} times, last with: {message}")
            )
            return
        logger.warning("rollout job %d runs again: %s", job.number, message.splitlines()[-1])
        job.call.todo.appendleft(job)

    def _end(self, error: BaseException) -> None:
        """The thread ends: no call, not even one that arrives at this moment, may wait for it."""
        self._failed = error
        while not self._events.empty():
            event = self._events.get()
            if event is not None:
                event()
        self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        for call in self._calls:
            call.fail(error)
        self._calls.clear()


def _nothing() -> None:
    """An event that only makes the thread look for work."""
