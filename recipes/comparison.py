"""What ``rectify compare`` holds a policy against: inference-time methods at budgets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from rollout.guidance.gradient import DPS, NTRK
from rollout.guidance.particles import SMC
from rollout.guidance.sampler import GuidanceMethod
from rollout.guidance.search import SVDD, BestOfN
from rollout.guidance.text import TextBestOfN, TextMethod, TextSMC


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """What is the same for every policy."""

    reward: str | None = Field(
        default=None,
        description="The reward that methods follow, one of 'rewards'; default their weighted sum.",
    )
    budgets: tuple[int, ...] = Field(
        default=(),
        description="Network evaluations a sample may take; default 1, 4 and 16 plain samples.",
    )
    samples: int | None = Field(
        default=None, ge=1, description="Samples of each point; default evaluation.samples."
    )
    seeds: int = Field(default=1, ge=1, description="Repetitions with other draws.")
    served: bool = Field(
        default=False,
        description="Ask the reward actors during sampling; default a copy of the reward in each "
        "rollout actor, which a gradient needs.",
    )


class FlowComparison(Comparison, frozen=True, extra="forbid"):
    """Methods for images and videos."""

    kind: Literal["flow"] = "flow"
    methods: tuple[GuidanceMethod, ...] = Field(
        default=(BestOfN(), SVDD(), SMC(), DPS(), NTRK()),
        description="Each is run at every budget, with as many candidates, particles or copies as fit.",
    )


class TextComparison(Comparison, frozen=True, extra="forbid"):
    """Methods for text."""

    kind: Literal["masked"] = "masked"
    methods: tuple[TextMethod, ...] = Field(
        default=(TextBestOfN(), TextSMC()),
        description="Each is run at every budget, with as many candidates or particles as fit.",
    )


ComparisonConfig = Annotated[FlowComparison | TextComparison, Field(discriminator="kind")]


def budgets_of(comparison: Comparison, plain: int) -> tuple[int, ...]:
    """The budgets, ascending; ``plain`` is what a plain sample takes."""
    return tuple(sorted(comparison.budgets or (plain, 4 * plain, 16 * plain)))
