"""4x4 Sudoku: all complete grids, exactly the uniquely solvable puzzles, splits by solution grid.

A puzzle is a string of 16 digits by rows, 0 where empty. There are 288 complete grids and 13,579,680
puzzles with one solution.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from rollout.draws import Prompt, keyed_seed

Split = Literal["train", "validation", "test"]

TEMPLATE = (
    "Solve this Sudoku of four by four cells. Replace every zero so that no row, column or box holds "
    "a digit twice. Write all sixteen digits inside <answer></answer>.\n{puzzle}"
)
# Solution grids of each split, in the order of one fixed permutation: no grid is in two.
SPLITS = {"train": slice(0, 224), "validation": slice(224, 256), "test": slice(256, 288)}
MAX_EMPTY = 12


@functools.cache
def solution_grids() -> tuple[str, ...]:
    """All 288 complete grids, in lexicographic order."""
    return tuple(_complete(""))


def _complete(cells: str) -> Iterator[str]:
    if len(cells) == 16:
        yield cells
        return
    row, column = divmod(len(cells), 4)
    used = set(cells[4 * row :]) | set(cells[column::4])
    used |= {
        cells[4 * r + c]
        for r in range(row // 2 * 2, row)
        for c in range(column // 2 * 2, column // 2 * 2 + 2)
    }
    for digit in "1234":
        if digit not in used:
            yield from _complete(cells + digit)


@functools.cache
def unique_masks(grid: str) -> np.ndarray:
    """bool (65536,): whether emptying the cells of a 16-bit set leaves ``grid`` the one solution.

    Another grid h also solves the puzzle exactly when every cell in which it differs is empty; so a
    set is ambiguous when it contains the difference set of any h.
    """
    cells = np.frombuffer(grid.encode(), np.uint8)
    others = np.array([list(other.encode()) for other in solution_grids() if other != grid])
    differences = ((others != cells) << np.arange(16)).sum(axis=1)
    ambiguous = np.zeros(1 << 16, bool)
    ambiguous[differences] = True
    for cell in range(16):
        halves = ambiguous.reshape(-1, 2, 1 << cell)  # sets without the cell, and with it
        halves[:, 1] |= halves[:, 0]
    return ~ambiguous


def split_grids(split: Split) -> list[str]:
    """The solution grids of a split."""
    grids = solution_grids()
    order = np.random.default_rng(keyed_seed("sudoku split")).permutation(len(grids))
    return [grids[i] for i in order[SPLITS[split]]]


def puzzle(split: Split, empty: tuple[int, int], *key: int | str) -> tuple[str, str]:
    """A uniquely solvable puzzle and its solution, a function of the key.

    Grid and number of empty cells (``empty`` is a range, both ends included) are uniform; the puzzle
    is uniform among those of the grid with that many.
    """
    random = np.random.default_rng(keyed_seed("sudoku", *key))
    grids = split_grids(split)
    grid = grids[int(random.integers(len(grids)))]
    count = int(random.integers(empty[0], empty[1] + 1))
    unique = unique_masks(grid)
    while True:  # every grid has puzzles with up to 12 empty cells; one try in twenty at 12
        empty_cells = random.permutation(16)[:count]
        if unique[(1 << empty_cells).sum()]:
            break
    cells = np.array(list(grid))
    cells[empty_cells] = "0"
    return "".join(cells), grid


class SudokuPrompts(BaseModel, frozen=True, extra="forbid"):
    """4x4 Sudoku puzzles with exactly one solution, split by solution grid."""

    kind: Literal["sudoku"] = "sudoku"
    split: Split = Field(default="train", description="No solution grid is in two splits.")
    count: int = Field(default=512, ge=1, description="Puzzles.")
    empty: tuple[int, int] = Field(
        default=(4, 12), description="Fewest and most empty cells, 0 to 12."
    )
    seed: int = Field(default=0, ge=0, description="Which puzzles.")

    @model_validator(mode="after")
    def _range(self) -> SudokuPrompts:
        if not 0 <= self.empty[0] <= self.empty[1] <= MAX_EMPTY:
            raise ValueError(f"empty {self.empty} is no range within 0 to {MAX_EMPTY}")
        return self

    def load(self) -> list[Prompt]:
        """The prompts, with the columns ``puzzle`` and ``solution``; a puzzle may come twice."""
        prompts: list[Prompt] = []
        for index in range(self.count):
            text, solution = puzzle(self.split, self.empty, self.split, self.seed, index)
            columns = {"puzzle": text, "solution": solution}
            prompts.append(Prompt(f"{index}-{text}", TEMPLATE.format(puzzle=text), columns))
        return prompts
