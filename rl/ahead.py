"""Rollout sets drawn and scored while earlier ones train.

    sync             set s is drawn by the weights after step s: nothing overlaps
    one_step_ahead   set s is drawn, while set s - 1 trains, by the weights after step s - 1
    async            sets up to s + max_staleness are under way while set s trains; every job takes
                     the newest weights there are when it starts

With ``parts`` the learner works on the first groups of a set while its last are sampled: gradients
accumulate over parts and nothing is older than in sync.

A set is the groups of its step, whatever finishes first, so each sample is used exactly once. The
first two are functions of (seed, step), to the bit; in the third only the versions depend on timing,
and none is older than ``max_staleness`` steps: a job of set s starts after step s - max_staleness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

Set = TypeVar("Set")


class ScheduleConfig(BaseModel, frozen=True, extra="forbid"):
    """What may run at the same time."""

    mode: Literal["sync", "one_step_ahead", "async"] = Field(
        default="sync",
        description="sync: sample, score, train; one_step_ahead: the next set is sampled while one "
        "trains; async: several sets ahead, each job by the newest weights.",
    )
    max_staleness: int = Field(
        default=2, ge=1, description="async: a set is sampled at most so many steps ahead."
    )
    parts: int = Field(
        default=1,
        ge=1,
        description="sync: a set is sampled, scored and accumulated in so many parts, so that the "
        "learner works while the rest is sampled; one optimiser step all the same.",
    )

    @property
    def ahead(self) -> int:
        """How many sets are drawn before the one that trains is done."""
        return {"sync": 0, "one_step_ahead": 1, "async": self.max_staleness}[self.mode]

    @property
    def stale(self) -> bool:
        """Whether sets are trained by other weights than those that drew them."""
        return self.ahead > 0

    @property
    def threads(self) -> int:
        """How many sets or parts are drawn beside the training."""
        # With one more than are ahead, one is collected while another starts.
        return self.ahead + 1 if self.ahead else self.parts if self.parts > 1 else 0

    def until(self, number: int) -> int:
        """What may be under way while ``number`` is taken: the rest of its set, or later sets."""
        if self.ahead:
            return number + self.ahead
        return (number // self.parts + 1) * self.parts - 1

    @property
    def pinned(self) -> bool:
        """Whether the weights of a set are settled before it is drawn."""
        return self.mode != "async"


class Ahead(Generic[Set]):
    """Draws sets, or parts of sets, in order and before they are asked for."""

    def __init__(
        self, draw: Callable[[int, Any], Set], threads: int, first: int, last: int
    ) -> None:
        """``draw(number, weights)``: all of one; called from ``threads`` threads, or the caller's (0).

        ``first``, ``last``: the numbers of the run that are left, ``last`` excluded.
        """
        self._draw, self._next, self._last = draw, first, last
        self._pending: deque[Future[Set]] = deque()
        self._threads = ThreadPoolExecutor(threads, "rollout set") if threads else None

    def start(self, until: int, weights: Any) -> None:
        """Begin with all up to ``until`` that are not under way, drawn by ``weights``."""
        if self._threads is None:
            return
        while self._next <= min(until, self._last - 1):
            self._pending.append(self._threads.submit(self._draw, self._next, weights))
            self._next += 1

    def take(self, number: int, until: int, weights: Any) -> Set:
        """``number``, the next in order; those up to ``until`` are begun."""
        if self._threads is None:
            return self._draw(number, weights)
        self.start(until, weights)
        return self._pending.popleft().result()

    def close(self) -> None:
        """Forget what is under way; whoever draws has been told to stop."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
