"""Rewards in an environment of their own, on a real Ray: the same scores, nothing else of the platform.

The environment is made of links to the platform's libraries, without the platform, and with a module
that is nowhere else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cluster.local import LocalScorer
from cluster.ray_cluster import ClusterError, connected
from cluster.reward_actors import RayScorer
from recipes.schema import Recipe
from rewards import environment
from rewards.calling import RewardFailed
from rewards.contract import RewardSettings
from rewards.serving import EnvironmentProcess
from rl.contracts import Sampled, Scored
from rollout.draws import Group
from rollout.masked import TextSummary

ONLY_HERE = """
import os
def count(completions):
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise RuntimeError("GPUs can be seen")
    return [float(media.sum()) for media in completions]
"""
REWARDS = [
    "rewards=[{kind: ink}, {kind: function, path: only_here.count, name: count}]",
    "evaluation.rewards=[{kind: digit_held_out}]",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment called hpsv2 that is ready, which every reward has."""
    root = tmp_path_factory.mktemp("with spaces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECTIFY_ENVIRONMENTS", str(root))
        directory = environment.place_of("hpsv2")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        (site,) = directory.glob("lib/python*/site-packages")
        for library in Path(torch.__file__).parents[1].iterdir():
            if "rectify" not in library.name and not (site / library.name).exists():
                (site / library.name).symlink_to(library)
        (site / "only_here.py").write_text(ONLY_HERE)
        marker = environment.requirements("hpsv2").marker
        (directory / environment.MARKER).write_text(json.dumps(marker))
        patch.setattr(RewardSettings, "environment", "hpsv2")
        yield directory


@pytest.fixture(scope="module")
def served(
    place: Path, digits_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RayScorer, list[int]]]:
    recipe = digits_recipe(*REWARDS)
    with connected(recipe):
        scorer = RayScorer(recipe, str(tmp_path_factory.mktemp("logs")))
        yield scorer, scorer.start()


def samples() -> list[Sampled]:
    generator = np.random.default_rng(0)
    found: list[Sampled] = []
    for number in range(3):
        group = Group(1, number, f"p{number}", f"the digit {number}", {"digit": number}, 4, number)
        media = generator.integers(0, 256, (4, 1, 8, 8, 1), dtype=np.uint8)
        found.append(Sampled(group, number // 2, None, media, TextSummary((), 0), {}, 0, 0.0, 0))
    return found


def values(scored: list[Scored]) -> dict[str, list[float]]:
    return {
        name: np.concatenate([one.scores[name].values for one in scored]).tolist()
        for name in scored[0].scores
    }


def test_scores_are_those_of_the_same_reward_in_process(
    served: tuple[RayScorer, list[int]],
    digits_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
):
    found = values(served[0].score(samples(), held_out=True))
    described = served[0].describe(samples())
    child = LocalScorer(digits_recipe(*REWARDS))
    assert {type(worker) for worker in child.training} == {EnvironmentProcess}
    assert values(child.score(samples(), held_out=True)) == found
    assert child.describe(samples()) == described
    assert len(found["count"]) == 12 and found["count"][0] == samples()[0].media[0].sum()

    monkeypatch.setattr(RewardSettings, "environment", None)
    here = LocalScorer(digits_recipe("rewards=[{kind: ink}]", REWARDS[1]))
    assert here.training[0].health() == os.getpid()
    want = values(here.score(samples(), held_out=True))
    for name in ("ink", "digit_held_out"):
        assert found[name] == pytest.approx(want[name], abs=1e-5)
    assert described == pytest.approx(here.describe(samples()), abs=1e-5)
    assert len(described) > 0


def test_the_death_of_its_process_costs_nothing_but_time(served: tuple[RayScorer, list[int]]):
    before = values(served[0].score(samples()))
    os.kill(served[1][0], signal.SIGKILL)
    assert values(served[0].score(samples())) == before
    assert served[0].start()[0] != served[1][0]


def test_the_rest_of_the_platform_cannot_be_imported_there(
    served: object, digits_recipe: Callable[..., Recipe], tmp_path: Path
):
    """Though it stands in the directory we are in, which Ray puts on every worker's path."""
    worker = "rewards=[{kind: function, path: 'cluster.workers:RewardWorker', name: other}]"
    with pytest.raises(ClusterError, match="No module named 'cluster'") as refused:
        RayScorer(digits_recipe(worker, "name=other"), str(tmp_path)).start()
    assert "reward 'other' did not start" in str(refused.value)
    with pytest.raises(RewardFailed, match="No module named 'cluster'"):
        LocalScorer(digits_recipe(worker))


def test_an_environment_that_is_gone_is_named(
    served: object, digits_recipe: Callable[..., Recipe], tmp_path: Path
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path))
        for kind in (lambda r: RayScorer(r, str(tmp_path)), LocalScorer):
            with pytest.raises(RewardFailed, match="run 'rectify env create hpsv2'"):
                kind(digits_recipe(*REWARDS))
        assert "run 'rectify env create hpsv2'" in (digits_recipe().rewards[0].problem() or "")


def test_a_child_that_dies_fails_its_reward(place: Path, digits_recipe: Callable[..., Recipe]):
    (worker, *_) = LocalScorer(
        digits_recipe("rewards=[{kind: ink}]", "evaluation.rewards=[]")
    ).training
    assert isinstance(worker, EnvironmentProcess)
    pid = worker.health()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RewardFailed, match=r"reward 'ink': its process ended with -9"):
        worker.score(["p"], {}, [np.zeros((1, 4, 4, 1), np.uint8)])


def test_a_child_that_hangs_fails_its_reward(place: Path, digits_recipe: Callable[..., Recipe]):
    rewards = ["rewards=[{kind: ink, deadline: 0.5}]", "evaluation.rewards=[]"]
    (worker,) = LocalScorer(digits_recipe(*rewards)).training
    assert isinstance(worker, EnvironmentProcess)
    os.kill(worker.health(), signal.SIGSTOP)
    with pytest.raises(RewardFailed, match=r"reward 'ink': no answer within 0.5 s \(deadline\)"):
        worker.score(["p"], {}, [np.zeros((1, 4, 4, 1), np.uint8)])
    assert worker.process.wait(10) == -signal.SIGKILL


def test_a_child_ends_with_its_owner(place: Path, digits_recipe: Callable[..., Recipe]):
    scorer: Any = LocalScorer(digits_recipe("rewards=[{kind: ink}]", "evaluation.rewards=[]"))
    process = psutil.Process(scorer.training[0].health())
    del scorer
    assert process.wait(timeout=20) is not None or not process.is_running()
