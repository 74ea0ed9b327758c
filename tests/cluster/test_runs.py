"""Whole runs through the command, on a real local Ray with DeepSpeed ranks: equality and survival."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.checkpoints import latest
from cluster.launch import run_locally
from cluster.ray_cluster import connected
from cluster.reward_actors import RayScorer
from recipes.derived import needed
from recipes.schema import Recipe
from recipes.source import load

STEPS = 6
SETTINGS = [
    f"steps={STEPS}",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.batch_size=8",
    "rollout.steps=6",
    "rl.minibatches=2",
    "evaluation.every=6",
    "evaluation.samples=40",
    "checkpoints.every=2",
    "checkpoints.keep_last=9",
    "tracking=[]",
    "evaluation.rewards=[{kind: digit_held_out}]",
]


def command(path: Path, *arguments: str) -> list[str]:
    sets = [part for s in [*SETTINGS, f"run_dir={path}"] for part in ("--set", s)]
    return [sys.executable, "-c", "from cluster.cli import main; main()", "run",
            "digits/flash_grpo", *sets, *arguments]  # fmt: skip


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    log = (path / "output.txt").open("a")
    return subprocess.Popen(
        command(path, *arguments),
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], path: Path) -> Path:
    assert process.wait(timeout=240) == 0, (path / "output.txt").read_text()[-3000:]
    return path / "digits-flash-grpo"


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def numbers(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows without what a clock decides."""
    timed = (
        "time",
        "busy/",
        "idle/",
        "cost/seconds",
        "cost/actor_seconds",
        "drift/",
        "rollout/restarts",
    )
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(run, kind)]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(rows(run)) < step:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step_{STEPS:06d}" / "optimizer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    return finish(start(path), path)


def test_a_run_leaves_what_it_promises(undisturbed: Path):
    assert len(rows(undisturbed)) == STEPS
    assert [row["step"] for row in rows(undisturbed, "evaluation")] == [0, STEPS]
    for name in ("recipe.yaml", "versions.json", "data.sha256", "report.html"):
        assert (undisturbed / name).stat().st_size > 0
    assert (undisturbed / "samples" / "step_000006" / "grid.png").exists()
    logs = {p.name for p in (undisturbed / "logs" / "attempt-1").iterdir()}
    assert {"driver.log", "learner-0.log", "rollout-1.log", "reward-digit_log_prob-0.log"} <= logs
    output = (undisturbed.parent / "output.txt").read_text().splitlines()
    assert any("digit_held_out/mean" in line and "->" in line for line in output[-6:])
    assert output[-1].startswith("report: ")


def test_the_ratio_is_exactly_one_through_the_actors(undisturbed: Path):
    first = rows(undisturbed)[0]
    assert first["drift/exact"] == 1.0
    assert first["drift/ratio_p99"] == 0.0


def test_one_process_gives_the_same_curve(undisturbed: Path, tmp_path: Path):
    """No Ray, no DeepSpeed, one worker, one rank: the same rollouts, the same curve."""
    from rich.console import Console

    overrides = [*SETTINGS, "learner.ranks=1", "workers.count=1"]
    recipe = load(Path("digits/flash_grpo"), Recipe, overrides).value
    run_locally(recipe, tmp_path / "local", Console(quiet=True))
    here, there = numbers(tmp_path / "local"), numbers(undisturbed)
    assert here[0]["reward/digit_log_prob/mean"] == there[0]["reward/digit_log_prob/mean"]
    for mine, theirs in zip(here, there, strict=True):
        for key in ("reward/digit_log_prob/mean", "grad_norm", "loss", "zero_std_ratio"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-2, abs=2e-4), key
    ends = [numbers(r, "evaluation")[-1] for r in (tmp_path / "local", undisturbed)]
    assert ends[0]["evaluation/digit_log_prob/mean"] == pytest.approx(
        ends[1]["evaluation/digit_log_prob/mean"], abs=5e-3
    )


@pytest.mark.slow
def test_killed_actors_cost_nothing_but_time(undisturbed: Path, tmp_path: Path):
    process = start(tmp_path)
    run = tmp_path / "digits-flash-grpo"
    wait_for_step(run, 1, process)
    os.kill(children(process, "ray::RolloutWorker")[0].pid, signal.SIGKILL)
    wait_for_step(run, 2, process)
    for child in children(process, "ray::RewardWorker"):
        os.kill(child.pid, signal.SIGKILL)
    finish(process, tmp_path)
    assert numbers(run) == numbers(undisturbed)
    assert numbers(run, "evaluation") == numbers(undisturbed, "evaluation")
    assert weights(run) == weights(undisturbed)
    log = (run / "logs" / "attempt-1" / "driver.log").read_text()
    assert "quarantined" in log


def test_a_killed_run_resumes_to_the_same_bytes(undisturbed: Path, tmp_path: Path):
    process = start(tmp_path)
    run = tmp_path / "digits-flash-grpo"
    wait_for_step(run, 3, process)
    for child in [psutil.Process(process.pid), *children(process, "")]:
        child.kill()
    process.wait()
    found = latest(run / "checkpoints")
    assert found is not None and found.step in (2, 4)
    finish(start(tmp_path, "--resume", str(run)), tmp_path)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert numbers(run) == numbers(undisturbed)
    assert weights(run) == weights(undisturbed)


@pytest.mark.slow
def test_a_killed_learner_rank_is_rebuilt(undisturbed: Path, tmp_path: Path):
    process = start(tmp_path)
    run = tmp_path / "digits-flash-grpo"
    wait_for_step(run, 3, process)
    os.kill(children(process, "ray::RankActor")[0].pid, signal.SIGKILL)
    finish(process, tmp_path)
    assert numbers(run) == numbers(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_another_recipe_does_not_continue_a_run(undisturbed: Path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    arguments = command(undisturbed.parent, "--resume", str(undisturbed), "--set", "seed=1")
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "begun with another seed" in result.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_local_cluster_has_the_cores_that_rewards_reserve(digits_recipe, tmp_path: Path):
    rewards = ["rewards=[{kind: ink, cpus: 1}]", "evaluation.rewards=[]"]
    recipe = digits_recipe(*rewards, "cluster.start_timeout=60")
    with connected(recipe):
        RayScorer(recipe, str(tmp_path)).start()
        whole = needed(recipe, "cpus")
        assert ray.cluster_resources()["CPU"] == whole >= 1 + recipe.workers.count
