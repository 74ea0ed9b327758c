"""Sudoku: which cells count, what an answer is, and what breaks a given cell."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rewards.answers import last_answer
from rewards.calling import call_reward
from rewards.contract import SetMetric
from rewards.sudoku import SudokuReward, cell_accuracy, solved

PUZZLE = "3014002020004130"
SOLUTION = "3214142323414132"  # cells 1 4 5 7 9 10 11 15 are empty


def accuracy(answer: str) -> float:
    return cell_accuracy(PUZZLE, SOLUTION, f"<answer>{answer}</answer>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("5</answer>", None),
        ("<Answer>5</Answer>", None),
        ("<answer>5</answer>", "5"),
        ("<answer> 4 </answer> or <answer>\n5\n</answer> so", "5"),
        ("<answer>4</answer> but <answer>5", "5"),
        ("<answer>", ""),
        ("<answer><answer>5</answer></answer>", "5"),
        ("<answer>٣ \0 é</answer>", "٣ \0 é"),
    ],
)
def test_the_last_block_is_the_answer_and_an_unclosed_one_runs_to_the_end(
    text: str, answer: str | None
):
    assert last_answer(text) == answer


@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "<answer></answer>", "<", "</"])
def test_a_megabyte_of_tags_takes_no_time(unit: str):
    text = unit * (1_000_000 // len(unit))
    started = time.perf_counter()
    last_answer(text)
    cell_accuracy(PUZZLE, SOLUTION, text)
    assert time.perf_counter() - started < 0.5


def test_golden_scores():
    assert accuracy(SOLUTION) == 1.0
    assert accuracy("32141423") == 0.5
    assert cell_accuracy(PUZZLE, SOLUTION, SOLUTION) == 0.0
    assert accuracy("") == 0.0


def test_every_empty_cell_is_worth_an_eighth_and_given_ones_nothing():
    for place, given in enumerate(PUZZLE):
        wrong = str(int(SOLUTION[place]) % 4 + 1)
        grid = SOLUTION[:place] + wrong + SOLUTION[place + 1 :]
        assert accuracy(grid) == (0.875 if given == "0" else 0.0)


@pytest.mark.parametrize("blank", ["0", "5", "9"])
def test_another_digit_at_a_given_cell_is_worth_nothing_even_if_all_else_is_right(blank: str):
    assert accuracy(blank + SOLUTION[1:]) == 0.0
    assert accuracy(SOLUTION[0] + blank + SOLUTION[2:]) == 0.875


def test_layout_is_dropped_a_long_answer_is_cut_and_the_last_block_counts():
    rows = "\n".join(" | ".join(SOLUTION[i : i + 4]) for i in range(0, 16, 4))
    assert accuracy(f"\n{rows}\n") == 1.0
    assert accuracy(SOLUTION + "999") == 1.0
    twice = f"<answer>{SOLUTION}</answer> no, <answer>3</answer>"
    assert cell_accuracy(PUZZLE, SOLUTION, twice) == 0.0
    assert cell_accuracy(PUZZLE, SOLUTION, f"<answer>{SOLUTION}") == 1.0


def test_digits_of_other_scripts_are_no_digits():
    arabic = SOLUTION.translate({ord(str(d)): chr(0x0660 + d) for d in range(5)})
    assert accuracy(arabic) == 0.0
    assert accuracy("²" + SOLUTION) == 1.0


def test_a_puzzle_without_empty_cells_is_repeated_or_not():
    for answer, score in ((SOLUTION, 1.0), (SOLUTION[:15], 0.0), ("", 0.0), ("4" * 16, 0.0)):
        assert cell_accuracy(SOLUTION, SOLUTION, f"<answer>{answer}</answer>") == score


def test_solved_needs_all_sixteen_cells():
    assert solved(PUZZLE, SOLUTION, f"<answer>{SOLUTION}</answer>")
    puzzle = "0" * 15 + SOLUTION[15]
    short = f"<answer>{SOLUTION[:15]}</answer>"
    assert cell_accuracy(puzzle, SOLUTION, short) == 1.0
    assert not solved(puzzle, SOLUTION, short)
    assert not solved(PUZZLE, SOLUTION, SOLUTION)


def test_a_reward_can_ask_for_the_whole_solution():
    texts = [f"<answer>{SOLUTION}</answer>", f"<answer>{SOLUTION[:15]}1</answer>", "none"]
    columns: dict[str, Any] = {"puzzle": [PUZZLE] * 3, "solution": [SOLUTION] * 3}
    assert SudokuReward().build()(["p"] * 3, texts, **columns) == [1.0, 0.875, 0.0]
    assert SudokuReward(score="solved").build()(["p"] * 3, texts, **columns) == [1.0, 0.0, 0.0]


def test_a_set_is_described_by_three_rates():
    reward = SudokuReward().build()
    assert isinstance(reward, SetMetric)
    texts = [f"<answer>{SOLUTION}</answer>", "<answer>32141423</answer>", "<answer>", "none"]
    described = reward.describe_set(
        ["p"] * 4, texts, puzzle=[PUZZLE] * 4, solution=[SOLUTION] * 4, other=[1] * 4
    )
    assert described == {"cell_accuracy": 0.375, "solved_rate": 0.25, "answered_rate": 0.75}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("puzzle", PUZZLE[:15], "16 digits 0 to 4"),
        ("puzzle", "5" + PUZZLE[1:], "16 digits 0 to 4"),
        ("puzzle", int(PUZZLE), "16 digits 0 to 4"),
        ("puzzle", "٣" + PUZZLE[1:], "16 digits 0 to 4"),
        ("puzzle", PUZZLE + "\n", "16 digits 0 to 4"),
        ("puzzle", "1" + PUZZLE[1:], "contradicts"),
        ("solution", "0" + SOLUTION[1:], "16 digits 1 to 4"),
        ("solution", None, "16 digits 1 to 4"),
    ],
)
def test_a_malformed_column_costs_its_own_sample_and_is_named(column: str, value: Any, words: str):
    columns: dict[str, list[Any]] = {"puzzle": [PUZZLE] * 3, "solution": [SOLUTION] * 3}
    columns[column][1] = value
    reward = SudokuReward().build()
    texts = [f"<answer>{SOLUTION}</answer>"] * 3
    with pytest.raises(ValueError, match="sample 1"):
        reward(["p"] * 3, texts, **columns)
    scores = call_reward("sudoku", reward, ["p"] * 3, texts, columns, 64)
    (failure,) = scores.failures
    assert failure.index == 1
    assert words in failure.message
    assert scores.values[[0, 2]].tolist() == [1.0, 1.0]
