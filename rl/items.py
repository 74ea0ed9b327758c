"""One group on its way to a learner rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np


@dataclass(frozen=True)
class Item:
    """A group with all that its loss needs. The driver only handles such small records.

    Attributes:
        replay: what the sampler recorded, or a reference to it that the rank resolves.
        evaluations: how many network evaluations one pass takes.
        prompt: the text that a flow policy's condition is made from.
        advantages: fp64 (size,), one a member.
        weights: fp64 (size,), the share of each member's rows in the loss (0: masked).
        distillation: fp64 (size,), coefficient of each member in DiPOD's term (0: none).
        epoch: which pass over the rollout set this is; randomness of a pass is keyed by it.
    """

    replay: Any
    evaluations: int
    prompt: str
    advantages: np.ndarray
    weights: np.ndarray
    distillation: np.ndarray
    epoch: int


class Counted(Protocol):
    """Anything that is dealt over ranks."""

    @property
    def evaluations(self) -> int:
        """Network evaluations that one pass takes."""
        ...


Dealt = TypeVar("Dealt", bound=Counted)


def share(items: Sequence[Dealt], ranks: int) -> list[list[Dealt]]:
    """Items dealt round over ``ranks``, the same for every timing."""
    return [list(items[rank::ranks]) for rank in range(ranks)]


def micro_steps(shares: Sequence[Sequence[Counted]], size: int) -> int:
    """Micro-batches that every rank runs: those of the rank with the most evaluations."""
    return max(-(-sum(item.evaluations for item in part) // size) for part in shares)
