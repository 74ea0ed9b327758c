"""The rewards a recipe can name. A new one is its file and a place in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewards.digits import DigitHeldOut, DigitLogProb
from rewards.ink import Ink
from rewards.plugins import FunctionReward

RewardConfig = Annotated[
    DigitLogProb | DigitHeldOut | Ink | FunctionReward, Field(discriminator="kind")
]
