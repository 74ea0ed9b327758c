"""Which mistake of a reward is called what, and what its signature is given."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest

from rewards.calling import RewardFailed, Scores, call_reward, check_failures
from rewards.ink import Ink

PROMPTS = [f"prompt {i}" for i in range(7)]


def call(function: Any, batch_size: int = 3, **columns: list[Any]) -> Scores:
    return call_reward("r", function, PROMPTS, list(range(7)), columns, batch_size)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (np.float32("inf"), "not_finite"),
        (10**400, "not_finite"),
        (np.bool_(False), "wrong_type"),
        ([1.0], "wrong_type"),
        (1j, "wrong_type"),
    ],
)
def test_what_is_no_finite_number_masks_its_own_sample_alone(answer: Any, reason: str):
    scores = call(lambda completions: [answer if x == 4 else float(x) for x in completions])
    (failure,) = scores.failures
    assert (failure.reward, failure.prompt, failure.index) == ("r", "prompt 4", 4)
    assert failure.reason == reason
    assert np.isnan(scores.values[4])
    assert np.delete(scores.values, 4).tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("answer", [2, np.float32(2), np.int64(2)])
def test_every_real_number_is_a_score(answer: Any):
    assert call(lambda completions: [answer] * len(completions)).values.tolist() == [2.0] * 7


def test_an_array_of_scores_is_a_list_of_scores():
    values = call(lambda completions: np.array(completions, np.float32)).values
    assert values.tolist() == list(range(7))


def test_only_the_batch_with_the_poison_is_repeated():
    batches: list[list[int]] = []

    def poisoned(completions: list[int]) -> list[float]:
        batches.append(completions)
        if 4 in completions:
            raise KeyError("no such aesthetic")
        return [float(x) for x in completions]

    assert [failure.index for failure in call(poisoned).failures] == [4]
    assert batches == [[0, 1, 2], [3, 4, 5], [3], [4], [5], [6]]


def test_a_forgotten_return_is_named():
    scores = call(lambda completions: None)
    assert {failure.reason for failure in scores.failures} == {"wrong_type"}
    assert len(scores.failures) == 7


def test_var_keywords_get_everything_and_a_short_signature_only_what_it_names():
    seen: list[set[str]] = []

    def everything(**given: Any) -> list[float]:
        seen.append(set(given))
        return [0.0] * len(given["completions"])

    assert call(everything, digit=[1] * 7, direction=["up"] * 7).failures == ()
    assert seen[0] == {"prompts", "completions", "digit", "direction"}
    only = call(lambda completions, digit: [float(d) for d in digit], digit=[5] * 7, other=[0] * 7)
    assert only.values.tolist() == [5.0] * 7


def test_a_callable_without_a_readable_signature_is_called_and_its_error_named():
    scores = call(min)
    assert scores.failures[0].reason == "exception"
    assert "TypeError" in scores.failures[0].message


def test_failures_are_tolerated_up_to_exactly_their_share():
    def two_fail(completions: list[int]) -> list[float]:
        if completions[0] in (2, 5):
            raise OSError("disk on fire")
        return [1.0] * len(completions)

    scores = call(two_fail, batch_size=1)
    check_failures(scores, Ink(max_failures=2 / 7), "mine")
    with pytest.raises(RewardFailed) as caught:
        check_failures(scores, Ink(max_failures=0.28), "mine")
    for part in ("'mine'", "2 of 7", "prompt 2", "sample 2", "OSError: disk on fire"):
        assert part in str(caught.value)


def test_not_scored_counts_as_no_failure():
    scores = call(lambda completions: [None] * len(completions))
    assert scores.not_scored == 7
    check_failures(scores, Ink(max_failures=0), "mine")


def test_scores_cross_processes_even_when_the_exception_would_not():
    class Local(Exception):
        """Not importable elsewhere, so no other process could rebuild it."""

    def broken(completions: list[int]) -> list[float]:
        raise Local("only text survives")

    here, there = Pipe()
    here.send(call(broken))
    assert there.poll(5)
    assert there.recv().failures[6].message == "Local: only text survives"
