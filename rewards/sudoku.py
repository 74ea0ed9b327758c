"""Sudoku 4x4: the share of the empty cells that a completion fills rightly.

Grids are 16 digits row by row, 0 where a puzzle is empty. The answer is the ASCII digits of the
last ``<answer>`` block: other characters are dropped (so grids may be laid out), a short answer is
padded with 0, a long one cut at 16 (task of d1, arXiv 2504.12216).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from rewards.answers import last_answer
from rewards.contract import RewardFunction, RewardSettings

CELLS = 16
PUZZLE = re.compile(r"[0-4]{16}")
SOLUTION = re.compile(r"[1-4]{16}")
OTHER_THAN_DIGITS = re.compile(r"[^0-9]+")


def cell_accuracy(puzzle: str, solution: str, completion: str) -> float:
    """Share of the empty cells of ``puzzle`` that equal ``solution``, in [0, 1].

    0 without an answer, and 0 if a given cell is written with another digit (0 included): such an
    answer solves another puzzle. Given cells beyond the end of a short answer are not changed. A
    puzzle without empty cells scores 1 for the whole grid repeated, else 0.
    """
    grid = _written(completion)
    if grid is None:
        return 0.0
    written = zip(puzzle, grid, strict=False)
    if any(given not in ("0", digit) for given, digit in written):
        return 0.0
    empty = [place for place, given in enumerate(puzzle) if given == "0"]
    if not empty:
        return float(grid == solution)
    padded = grid.ljust(CELLS, "0")
    return sum(padded[place] == solution[place] for place in empty) / len(empty)


def solved(puzzle: str, solution: str, completion: str) -> bool:
    """Whether the answer is the whole solution, given cells of ``puzzle`` included."""
    return _written(completion) == solution


class SudokuReward(RewardSettings, frozen=True, extra="forbid"):
    """Share of the empty cells of a 4x4 Sudoku filled rightly; 0 if a given cell is changed."""

    kind: Literal["sudoku"] = "sudoku"
    score: Literal["cells", "solved"] = Field(
        default="cells", description="Share of the right cells, or 1 for the whole solution only."
    )

    def build(self) -> RewardFunction:
        """The function, with metrics of a set."""
        return SudokuCells(cell_accuracy if self.score == "cells" else solved)


class SudokuCells:
    """Scores by the columns ``puzzle`` and ``solution`` (16 digits each)."""

    def __init__(self, score: Callable[[str, str, str], float] = cell_accuracy) -> None:
        self.score = score

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        puzzle: list[str],
        solution: list[str],
        **columns: Any,
    ) -> list[float | None]:
        """A score for each completion.

        Raises:
            ValueError: a puzzle or solution is malformed; the sample is named.
        """
        check_grids(puzzle, solution)
        samples = zip(puzzle, solution, completions, strict=True)
        return [float(self.score(*sample)) for sample in samples]

    def describe_set(
        self,
        prompts: list[str],
        completions: list[str],
        puzzle: list[str],
        solution: list[str],
        **columns: Any,
    ) -> dict[str, float]:
        """cell_accuracy (mean), solved_rate (every cell right), answered_rate (has a block).

        Raises:
            ValueError: a puzzle or solution is malformed; the sample is named.
        """
        check_grids(puzzle, solution)
        samples = list(zip(puzzle, solution, completions, strict=True))
        answered = [last_answer(text) is not None for text in completions]
        return {
            "cell_accuracy": sum(cell_accuracy(*sample) for sample in samples) / len(samples),
            "solved_rate": sum(solved(*sample) for sample in samples) / len(samples),
            "answered_rate": sum(answered) / len(samples),
        }


def check_grids(puzzle: list[str], solution: list[str]) -> None:
    """Refuse columns that are no grids.

    Raises:
        ValueError: not 16 digits (puzzle 0 to 4, solution 1 to 4), or a solution that contradicts
            a given cell.
    """
    for index, (given, full) in enumerate(zip(puzzle, solution, strict=True)):
        _check(index, "puzzle", given, PUZZLE, "16 digits 0 to 4")
        _check(index, "solution", full, SOLUTION, "16 digits 1 to 4")
        if any(a not in ("0", b) for a, b in zip(given, full, strict=True)):
            raise ValueError(
                f"sample {index}: solution {full!r} contradicts a given cell of puzzle {given!r}"
            )


def _check(index: int, column: str, value: Any, pattern: re.Pattern[str], wanted: str) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"sample {index}: column {column!r} is {value!r}, not {wanted} as text")


def _written(completion: str) -> str | None:
    """The digits of the answer, at most 16."""
    answer = last_answer(completion)
    return None if answer is None else OTHER_THAN_DIGITS.sub("", answer)[:CELLS]
