"""Calling a reward so that its mistakes are named and masked, never a silent 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from rewards.contract import RewardFunction, RewardSettings

Reason = Literal["exception", "not_finite", "wrong_length", "wrong_type", "deadline", "worker_died"]


class RewardFailed(RuntimeError):
    """A reward failed on more of a step's samples than its recipe allows."""


@dataclass(frozen=True)
class Failure:
    """One sample that a reward could not score; ``index`` is its place in the call."""

    reward: str
    prompt: str
    index: int
    reason: Reason
    message: str


@dataclass(frozen=True)
class Scores:
    """fp64 (n,), NaN where there is no score: failed, or ``not_scored`` because it said None."""

    values: np.ndarray
    failures: tuple[Failure, ...]
    not_scored: int


def call_reward(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    batch_size: int,
) -> Scores:
    """Scores of all completions; never raises for a mistake of the reward's own.

    A batch that raises, or answers with another number of scores, is repeated sample by sample, so
    that one bad sample costs only itself. What the function's signature does not name (prompts and
    completions too) is left out; with ``**columns`` it gets everything.
    """
    values = np.full(len(prompts), np.nan)
    failures: list[Failure] = []
    not_scored = 0
    given = {"prompts": prompts, "completions": completions, **columns}
    accepted = _accepted(function, given)
    for start in range(0, len(prompts), batch_size):
        span = range(start, min(start + batch_size, len(prompts)))
        answers = _answers(function, accepted, span)
        for index, answer in zip(span, answers, strict=True):
            checked = _checked(answer)
            if checked is None:
                not_scored += 1
            elif isinstance(checked, tuple):
                failures.append(Failure(name, prompts[index], index, *checked))
            else:
                values[index] = checked
    return Scores(values, tuple(failures), not_scored)


def check_failures(scores: Scores, settings: RewardSettings, name: str) -> None:
    """Stop when a reward fails too often.

    Raises:
        RewardFailed: with the share, the first prompt and the reward's own words.
    """
    share = len(scores.failures) / max(len(scores.values), 1)
    if share > settings.max_failures:
        first = scores.failures[0]
        raise RewardFailed(
            f"reward {name!r} failed on {len(scores.failures)} of {len(scores.values)} samples "
            f"(max_failures {settings.max_failures:g}); first, for prompt {first.prompt!r}, sample "
            f"{first.index}: {first.reason}: {first.message}"
        )


def _accepted(
    function: Callable[..., Any], given: Mapping[str, Sequence[Any]]
) -> Mapping[str, Sequence[Any]]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code need not have a readable signature
        return given
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    names = {p.name for p in parameters}
    return {name: values for name, values in given.items() if name in names}


def _answers(
    function: Callable[..., Any], given: Mapping[str, Sequence[Any]], span: range
) -> list[Any]:
    """An answer for each index; an exception stands for itself."""
    part = {name: list(values[span.start : span.stop]) for name, values in given.items()}
    try:
        answer: Any = function(**part)
        if not isinstance(answer, Iterable):
            raise _Malformed("wrong_type", f"{answer!r} is no list of scores")
        answers: list[Any] = list(answer)
        if len(answers) != len(span):
            raise _Malformed("wrong_length", f"{len(answers)} scores for {len(span)} completions")
        return answers
    except Exception as error:  # noqa: BLE001  the reward is somebody else's code: name its error
        if len(span) == 1:
            return [error]
    return [_answers(function, given, range(i, i + 1))[0] for i in span]


class _Malformed(Exception):
    """The reward answered, but not with one score for each completion."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def _checked(answer: Any) -> float | tuple[Reason, str] | None:
    if answer is None:
        return None
    if isinstance(answer, _Malformed):
        return answer.reason, str(answer)
    if isinstance(answer, Exception):
        return "exception", f"{type(answer).__name__}: {answer}"
    if isinstance(answer, bool | np.bool_) or not isinstance(answer, Real):
        return "wrong_type", f"{answer!r} is no number"
    try:
        score = float(answer)
    except OverflowError:  # an int beyond fp64
        return "not_finite", "it answered a number too large for fp64"
    if not math.isfinite(score):
        return "not_finite", f"it answered {score}"
    return score
