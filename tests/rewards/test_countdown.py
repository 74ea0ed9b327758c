"""Countdown: what solves it, what is refused, and how fast."""

from __future__ import annotations

import time
import warnings
from fractions import Fraction
from typing import Any

import pytest

from rewards.calling import call_reward
from rewards.contract import SetMetric
from rewards.countdown import CountdownReward, solves


def score(answer: str, numbers: list[int], target: int) -> float | None:
    reward = CountdownReward().build()
    (got,) = reward(["p"], [f"<answer>{answer}</answer>"], numbers=[numbers], target=[target])
    return got


@pytest.mark.parametrize(
    ("answer", "expected"), [("2*4-3", 1.0), ("2*4-3=5", 0.1), ("5", 0.1), ("4/2+3", 1.0)]
)
def test_golden_scores(answer: str, expected: float):
    assert score(answer, [2, 3, 4], 5) == expected


def test_without_an_answer_block_nothing_is_scored_and_the_last_one_counts():
    reward = CountdownReward().build()
    texts = ["2*4-3", "<answer>2*4-3", "<answer>2*4-3</answer> or <answer>9</answer>", "</answer>"]
    assert reward(["p"] * 4, texts, numbers=[[2, 3, 4]] * 4, target=[5] * 4) == [0, 1, 0.1, 0]


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("2 × 4 − 3", [2, 3, 4], 5),
        ("4 ÷ 2 + 3", [2, 3, 4], 5),
        ("(2\n * 4)\n - 3", [2, 3, 4], 5),
        ("-3 + 2*4", [2, 3, 4], 5),
        ("-(3 - 2*4)", [2, 3, 4], 5),
        ("((((2*4))-3))", [2, 3, 4], 5),
        ("3 - 4 - 2", [2, 3, 4], -3),
        ("1/3*3", [1, 3, 3], 1),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),
        ("5", [5], 5),
        ("0*7", [0, 7], 0),
    ],
)
def test_what_solves_it(expression: str, numbers: list[int], target: int):
    assert solves(expression, numbers, target)
    assert not solves(expression, numbers, target + 1)


@pytest.mark.parametrize(
    ("expression", "numbers"),
    [
        ("2*4-3", [2, 3, 4, 4]),
        ("2*4-3", [2, 4]),
        ("4+1", [2, 3, 4]),
        ("2+3", [2, 3, 4]),
        ("2+3+0*4", [2, 3, 4]),
        ("2+3", [5]),
        ("23-18", [2, 3, 18]),
        ("4+3-2", [2, 2, 3, 4]),
        ("3/(2-2)+2", [2, 2, 2, 3]),
    ],
)
def test_other_numbers_than_the_given_ones_do_not_solve_it(expression: str, numbers: list[int]):
    assert not solves(expression, numbers, 5)


HOSTILE = [
    "9**9**9",
    "9**9",
    "9//2",
    "9%5",
    "9<<9",
    "9@9",
    "~9",
    "+9",
    "9_0",
    "0x9",
    "09",
    "9.0",
    "9e0",
    "9j",
    "9 9",
    "9(9)",
    "(9)(9)",
    "9 if 9 else 9",
    "(x := 9)",
    "(9).real",
    "__import__('os').system('exit')",
    "f'{9}'",
    "'9'",
    "True",
    "[9]",
    "9,",
    "lambda: 9",
    "9 # nine",
    "9 == 9",
    "9 \\\n",
    "٩",
    "９",
    "⁹",
    "9\0",
    "\ud800",
    "9" * 5000,
    "9" * 150,
    "(" * 5000 + "9" + ")" * 5000,
    "(" * 99 + "9" + ")" * 99 + "+" + "(",
    "-" * 199 + "9",
    "-" * 5000 + "9",
    "9+" * 99 + "9",
    "(" * 200,
    ")" * 200,
    "+".join("9" * 3000),
    "",
    " ",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=[repr(text[:20]) for text in HOSTILE])
def test_what_is_no_plain_expression_is_worth_a_tenth_at_once(answer: str):
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # parsing must not complain about the text either
        assert score(answer, [9], 9) == 0.1
    assert time.perf_counter() - started < 0.1


def test_a_megabyte_is_refused_at_once():
    started = time.perf_counter()
    assert not solves("(" * 1_000_000, [9], 9)
    assert not solves("9+" * 500_000, [9], 9)
    assert time.perf_counter() - started < 0.1


def test_refusals_are_of_the_form_alone():
    assert solves("9", [9], 9)
    assert solves("(" * 90 + "9" + ")" * 90, [9], 9)
    assert solves("-" * 48 + "9", [9], 9)


def test_arithmetic_is_exact():
    thirds = "1/3 + 1/3 + 1/3 - 1"
    numbers = [1, 3, 1, 3, 1, 3, 1]
    assert solves(thirds, numbers, 0)
    big = [10**17, 1]
    assert 1e17 + 1 == 1e17
    assert solves(f"{big[0]} + 1", big, 10**17 + 1)
    assert not solves(f"{big[0]} + 1", big, 10**17)
    assert Fraction(7, 2) != 3
    assert not solves("7/2", [7, 2], 3)


def test_a_set_is_described_by_two_rates():
    reward = CountdownReward().build()
    assert isinstance(reward, SetMetric)
    texts = ["<answer>2*4-3</answer>", "<answer>5</answer>", "2*4-3", "<answer>"]
    described = reward.describe_set(["p"] * 4, texts, numbers=[[2, 3, 4]] * 4, target=[5] * 4)
    assert described == {"solved_rate": 0.25, "answered_rate": 0.75}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("numbers", []),
        ("numbers", "234"),
        ("numbers", [2, 3.0]),
        ("numbers", [2, True]),
        ("numbers", [2, -3]),
        ("numbers", None),
        ("target", 5.0),
        ("target", "5"),
        ("target", True),
    ],
)
def test_a_malformed_column_costs_its_own_sample_and_is_named(column: str, value: Any):
    columns: dict[str, list[Any]] = {"numbers": [[2, 3, 4]] * 3, "target": [5] * 3}
    columns[column] = [*columns[column][:2], value]
    reward = CountdownReward().build()
    texts = ["<answer>2*4-3</answer>"] * 3
    with pytest.raises(ValueError, match=f"sample 2: column '{column}'"):
        reward(["p"] * 3, texts, **columns)
    scores = call_reward("countdown", reward, ["p"] * 3, texts, columns, 64)
    assert [failure.index for failure in scores.failures] == [2]
    assert scores.values[:2].tolist() == [1.0, 1.0]
