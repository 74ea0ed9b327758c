"""A reward's mistakes are named and masked; a TRL reward plugs in unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rewards.calling import RewardFailed, call_reward, check_failures
from rewards.ink import Ink
from rewards.plugins import FunctionReward

PROMPTS = ["a", "b", "c", "d"]


def call(function: Any, completions: list[Any] | None = None, batch_size: int = 4, **columns: Any):
    return call_reward("mine", function, PROMPTS, completions or [1, 2, 3, 4], columns, batch_size)


def test_scores_none_and_columns():
    def reward(prompts: list[str], completions: list[int], bonus: list[int]) -> list[float | None]:
        return [
            None if p == "b" else c + b for p, c, b in zip(prompts, completions, bonus, strict=True)
        ]

    scores = call(reward, bonus=[10, 10, 10, 10], unknown=[0, 0, 0, 0])
    np.testing.assert_array_equal(scores.values, [11, np.nan, 13, 14])
    assert scores.not_scored == 1
    assert scores.failures == ()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (float("nan"), "not_finite"),
        (float("inf"), "not_finite"),
        (True, "wrong_type"),
        ("1", "wrong_type"),
    ],
)
def test_answers_that_are_no_scores(answer: Any, reason: str):
    scores = call(lambda prompts, completions: [1.0, answer, 1.0, 1.0])
    assert [f.reason for f in scores.failures] == [reason]
    assert scores.failures[0].prompt == "b"
    assert np.isnan(scores.values[1])


def test_a_poison_sample_costs_only_itself():
    def reward(prompts: list[str], completions: list[int]) -> list[float]:
        return [1 / (c - 3) for c in completions]

    scores = call(reward)
    assert [f.index for f in scores.failures] == [2]
    assert "ZeroDivisionError" in scores.failures[0].message
    np.testing.assert_allclose(scores.values[[0, 1, 3]], [-0.5, -1.0, 1.0])


def test_a_wrong_number_of_scores_is_named():
    scores = call(lambda prompts, completions: [1.0, 2.0])
    assert {f.reason for f in scores.failures} == {"wrong_length"}


def test_batches_do_not_change_scores():
    whole = call(lambda prompts, completions: [float(c) for c in completions])
    halves = call(lambda prompts, completions: [float(c) for c in completions], batch_size=3)
    np.testing.assert_array_equal(whole.values, halves.values)


def test_too_many_failures_stop_with_the_reward_s_own_words():
    def reward(prompts: list[str], completions: list[int]) -> list[float]:
        raise LookupError("weights/model.bin is missing")

    scores = call(reward)
    with pytest.raises(
        RewardFailed, match=r"'mine' failed on 4 of 4 .*weights/model.bin is missing"
    ):
        check_failures(scores, Ink(), "mine")
    check_failures(scores, Ink(max_failures=1.0), "mine")


def test_a_trl_reward_plugs_in_unchanged():
    config = FunctionReward(path="trl.rewards:think_format_reward")
    assert config.problem() is None
    completions = [
        [{"content": t}] for t in ("<think>a</think>b", "b", "<think>", "<think>\n</think>x")
    ]
    scores = call(config.build(), completions)
    assert scores.failures == ()
    assert scores.values.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_name_that_leads_nowhere_is_a_problem_not_a_crash():
    assert "not importable" in (FunctionReward(path="no_such_module.x:f").problem() or "")
    assert "no entry point" in (FunctionReward(path="no_such_entry").problem() or "")
    with pytest.raises(ValueError, match="no attribute 'nothing'"):
        FunctionReward(path="math:nothing").build()
