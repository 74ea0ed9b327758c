"""Sudoku and Countdown prompt sets: the golden counts, unique solutions, disjoint splits."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rewards.countdown import CountdownReward
from rewards.sudoku import SudokuReward
from rollout.countdown import CountdownPrompts, instance, split_of
from rollout.policies.llada.pretraining import example
from rollout.sudoku import SPLITS, SudokuPrompts, solution_grids, split_grids, unique_masks

COUNTS = (
    288, 4608, 34560, 161280, 522624, 1239552, 2204928,
    2958336, 2961024, 2141184, 1041408, 284160, 25728,
)  # fmt: skip


def solutions(puzzle: str) -> list[str]:
    """All solutions by trying every complete grid."""
    return [
        grid
        for grid in solution_grids()
        if all(a in ("0", b) for a, b in zip(puzzle, grid, strict=True))
    ]


def test_all_grids_are_found():
    grids = solution_grids()
    assert len(grids) == len(set(grids)) == 288
    for grid in grids:
        cells = np.array(list(grid)).reshape(4, 4)
        boxes = cells.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
        for part in (*cells, *cells.T, *boxes):
            assert sorted(part) == list("1234")


def test_uniquely_solvable_puzzles_are_exactly_those_of_the_specification():
    sizes = np.bitwise_count(np.arange(1 << 16))
    found = sum(np.bincount(sizes[unique_masks(grid)], minlength=17) for grid in solution_grids())
    assert found[:13].tolist() == list(COUNTS)
    assert found.sum() == 13_579_680


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_sudoku_prompts_have_one_solution_of_their_split(split: str):
    prompts = SudokuPrompts(split=split, count=60, empty=(4, 12)).load()  # type: ignore[arg-type]
    empties = set()
    for prompt in prompts:
        puzzle, solution = prompt.columns["puzzle"], prompt.columns["solution"]
        assert solutions(puzzle) == [solution]
        assert solution in split_grids(split)  # type: ignore[arg-type]
        assert prompt.text.endswith("\n" + puzzle)
        empties.add(puzzle.count("0"))
    assert min(empties) == 4 and max(empties) == 12
    assert len({prompt.id for prompt in prompts}) == 60


def test_no_solution_grid_is_in_two_splits():
    parts = [split_grids(split) for split in SPLITS]  # type: ignore[arg-type]
    assert sorted(grid for part in parts for grid in part) == sorted(solution_grids())


@pytest.mark.parametrize("empty", [(5, 4), (0, 13), (-1, 3)])
def test_an_impossible_number_of_empty_cells_is_refused(empty: tuple[int, int]):
    with pytest.raises(ValidationError, match="no range within 0 to 12"):
        SudokuPrompts(empty=empty)


def test_countdown_instances_are_solved_by_their_own_expression():
    reward = CountdownReward().build()
    for key in range(200):
        numbers, target, expression = instance("train", (3, 4), 9, "test", key)
        assert sorted(map(int, re.findall(r"\d+", expression))) == sorted(numbers)
        answer = f"<answer>{expression}</answer>"
        assert reward(["p"], [answer], numbers=[numbers], target=[target]) == [1.0]


def test_countdown_splits_are_disjoint_whatever_the_order_of_the_numbers():
    for split in ("train", "validation", "test"):
        for prompt in CountdownPrompts(split=split, count=80).load():  # type: ignore[arg-type]
            numbers, target = prompt.columns["numbers"], prompt.columns["target"]
            assert split_of(numbers[::-1], target) == split
            assert 0 < target <= 100
    assert split_of([2, 3, 4], 5) == split_of([4, 3, 2], 5)


def test_a_range_of_numbers_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="no range within 2 to 6"):
        CountdownPrompts(numbers=(3, 7))


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_the_pretraining_examples_are_right_and_leave_the_global_generators_alone(name: str):
    before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    for key in range(20):
        prompt, answer = example(name, "test", key)
        if name == "sudoku":
            puzzle = prompt.splitlines()[-1]
            scores = SudokuReward().build()(
                [prompt], [answer], puzzle=[puzzle], solution=solutions(puzzle)
            )
        else:
            numbers = [int(n) for n in re.findall(r"\d+", prompt.splitlines()[-2])]
            target = int(prompt.splitlines()[-1].split()[-1])
            scores = CountdownReward().build()(
                [prompt], [answer], numbers=[numbers], target=[target]
            )
        assert scores == [1.0]
    assert np.array_equal(before, np.random.get_state()[1])
    assert torch.equal(torch_before, torch.random.get_rng_state())


def test_sets_are_functions_of_their_configuration():
    assert SudokuPrompts(count=5).load() == SudokuPrompts(count=9).load()[:5]
    assert SudokuPrompts(count=5, seed=1).load() != SudokuPrompts(count=5).load()
    assert CountdownPrompts(count=5).load() == CountdownPrompts(count=9).load()[:5]
