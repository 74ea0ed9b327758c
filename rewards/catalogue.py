"""The rewards a recipe can name. A new one is its file and a place in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewards.countdown import CountdownReward
from rewards.digits import DigitHeldOut, DigitLogProb
from rewards.ink import Ink
from rewards.marginal import Marginal
from rewards.math_answer import MathAnswerReward
from rewards.plugins import FunctionReward
from rewards.sudoku import SudokuReward

RewardConfig = Annotated[
    DigitLogProb
    | DigitHeldOut
    | Ink
    | Marginal
    | SudokuReward
    | CountdownReward
    | MathAnswerReward
    | FunctionReward,
    Field(discriminator="kind"),
]
