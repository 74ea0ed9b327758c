"""Countdown: reach a target with every given number used once and + - * /.

An instance is made from a random expression, so it has a solution; which split it is in follows from
a hash of its numbers and target, so that no instance is in two.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from rollout.draws import Prompt, keyed_seed
from rollout.sudoku import Split

TEMPLATE = (
    "Use each of these numbers exactly once, with + - * / and parentheses, to make the target. "
    "Write only the expression inside <answer></answer>.\nNumbers: {numbers}\nTarget: {target}"
)
LARGEST_TARGET = 100


def split_of(numbers: list[int], target: int) -> Split:
    """Eight tenths of all instances train, one validates, one tests; the order does not matter."""
    bucket = keyed_seed("countdown split", *sorted(numbers), target) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def instance(
    split: Split, count: tuple[int, int], largest: int, *key: int | str
) -> tuple[list[int], int, str]:
    """Numbers, target and one expression that reaches it, a function of the key.

    Every intermediate value is a positive integer, the target at most 100.
    """
    for attempt in itertools.count():
        random = np.random.default_rng(keyed_seed("countdown", *key, attempt))
        size = int(random.integers(count[0], count[1] + 1))
        numbers = [int(n) for n in random.integers(1, largest + 1, size)]
        value, text = _expression(numbers, random)
        if 0 < value <= LARGEST_TARGET and split_of(numbers, value) == split:
            order = random.permutation(size)
            return [numbers[i] for i in order], value, text
    raise AssertionError("unreachable")


def _expression(numbers: list[int], random: np.random.Generator) -> tuple[int, str]:
    """Value and text of ``numbers`` joined from the left by random operators (-1: none fits)."""
    value, text, product = numbers[0], str(numbers[0]), True
    for number in numbers[1:]:
        options = ["+", "*"] + ["-"] * (value > number) + ["/"] * (value % number == 0)
        operator = str(random.choice(options))
        if operator in "*/" and not product:
            text = f"({text})"
        product = operator in "*/"
        text += f"{operator}{number}"
        match operator:
            case "+":
                value += number
            case "-":
                value -= number
            case "*":
                value *= number
            case _:
                value //= number
        if value > LARGEST_TARGET:
            return -1, ""
    return value, text


class CountdownPrompts(BaseModel, frozen=True, extra="forbid"):
    """Countdown instances that have a solution, in disjoint splits."""

    kind: Literal["countdown"] = "countdown"
    split: Split = Field(default="train", description="No instance is in two splits.")
    count: int = Field(default=512, ge=1, description="Instances.")
    numbers: tuple[int, int] = Field(default=(3, 4), description="Fewest and most numbers, 2 to 6.")
    largest: int = Field(default=9, ge=2, le=100, description="Numbers are 1 to this.")
    seed: int = Field(default=0, ge=0, description="Which instances.")

    @model_validator(mode="after")
    def _range(self) -> CountdownPrompts:
        if not 2 <= self.numbers[0] <= self.numbers[1] <= 6:
            raise ValueError(f"numbers {self.numbers} is no range within 2 to 6")
        return self

    def load(self) -> list[Prompt]:
        """The prompts, with the columns ``numbers`` and ``target``."""
        prompts: list[Prompt] = []
        for index in range(self.count):
            numbers, target, _ = instance(
                self.split, self.numbers, self.largest, self.split, self.seed, index
            )
            text = TEMPLATE.format(numbers=" ".join(map(str, numbers)), target=target)
            columns = {"numbers": numbers, "target": target}
            prompts.append(Prompt(f"{index}-{'.'.join(map(str, numbers))}-{target}", text, columns))
        return prompts
