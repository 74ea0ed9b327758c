"""The rewards a recipe can name. A new one is its file and a place in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewards.aesthetic import Aesthetic
from rewards.clip_score import ClipScore, PickScore
from rewards.countdown import CountdownReward
from rewards.digits import DigitHeldOut, DigitLogProb
from rewards.geneval import Geneval
from rewards.hpsv2 import HpsV2
from rewards.image_reward import ImageReward
from rewards.ink import Ink
from rewards.judge import Judge, VllmJudge
from rewards.marginal import Marginal
from rewards.math_answer import MathAnswerReward
from rewards.ocr import Ocr
from rewards.plugins import FunctionReward
from rewards.sudoku import SudokuReward
from rewards.video_consistency import TemporalConsistency
from rewards.vlm_score import VlmScore

RewardConfig = Annotated[
    DigitLogProb
    | DigitHeldOut
    | Ink
    | Marginal
    | ClipScore
    | PickScore
    | Aesthetic
    | HpsV2
    | ImageReward
    | VlmScore
    | Geneval
    | Ocr
    | TemporalConsistency
    | Judge
    | VllmJudge
    | SudokuReward
    | CountdownReward
    | MathAnswerReward
    | FunctionReward,
    Field(discriminator="kind"),
]
