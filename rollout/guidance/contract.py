"""What guidance needs from a reward, and what it counts.

The target of every method is the tilted law ``p(x0) exp(r(x0) / beta)``. Rewards live on another
floor: whoever runs guidance binds them to a ``Tilt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rollout.draws import Group

# Work of a sample that is counted, in the order of ``Counts.columns``.
COUNTED = ("forwards", "backwards", "decodes", "rewards", "reward_backwards", "fallbacks")


class GuidanceError(ValueError):
    """A method that cannot be used with a reward or policy, and which can."""


class Tilt(Protocol):
    """The reward r that samples are tilted towards.

    Attributes:
        differentiable: ``potential`` can be asked.
    """

    differentiable: bool

    def scores(self, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        """r of clean states (n, ...), decoded: fp64 (n,) on the CPU; NaN where it was not scored.

        ``samples`` says what was asked for, one a row.
        """
        ...

    def potential(self, x: Tensor, t: float, clean: Tensor, samples: Sequence[Group]) -> Tensor:
        """The same as a differentiable (n,) of the states ``x`` at ``t`` and their predictions
        ``clean`` of x0 (a reward that knows noise may use ``x``; most use ``clean``)."""
        ...


@dataclass
class Counts:
    """Work by sample: int64 (samples,) for each of ``COUNTED``."""

    samples: int
    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        for name in COUNTED:
            self.columns.setdefault(name, torch.zeros(self.samples, dtype=torch.int64))

    def add(self, rows: Tensor, **work: int) -> None:
        """So much work of each named kind for every entry of ``rows``, which may repeat."""
        spent = torch.bincount(rows.cpu(), minlength=self.samples)
        for name, amount in work.items():
            self.columns[name] += amount * spent

    @property
    def equivalents(self) -> Tensor:
        """Forward-equivalents: forwards + 2 backwards."""
        return self.columns["forwards"] + 2 * self.columns["backwards"]
