"""The reward contract: TRL's reward-function signature, and the options every reward has.

A reward is ``f(prompts, completions, **columns) -> list[float | None]``; None means *not scored*.
Completions of media policies are uint8 arrays (frames, height, width, channels). A reward through
which gradients may flow has a second form, from pixels to a tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from rewards.environment import missing

if TYPE_CHECKING:
    from torch import Tensor


class RewardFunction(Protocol):
    """Any callable of TRL's signature."""

    def __call__(
        self, prompts: list[str], completions: list[Any], **columns: Any
    ) -> list[float | None]:
        """One score for each completion; None where the reward does not apply."""
        ...


@runtime_checkable
class SetMetric(Protocol):
    """A reward that also has numbers for a whole evaluation set."""

    def describe_set(
        self, prompts: list[str], completions: list[Any], **columns: Any
    ) -> dict[str, float]:
        """Metrics by name, e.g. accuracy or a Fréchet distance."""
        ...


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward that guidance can follow; its numbers are those of the served form, not rounded."""

    def differentiable(self, prompts: list[str], pixels: Tensor, **columns: Any) -> Tensor:
        """Scores (n,) of fp32 pixels (n, frames, height, width, channels) in [0, 1]."""
        ...


@runtime_checkable
class ClassifierReward(Protocol):
    """A reward that stands on a classifier whose logits can be had."""

    def logits(self, pixels: Tensor) -> Tensor:
        """Differentiable (n, classes) of fp32 pixels (n, frames, height, width, channels)."""
        ...


class RewardSettings(BaseModel, frozen=True, extra="forbid"):
    """Options of every reward.

    Attributes:
        differentiable: what ``build`` makes is a ``DifferentiableReward``.
        environment: of ``rewards.environment``, the one whose libraries ``build`` needs by default;
            None: the platform's own.
    """

    differentiable: ClassVar[bool] = False
    environment: ClassVar[str | None] = None

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]{1,60}$",
        description="Its name in metrics; default its kind.",
    )
    weight: float = Field(
        default=1.0, allow_inf_nan=False, description="Weight in the advantage; 0 only watches."
    )
    replicas: int = Field(default=1, ge=1, description="Actors that serve it.")
    batch_size: int = Field(default=64, ge=1, description="Samples per call of the reward.")
    deadline: float = Field(default=120.0, gt=0, description="Seconds one call may take.")
    retries: int = Field(
        default=3, ge=0, description="Repetitions of a call whose process was lost."
    )
    max_failures: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of a step's samples that may fail; more ends the run.",
    )
    gpus: float = Field(default=0.0, ge=0, description="GPUs per replica.")
    cpus: float = Field(default=0.0, ge=0, description="CPU cores reserved per replica.")

    @abstractmethod
    def build(self) -> RewardFunction:
        """The reward itself, in the process that serves it."""

    @property
    def served_in(self) -> str | None:
        """The environment that these settings need."""
        return type(self).environment

    def has_gradient(self) -> bool:
        """Whether guidance can follow what ``build`` makes."""
        return type(self).differentiable

    def problem(self) -> str | None:
        """Why this reward cannot run here, with the remedy; None if it can."""
        return None if self.served_in is None else missing(self.served_in)
