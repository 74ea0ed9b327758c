"""Rewards from elsewhere: TRL's own, factories, classes, entry points; names that lead nowhere."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from trl.rewards import think_format_reward

from rewards.calling import call_reward
from rewards.catalogue import RewardConfig
from rewards.contract import DifferentiableReward, SetMetric
from rewards.plugins import FunctionReward

MODULE = """
class Threshold:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, prompts, completions, **columns):
        return [float(x > self.limit) for x in completions]

    def describe_set(self, prompts, completions, **columns):
        return {"share": sum(x > self.limit for x in completions) / len(completions)}


def scaled(completions, scale=1.0):
    return [scale * x for x in completions]


NUMBER = 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path with a module ``mine`` and a package that raises when it runs."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "__init__.py").write_text("raise RuntimeError('it ran')")
    (tmp_path / "loud" / "inner.py").write_text("def score(completions):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def declare(site: Path, package: str, line: str) -> None:
    """An installed distribution with an entry point."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[rectify.rewards]\n{line}\n")


def scores(reward: FunctionReward, completions: list[Any], **columns: list[Any]) -> list[float]:
    prompts = ["p"] * len(completions)
    got = call_reward("r", reward.build(), prompts, completions, columns, 2)
    assert got.failures == ()
    return got.values.tolist()


@pytest.mark.parametrize(
    "path", ["trl.rewards:think_format_reward", "trl.rewards.think_format_reward"]
)
def test_a_trl_reward_plugs_in_unchanged(path: str):
    completions = [
        [{"role": "assistant", "content": text}]
        for text in ("<think>\na\n</think>\nb", "b", "<think>a</think>", "<think>a")
    ]
    reward = FunctionReward(path=path)
    assert reward.problem() is None
    assert scores(reward, completions, solution=["x"] * 4) == think_format_reward(completions)
    assert scores(reward, completions) == [1.0, 0.0, 1.0, 0.0]


def test_a_trl_factory_makes_its_reward_with_the_arguments():
    reward = FunctionReward(
        path="trl.rewards:get_soft_overlong_punishment",
        arguments={"max_completion_len": 10, "soft_punish_cache": 4},
    )
    ids = [[1] * length for length in (6, 8, 20)]
    assert scores(reward, ["a", "b", "c"], completion_ids=ids) == [0.0, -0.5, -1.0]
    repeated = FunctionReward(path="trl.rewards:get_repetition_penalty_reward")
    assert scores(repeated, ["a"], completion_ids=[[1, 2, 3, 4]]) == [0.0]


def test_a_class_is_made_with_the_arguments_and_keeps_its_set_metrics(site: Path):
    reward = FunctionReward(path="mine:Threshold", arguments={"limit": 2})
    assert scores(reward, [1, 2, 3]) == [0.0, 0.0, 1.0]
    built = reward.build()
    assert isinstance(built, SetMetric)
    assert built.describe_set(["p"] * 4, [1, 2, 3, 4]) == {"share": 0.5}


def test_a_function_is_called_with_the_arguments(site: Path):
    assert scores(FunctionReward(path="mine.scaled"), [1, 2, 3]) == [1, 2, 3]
    tenfold = FunctionReward(path="mine:scaled", arguments={"scale": 10.0})
    assert scores(tenfold, [1, 2, 3]) == [10, 20, 30]


def test_an_entry_point_is_found_by_its_name(site: Path):
    declare(site, "some-rewards", "threshold.v1 = mine:Threshold")
    reward = FunctionReward(path="threshold.v1", arguments={"limit": 0})
    assert reward.problem() is None
    assert scores(reward, [-1, 1]) == [0.0, 1.0]
    problem = FunctionReward(path="treshold").problem()
    assert problem is not None and "did you mean 'threshold.v1'?" in problem


def test_two_packages_with_one_name_are_refused(site: Path):
    declare(site, "some-rewards", "same = mine:Threshold")
    declare(site, "other-rewards", "same = mine:scaled")
    with pytest.raises(ValueError, match="several packages declare a reward 'same'"):
        FunctionReward(path="same").build()


def test_looking_for_a_reward_runs_nothing(site: Path):
    assert FunctionReward(path="loud.inner:score").problem() is None
    assert FunctionReward(path="mine:scaled").problem() is None
    assert not {"loud", "loud.inner", "mine"} & set(sys.modules)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nowhere", ("no entry point 'nowhere'", "package.module:attribute")),
        ("nowhere_at_all:f", ("module 'nowhere_at_all'", "PYTHONPATH")),
        ("mien:scaled", ("module 'mien'", "did you mean 'mine'?")),
        ("trl.rewrads:f", ("module 'trl.rewrads'", "did you mean 'trl.rewards'?")),
        ("loud.iner.score", ("module 'loud.iner'", "did you mean 'loud.inner'?")),
        ("mine:scalled", ("no attribute 'scalled'", "did you mean 'scaled'?")),
        ("mine.Treshold", ("no attribute 'Treshold'", "did you mean 'Threshold'?")),
        ("mine.py:f", ("module 'mine.py'", "not importable")),
        ("a b:f", ("module 'a b'", "not importable")),
    ],
)
def test_a_name_that_leads_nowhere_is_told_with_a_remedy(
    site: Path, path: str, parts: tuple[str, ...]
):
    problem = FunctionReward(path=path).problem()
    assert problem is not None
    for part in parts:
        assert part in problem


def test_a_module_that_makes_its_names_as_it_runs_is_given_the_benefit(site: Path):
    (site / "lazy.py").write_text("def __getattr__(name):\n    return max\n")
    assert FunctionReward(path="lazy:anything").problem() is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine:NUMBER", "'mine:NUMBER' is not callable"),
        ("mine:absent", "mine has no attribute 'absent'"),
        ("absent", "no entry point 'absent'"),
    ],
)
def test_building_what_is_not_there_says_so(site: Path, path: str, message: str):
    with pytest.raises(ValueError, match=message):
        FunctionReward(path=path).build()


def test_the_kind_chooses_the_reward_and_every_option_is_checked():
    adapter: TypeAdapter[Any] = TypeAdapter(RewardConfig)
    reward = adapter.validate_python({"kind": "function", "path": "mine:f", "weight": 0.5})
    assert reward == FunctionReward(path="mine:f", weight=0.5)
    for kind in ("digit_log_prob", "digit_held_out", "ink"):
        assert adapter.validate_python({"kind": kind}).kind == kind
    for wrong in (
        {"wieght": 1},
        {"weight": np.inf},
        {"weight": np.nan},
        {"replicas": 0},
        {"deadline": 0},
        {"max_failures": 1.1},
        {"name": "a/b"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python({"kind": "ink", **wrong})


def test_reading_a_recipe_s_rewards_loads_no_heavy_library():
    code = """
        import sys
        import rewards.catalogue
        heavy = {"torch", "sklearn", "scipy", "PIL", "safetensors", "ray", "trl"}
        sys.exit(", ".join(sorted(heavy & set(sys.modules))) or None)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


class Brightness:
    """A reward with both forms."""

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return [float(media.mean()) / 255 for media in completions]

    def differentiable(self, prompts: list[str], pixels: Any, **columns: Any) -> Any:
        return pixels.flatten(1).mean(1)


def test_a_function_may_promise_a_gradient_and_must_have_it() -> None:
    own = FunctionReward(path=f"{__name__}:Brightness", gradient=True)
    assert own.has_gradient() and isinstance(own.build(), DifferentiableReward)
    assert not FunctionReward(path=f"{__name__}:Brightness").has_gradient()
    with pytest.raises(ValueError, match="no method differentiable"):
        FunctionReward(path="json:dumps", gradient=True).build()
