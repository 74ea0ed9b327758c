"""Rollout actors as the driver sees them: ready, busy, lost, back again.

An actor whose process is gone comes back empty. It is kept in quarantine until a *new* process answers;
which weights it holds is then forgotten, so that its next job brings them along.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError

from cluster.ray_cluster import LOST, TIMEOUT, ClusterError
from cluster.workers import Health
from recipes.schema import ClusterConfig

logger = logging.getLogger(__name__)

# Two jobs are with an actor at a time, so that it never waits for the driver.
QUEUE = 2
# A lost connection to a living process: after this long the same process is believed again.
SAME_BOOT_GRACE = 10.0
STARTING = 0.5  # seconds between two questions to an actor that is starting anew


Event = Literal["hung", "lost", "back"]


@dataclass(eq=False)
class Member:
    """One actor.

    Attributes:
        boot: which process answered last. ``probe``: a question for it that is on its way.
        ready: takes jobs. ``lost_at``: when it last stopped to (monotonic).
        holds: checksum of the weights that its next job finds, as far as the driver knows.
        jobs: how many are with it.
    """

    index: int
    handle: Any
    boot: str = ""
    pid: int = 0
    ready: bool = False
    lost_at: float = 0.0
    probe: Any = field(default=None, repr=False)
    holds: str | None = None
    jobs: int = 0


class Fleet:
    """All actors of a pool. After ``start`` only the dispatching thread calls it.

    Attributes:
        restarts: how often an actor was lost or replaced.
    """

    def __init__(
        self, handles: Sequence[Any], config: ClusterConfig, told: Callable[[Member, Event], None]
    ) -> None:
        """``told`` of what happens to an actor; of ``hung`` before its process is ended."""
        self.config, self._told = config, told
        self.members = [Member(index, handle) for index, handle in enumerate(handles)]
        self.restarts = 0

    def start(self) -> list[Health]:
        """Wait until every actor answers.

        Raises:
            ClusterError: one did not within ``cluster.start_timeout``.
        """
        deadline = time.monotonic() + self.config.start_timeout
        answers: list[Health] = []
        for member in self.members:
            health = _first_answer(member, deadline)
            member.boot, member.pid, member.ready = health.boot, health.pid, True
            answers.append(health)
        return answers

    @property
    def whole(self) -> bool:
        """Whether no actor is in quarantine."""
        return all(member.ready for member in self.members)

    def free(self) -> Member | None:
        """The least busy actor that takes another job."""
        free = [m for m in self.members if m.ready and m.jobs < QUEUE]
        return min(free, key=lambda m: m.jobs, default=None)

    def quarantine(self, member: Member, error: BaseException) -> None:
        """No more jobs until it answers anew."""
        if member.ready:
            logger.warning("rollout actor %d quarantined: %s", member.index, type(error).__name__)
            self.restarts += 1
            self._told(member, "lost")
            member.ready, member.lost_at, member.probe = False, time.monotonic(), None

    def replace(self, member: Member, error: BaseException) -> None:
        """End an actor's process that gives no answer; Ray starts another."""
        if member.ready:
            self._told(member, "hung")
        self.quarantine(member, error)
        ray.kill(member.handle, no_restart=False)

    def readmit(self) -> None:
        """Advance every quarantined actor.

        Raises:
            ClusterError: none is left, or none came back in time.
        """
        self._check()
        for member in [m for m in self.members if not m.ready]:
            member.probe = member.probe or _health(member)
            if not ray.wait([member.probe], timeout=0)[0]:
                if time.monotonic() - member.lost_at > self.config.start_timeout:
                    self._end_silent(member)
                continue
            health = self._answer(member)
            if health is None:
                continue
            patient = time.monotonic() - member.lost_at > SAME_BOOT_GRACE
            if health.boot != member.boot or patient:
                member.boot, member.pid, member.holds, member.ready = (
                    health.boot, health.pid, None, True
                )  # fmt: skip
                logger.warning("rollout actor %d re-admitted", member.index)
                self._told(member, "back")

    def _end_silent(self, member: Member) -> None:
        """A stopped process keeps its connections, so that Ray may call it unavailable for ever."""
        logger.warning("rollout actor %d gives no answer; ended", member.index)
        self._told(member, "hung")
        ray.kill(member.handle, no_restart=False)
        member.lost_at, member.probe = time.monotonic(), None

    def _check(self) -> None:
        """Somebody is there, or may come.

        Raises:
            ClusterError: see ``readmit``.
        """
        overdue = time.monotonic() - max((m.lost_at for m in self.members), default=0.0)
        none_ready = not any(member.ready for member in self.members)
        if not self.members or (none_ready and overdue > self.config.start_timeout):
            raise ClusterError(
                f"no rollout actor is left: each may restart {self.config.max_restarts} "
                "times (cluster.max_restarts) and has cluster.start_timeout to come back"
            )

    def _answer(self, member: Member) -> Health | None:
        probe, member.probe = member.probe, None
        try:
            health: Any = ray.get(probe, timeout=1.0)
            return health
        except ActorUnavailableError:
            return None
        except LOST as error:
            logger.error("rollout actor %d does not come back: %s", member.index, error)
            self.members.remove(member)
            return None


def _first_answer(member: Member, deadline: float) -> Health:
    """Of a process that may die, and be replaced, as it starts.

    Raises:
        ClusterError: none came.
    """
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            health: Any = ray.get(_health(member), timeout=left)
            return health
        except (TIMEOUT, *LOST) as error:
            again = isinstance(error, ActorUnavailableError) and time.monotonic() < deadline
            if not again:
                raise ClusterError(
                    f"rollout actor {member.index} did not start: {error}"
                ) from error
            time.sleep(STARTING)


def _health(member: Member) -> Any:
    return member.handle.health.options(concurrency_group="health").remote()
