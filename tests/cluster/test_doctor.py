"""``rectify doctor``: every reward of the catalogue, what it lacks here, and within a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal, get_args

import pytest
from pydantic import Field
from typer.testing import CliRunner

from cluster import doctor
from cluster.cli import app
from cluster.doctor import diagnose, hub_names, is_cached, readiness
from rewards.aesthetic import Aesthetic
from rewards.catalogue import RewardConfig
from rewards.clip_score import ClipScore, PickScore
from rewards.contract import RewardFunction, RewardSettings
from rewards.environment import names as environments
from rewards.marginal import Marginal
from rewards.ocr import Ocr
from rewards.sudoku import SudokuReward


class Elsewhere(RewardSettings, frozen=True, extra="forbid"):
    """A reward that needs an environment, a GPU and a field."""

    environment: ClassVar[str | None] = environments()[0]
    kind: Literal["elsewhere"] = "elsewhere"
    model: str = Field(description="A hub id.")
    gpus: float = Field(default=1.0)

    def build(self) -> RewardFunction:
        raise NotImplementedError


class OnGpu(RewardSettings, frozen=True, extra="forbid"):
    """A reward that needs a GPU alone."""

    kind: Literal["on_gpu"] = "on_gpu"
    gpus: float = Field(default=2.0)

    def build(self) -> RewardFunction:
        raise NotImplementedError


@pytest.fixture
def no_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path / "environments"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, repository: str) -> None:
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_every_reward_of_the_catalogue_has_a_line():
    facts, wrong = diagnose()
    kinds = [k.model_fields["kind"].default for k in get_args(get_args(RewardConfig)[0])]
    said = dict(facts)
    assert [name for name, _ in facts if name.startswith("reward ")] == [
        f"reward {kind}" for kind in kinds
    ]
    assert len(kinds) > 10 and wrong == []
    assert said["reward digit_log_prob"] == "ready"
    assert all(said[f"reward {kind}"].startswith(("ready", "not here", "needs")) for kind in kinds)


def test_fields_that_a_recipe_has_to_give_are_named():
    assert readiness(SudokuReward) == "ready"
    assert readiness(Marginal) == "needs base, target in the recipe"


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    assert readiness(Ocr).startswith("not here: rapidocr-onnxruntime is not installed: pip install")


def test_a_missing_environment_and_gpu_are_told(
    no_environments: None, monkeypatch: pytest.MonkeyPatch
):
    name = environments()[0]
    words = f"run 'rectify env create {name}'; needs model in the recipe"
    assert readiness(Elsewhere).startswith("not here: ") and readiness(Elsewhere).endswith(words)
    monkeypatch.setattr(doctor, "gpu_count", lambda: 1)
    assert readiness(OnGpu) == "not here: it takes 2 GPUs and this machine has 1"
    monkeypatch.setattr(doctor, "gpu_count", lambda: 2)
    assert readiness(OnGpu) == "ready"


def test_weights_of_the_hub_are_named_until_they_are_cached(cache: Path):
    clip = "openai/clip-vit-large-patch14"
    assert readiness(ClipScore) == f"ready; fetched from the hub at first: {clip}"
    put(cache, clip)
    assert is_cached(clip) and readiness(ClipScore) == "ready"
    head = "trl-lib/ddpo-aesthetic-predictor"
    assert readiness(Aesthetic) == f"ready; fetched from the hub at first: {head}"
    put(cache, head)
    assert readiness(Aesthetic) == "ready"


def test_only_names_of_the_hub_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(hub_names(PickScore())) == 2
    assert hub_names(ClipScore(prefix="a/b")) == ["openai/clip-vit-large-patch14"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "clip").mkdir(parents=True)
    assert hub_names(ClipScore(model="own/clip")) == []
    assert hub_names(ClipScore(model="./clip")) == []


def test_the_answer_needs_neither_torch_nor_network_and_comes_at_once():
    code = """
import sys, time
started = time.process_time()
from cluster.doctor import diagnose
diagnose()
spent = time.process_time() - started
heavy = {"torch", "transformers", "datasets", "av", "ray", "sklearn"} & set(sys.modules)
sys.exit(f"{sorted(heavy)} {spent:.1f} s" if heavy or spent > 2 else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_remedies_are_printed_with_their_brackets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "pip install 'rectify[ocr]'" in result.stdout
