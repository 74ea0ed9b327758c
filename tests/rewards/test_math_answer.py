"""Mathematical answers: where the answer is found, what is equivalent, and what time it may take."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rewards.calling import call_reward
from rewards.contract import SetMetric
from rewards.math_answer import MathAnswerReward, MathAnswers, final_answer, well_formed


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswers]:
    """One comparing process for all tests."""
    built = MathAnswerReward(time_limit=0.5).build()
    assert isinstance(built, MathAnswers)
    yield built


def scores(reward: MathAnswers, texts: list[str], gold: list[Any]) -> list[float | None]:
    return reward(["p"] * len(texts), texts, answer=gold, other=[None] * len(texts))


EQUIVALENT = [
    ("72", "72"),
    (72, "72.0"),
    (0.5, "\\frac12"),
    ("72", "72 clips"),
    ("72", "**72**"),
    ("72", "She sold 72 clips."),
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("18", "\\$18.00"),
    ("\\frac{1}{2}", "1/2"),
    ("50\\%", "50%"),
    ("\\text{Evelyn}", "Evelyn"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("10\\text{ cm}", "10"),
    ("\\{1,2\\}", "2, 1"),
    ("11\\sqrt{5}+11", "11(1+\\sqrt{5})"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(-\\infty,3)\\cup(4,5]", "x \\in (-\\infty, 3) \\cup (4, 5]"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("-5", "−5"),
    ("3", "\n$$\n3\n$$\n"),
]
DIFFERENT = [
    ("72", "27"),
    ("72", ""),
    ("13", "11 and 12 and 13"),
    ("13", "12, 13"),
    ("5", "sqrt 5"),
    ("5", "\\sqrt{5}"),
    ("2", "2xy"),
    ("(1,2]", "[1,2]"),
    ("\\frac{1}{2}", "\\frac{1}{2}+(("),
    ("\\text{Evelyn}", "Briana"),
    ("x^2+2x+1", "(x-1)^2"),
    ("5", "It is hard to say"),
]


def test_equivalent_answers_score_one_and_others_nothing(reward: MathAnswers):
    for mark in ("<answer>{}</answer>", "so \\boxed{{{}}}."):
        gold = [pair[0] for pair in (*EQUIVALENT, *DIFFERENT)]
        texts = [mark.format(pair[1]) for pair in (*EQUIVALENT, *DIFFERENT)]
        got = scores(reward, texts, gold)
        wrong = [
            (pair, score, mark)
            for pair, score in zip((*EQUIVALENT, *DIFFERENT), got, strict=True)
            if score != float(pair in EQUIVALENT)
        ]
        assert wrong == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("it is 5", None),
        ("\\boxed{4} <answer>5</answer> \\boxed{6}", "5"),
        ("<answer>4</answer><answer>It is \\boxed{\\frac{5}{2}}.</answer>", "\\frac{5}{2}"),
        ("<answer></answer> \\boxed{6}", ""),
        ("\\boxed{4} and \\boxed {\\{5\\}}", "\\{5\\}"),
        ("\\boxed{\n\\frac{1}{2}\n} and \\boxed{5", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("} { \\boxed{5} }", "5"),
        ("\\boxed{4}" + "x" * 50_000, None),
    ],
)
def test_the_block_goes_before_the_box_and_the_last_closed_one_counts(
    text: str, answer: str | None
):
    assert final_answer(text) == answer


def test_unmarked_answers_are_looked_for_at_the_end_of_the_text(reward: MathAnswers):
    texts = [
        "First 3 + 4 = 7. Therefore the final answer is $\\frac{7}{2}$.",
        "She sells 9 eggs, so she makes 18 dollars",
        "The answer is 18" + " and so on" * 300,
        "no number",
        "\\boxed{18} is what I thought, but then <answer>19</answer>",
    ]
    assert scores(reward, texts, ["3.5", "18", "18", "18", "18"]) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        ("<answer>5</answer>", True),
        ("because\n<answer>\n3x +\n2\n</answer>\n", True),
        ("<answer>\\boxed{5}</answer> \\boxed{4}", True),
        ("<answer>5", False),
        ("<answer> \n </answer>", False),
        ("</answer>5<answer>", False),
        ("<answer>4</answer><answer>5</answer>", False),
        ("</answer> \\boxed{5}", False),
        ("so \\boxed{\n5\n}", True),
        ("\\boxed{}", False),
        ("\\boxed{4} \\boxed{5}", False),
        ("\\boxed{5", False),
        ("5", False),
    ],
)
def test_exactly_one_marked_answer_is_well_formed(text: str, formed: bool):
    assert well_formed(text) is formed


def test_the_format_term_is_added_with_its_weight(reward: MathAnswers):
    built = MathAnswerReward(format_weight=0.25).build()
    assert isinstance(built, MathAnswers)
    built.comparer = reward.comparer
    texts = ["<answer>5</answer>", "<answer>6</answer>", "<answer>5", "5"]
    assert scores(built, texts, ["5"] * 4) == [1.25, 0.25, 1.0, 1.0]


HOSTILE = [
    "9**9**9",
    "<answer>9**9**9</answer>",
    "\\boxed{9^{9^{9^9}}}",
    "<answer>9^{9^9}</answer>",
    "\\boxed{(10^9)!}",
    "\\boxed{\\binom{1000000000}{500000000}}",
    "\\dfrac{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)} - 4\\right)} - 5}{16}",
    "<answer>" + "(" * 400 + "5" + ")" * 401 + "</answer>",
    "{" * 100_000 + "}" * 100_000,
    "\\boxed{" * 100_000,
    "\\boxed{" * 100_000 + "5" + "}" * 100_000,
    "<answer>" * 100_000,
    "<answer>" + "{" * 100_000,
    "$" * 100_000,
    "answer " * 20_000,
    "٥" * 10_000,
    "5\0" * 10_000 + "\ud800",
    "<answer>é٥\0\ud800\n</answer>",
    "1 " * 500_000,
    "<answer>\\{__import__('os').system('exit 1')\\}</answer>",
]


def test_hostile_texts_score_nothing_in_bounded_time_and_leave_the_reward_working():
    built = MathAnswerReward(time_limit=0.3).build()
    texts = [*HOSTILE, "<answer>4.0</answer>"]
    got: list[Any] = []

    def serve() -> None:
        columns = {"answer": ["4"] * len(texts)}
        got.append(call_reward("math", built, ["p"] * len(texts), texts, columns, 64))

    started = time.perf_counter()
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert got[0].failures == ()
    assert got[0].values.tolist() == [0.0] * len(HOSTILE) + [1.0]
    # CPU seconds are bounded by 0.3 each; the rest is for a start and a busy computer.
    assert time.perf_counter() - started < 30


def test_a_comparison_beyond_the_limit_counts_as_wrong_and_a_longer_limit_lets_it_end():
    text = "<answer>9^{1999999} \\cdot 9</answer>"  # a second of one multiplication
    for limit, score in ((0.15, 0.0), (60.0, 1.0)):
        built = MathAnswers(time_limit=limit)
        started = time.process_time()
        assert scores(built, [text, "<answer>2/4</answer>"], ["9^{2000000}", "0.5"]) == [score, 1]
        assert time.process_time() - started < 0.15  # the work is done elsewhere


def test_a_lost_process_is_replaced(reward: MathAnswers):
    assert scores(reward, ["<answer>4/8</answer>"], ["0.5"]) == [1.0]
    lost = reward.comparer.process
    assert lost is not None
    lost.kill()
    lost.wait()
    assert scores(reward, ["<answer>4/8</answer>"], ["0.5"]) == [1.0]
    assert reward.comparer.process is not lost


def test_the_process_ends_with_the_reward():
    built = MathAnswers()
    assert scores(built, ["<answer>4/8</answer>"], ["0.5"]) == [1.0]
    process = built.comparer.process
    assert process is not None and process.poll() is None
    del built
    gc.collect()
    assert process.returncode is not None


def test_equal_texts_need_no_process_and_equal_pairs_are_compared_once(reward: MathAnswers):
    fresh = MathAnswers()
    assert scores(fresh, ["<answer>5</answer>", "\\boxed{ 5 }"], ["5", "$5$"]) == [1.0, 1.0]
    assert fresh.comparer.process is None
    started = time.perf_counter()
    slow = ["\\boxed{9^{9^9}}"] * 64
    assert scores(reward, slow, ["5"] * 64) == [0.0] * 64
    assert time.perf_counter() - started < 16  # 64 times the limit is 32 s


def test_global_random_states_are_left_alone(reward: MathAnswers):
    before, numbers = random.getstate(), np.random.get_state(legacy=False)
    scores(reward, ["<answer>(x+1)^2</answer>"], ["x^2+2x+1"])
    assert random.getstate() == before
    np.testing.assert_equal(np.random.get_state(legacy=False), numbers)


def test_a_set_is_described_by_accuracy_whatever_the_format_is_worth(reward: MathAnswers):
    assert isinstance(reward, SetMetric)
    built = MathAnswers(format_weight=1.0)
    built.comparer = reward.comparer
    texts = ["<answer>5.0</answer>", "<answer>6</answer>", "\\boxed{5}", "so 5"]
    described = built.describe_set(["p"] * 4, texts, answer=["5"] * 4)
    assert described == {"accuracy": 0.75, "answered_rate": 0.75}


@pytest.mark.parametrize("gold", ["", "  ", None, True, [5], "x" * 1001, "\\boxed{}"])
def test_a_malformed_gold_answer_costs_its_own_sample_and_is_named(reward: MathAnswers, gold: Any):
    texts = ["<answer>5</answer>"] * 3
    with pytest.raises(ValueError, match="sample 1: column 'answer'"):
        scores(reward, texts, ["5", gold, "5"])
    called = call_reward("math", reward, ["p"] * 3, texts, {"answer": ["5", gold, "5"]}, 64)
    assert [failure.index for failure in called.failures] == [1]


def test_a_missing_library_is_a_problem_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    assert MathAnswerReward().problem() is None
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert "pip install 'rectify[math]'" in (MathAnswerReward().problem() or "")


def test_the_module_and_its_check_import_no_mathematics():
    code = (
        "import sys; from rewards.math_answer import MathAnswerReward as M; M().problem(); "
        "import rewards.sudoku, rewards.countdown; "
        "print([m for m in ('math_verify', 'sympy', 'numpy', 'torch') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
