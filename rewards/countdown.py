"""Countdown: reach the target with each of the given numbers once.

An expression is never run. Its characters are checked first (digits, ``+ - * /``, parentheses,
spaces), then ``ast.parse`` reads at most 200 of them, and a walker evaluates the tree in exact
fractions, only after its numbers turned out to be the given ones: no value can be larger than what
four operations make of those, and ``9**9**9`` is refused as text (task of TinyZero).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

from rewards.answers import last_answer
from rewards.contract import RewardFunction, RewardSettings

MAX_CHARACTERS = 200
MAX_DEPTH = 50
FORMAT_SCORE = 0.1
ALLOWED = re.compile(r"[0-9+\-*/() ]+")
TYPOGRAPHIC = str.maketrans({"×": "*", "÷": "/", "−": "-"})
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CountdownReward(RewardSettings, frozen=True, extra="forbid"):
    """1 for an expression of the given numbers that equals the target, 0.1 for another answer."""

    kind: Literal["countdown"] = "countdown"

    def build(self) -> RewardFunction:
        """The function, with metrics of a set."""
        return CountdownScores()


class CountdownScores:
    """Scores by the columns ``numbers`` (integers >= 0, at least one) and ``target`` (integer)."""

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        numbers: list[list[int]],
        target: list[int],
        **columns: Any,
    ) -> list[float | None]:
        """1.0 solved, 0.1 with an ``<answer>`` that does not solve it, 0.0 without one.

        Raises:
            ValueError: a column is malformed; the sample is named.
        """
        check_problems(numbers, target)
        return [_score(*sample) for sample in zip(numbers, target, completions, strict=True)]

    def describe_set(
        self,
        prompts: list[str],
        completions: list[str],
        numbers: list[list[int]],
        target: list[int],
        **columns: Any,
    ) -> dict[str, float]:
        """solved_rate and answered_rate (has an ``<answer>`` block).

        Raises:
            ValueError: a column is malformed; the sample is named.
        """
        check_problems(numbers, target)
        samples = zip(numbers, target, completions, strict=True)
        scores = [_score(*sample) for sample in samples]
        return {
            "solved_rate": sum(score == 1 for score in scores) / len(scores),
            "answered_rate": sum(score > 0 for score in scores) / len(scores),
        }


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Whether ``expression`` uses each of ``numbers`` exactly once and equals ``target``.

    Operators are ``+ - * /`` and ``× ÷ −``, at most 50 deep. A minus sign before a number or a
    parenthesis is allowed: with positive numbers it reaches no positive target that subtraction
    does not. Anything else is False: an equation, other digits than ASCII, a power, a call.
    """
    tree = _parsed(expression)
    if tree is None or sorted(_numbers(tree)) != sorted(numbers):
        return False
    try:
        return _value(tree, MAX_DEPTH) == target
    except (_Refused, ZeroDivisionError):
        return False


def check_problems(numbers: list[list[int]], target: list[int]) -> None:
    """Refuse columns that pose no problem.

    Raises:
        ValueError: numbers are no list of one or more integers >= 0, or the target is no integer.
    """
    for index, (given, wanted) in enumerate(zip(numbers, target, strict=True)):
        if not _are_numbers(given):
            raise ValueError(
                f"sample {index}: column 'numbers' is {given!r}, not a list of one or more "
                "integers >= 0"
            )
        if not _is_integer(wanted):
            raise ValueError(f"sample {index}: column 'target' is {wanted!r}, not an integer")


class _Refused(Exception):
    """The tree has something else than numbers and the four operations, or is too deep."""


def _score(numbers: list[int], target: int, completion: str) -> float:
    answer = last_answer(completion)
    if answer is None:
        return 0.0
    return 1.0 if solves(answer, numbers, target) else FORMAT_SCORE


def _parsed(expression: str) -> ast.expr | None:
    if len(expression) > MAX_CHARACTERS:
        return None
    spaced = " ".join(expression.translate(TYPOGRAPHIC).split())
    if ALLOWED.fullmatch(spaced) is None:
        return None
    try:
        return ast.parse(spaced, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too nested, by version
        return None


def _numbers(tree: ast.expr) -> list[int]:
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int)
    ]


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth == 0:
        raise _Refused
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATIONS:
            return OPERATIONS[type(sign)](_value(left, depth - 1), _value(right, depth - 1))
        case _:
            raise _Refused


def _are_numbers(given: Any) -> bool:
    if not isinstance(given, list) or not given:
        return False
    return all(_is_integer(number) and number >= 0 for number in given)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
