"""Whole runs on text through the command: Ray, DeepSpeed ranks, decoding and objectives together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.checkpoints import latest
from cluster.launch import run_locally
from recipes.schema import Recipe
from recipes.source import load

STEPS = 4


def even_codes(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random weights can already earn: the share of characters of even code."""
    return [sum(ord(c) % 2 == 0 for c in text) / (1 + len(text)) for text in completions]


def settings(base: Path, *more: str) -> list[str]:
    return [
        f"policy.checkpoint={base}",
        f"steps={STEPS}",
        "prompts={kind: sudoku, count: 32}",
        "rollout.length=12",
        "rollout.block_length=4",
        "rollout.steps=6",
        "rollout.temperature=1.0",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.batch_size=8",
        "rewards=[{kind: function, path: 'tests.cluster.test_text_runs:even_codes', name: even}]",
        "rl.epochs=2",
        "optimizer.learning_rate=1e-3",
        "learner.micro_batch=8",
        "learner.ranks=2",
        "workers.count=2",
        "evaluation.every=4",
        "evaluation.samples=8",
        "evaluation.steps=6",
        "evaluation.prompts={kind: sudoku, split: validation, count: 8}",
        "evaluation.gap={samples: 2, orders: 2}",
        "checkpoints.every=2",
        "checkpoints.keep_best=null",
        "tracking=[]",
        *more,
    ]


def execute(recipe: str, base: Path, path: Path, *more: str, resume: Path | None = None) -> Path:
    sets = [part for s in settings(base, f"run_dir={path}", *more) for part in ("--set", s)]
    arguments = [sys.executable, "-c", "from cluster.cli import main; main()", "run", recipe, *sets]
    if resume is not None:
        arguments += ["--resume", str(resume)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return path / recipe.replace("/", "-").replace("_", "-")


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = (
        "time",
        "busy/",
        "idle/",
        "cost/seconds",
        "cost/actor_seconds",
        "cost/evaluation_nfe",
        "drift/",
    )
    found = [row for row in lines if row["kind"] == kind]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


def state(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def fpo(llada_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fpo")
    return execute("sudoku/fpo_dipod", llada_directory, path)


def test_a_text_run_leaves_what_it_promises(fpo: Path):
    assert len(rows(fpo)) == STEPS
    assert all(row["optimizer_steps"] == 2 for row in rows(fpo))
    for row in rows(fpo, "evaluation"):
        assert row["gap/gap"] >= 0
        assert abs(row["gap/cosine"]) <= 1 + 1e-6
        assert 1 <= row["evaluation/length/mean"] <= 12
    samples = (fpo / "samples" / "step_000004" / "completions.jsonl").read_text().splitlines()
    assert set(json.loads(samples[0])) == {"prompt", "completion", "scores"}
    report = (fpo / "report.html").read_text()
    assert "Variational gap" in report and "Length of rollouts" in report


def test_the_first_ratio_is_one_and_nothing_is_clipped_through_the_actors(fpo: Path):
    first = json.loads((fpo / "metrics.jsonl").read_text().splitlines()[1])
    assert first["drift/exact"] == 1.0
    assert first["drift/ratio_p99"] == 0.0


def test_one_process_gives_the_same_text_run(fpo: Path, llada_directory: Path, tmp_path: Path):
    """No Ray, no DeepSpeed, one worker, one rank: the same rollouts, the same curve."""
    from rich.console import Console

    overrides = settings(llada_directory, "learner.ranks=1", "workers.count=1")
    recipe = load(Path("sudoku/fpo_dipod"), Recipe, overrides).value
    run_locally(recipe, tmp_path / "local", Console(quiet=True))
    here, there = rows(tmp_path / "local"), rows(fpo)
    assert here[0]["reward/even/mean"] == there[0]["reward/even/mean"]
    assert here[0]["rollout/length/mean"] == there[0]["rollout/length/mean"]
    for mine, theirs in zip(here[:2], there[:2], strict=True):
        for key in ("reward/even/mean", "grad_norm", "elbo/mean"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-3), key


@pytest.mark.slow
def test_a_text_run_resumes_to_the_same_bytes(fpo: Path, llada_directory: Path, tmp_path: Path):
    run = execute("sudoku/fpo_dipod", llada_directory, tmp_path, "steps=2")
    found = latest(run / "checkpoints")
    assert found is not None and found.step == 2
    execute("sudoku/fpo_dipod", llada_directory, tmp_path, resume=run)
    assert state(run, STEPS) == state(fpo, STEPS)
    assert rows(run)[2:] == rows(fpo)[2:]


@pytest.mark.parametrize(
    "recipe", ["spg_dipod_alternating", "diffu_grpo", "espo", "wd1", "trace_rl", "no_baseline"]
)
def test_every_objective_trains_in_one_process(recipe: str, llada_directory: Path, tmp_path: Path):
    from rich.console import Console

    more = ["learner.ranks=1", "workers.count=1", "steps=2", "evaluation.every=2"]
    if recipe == "spg_dipod_alternating":
        more.append("rl.dipod={form: alternating, every: 2, steps: 3}")
    overrides = settings(llada_directory, *more)
    loaded = load(Path(f"sudoku/{recipe}"), Recipe, overrides).value
    run_locally(loaded, tmp_path / "run", Console(quiet=True))
    made = rows(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in made)
    assert all(torch.isfinite(torch.tensor(row["elbo/mean"])) for row in made)
    if recipe == "spg_dipod_alternating":
        assert [row.get("distilled") for row in made] == [None, 1.0]
        assert [row["optimizer_steps"] for row in made] == [2.0, 3.0]


@pytest.mark.slow
def test_the_embedded_base_writes_answers_and_can_learn_more():
    from rewards.sudoku import SudokuReward
    from rollout.draws import EVALUATION_STEP, groups_for
    from rollout.masked import DecodePlan, MaskedSampler, MaskedSamplerConfig
    from rollout.policies.llada.policy import LladaConfig
    from rollout.sudoku import SudokuPrompts

    policy = LladaConfig(checkpoint="sudoku").build()
    prompts = SudokuPrompts(split="validation", count=128).load()
    groups = groups_for(prompts, seed=0, step=EVALUATION_STEP, count=128, size=1)
    made = MaskedSampler(MaskedSamplerConfig(), policy).sample(
        groups, [DecodePlan(temperature=0.0)] * 128
    )
    columns = {key: [p.columns[key] for p in prompts] for key in ("puzzle", "solution")}
    scores: Any = SudokuReward().build()
    facts = scores.describe_set([p.text for p in prompts], [r.media[0] for r in made], **columns)
    assert facts["answered_rate"] > 0.95
    assert 0.3 < facts["cell_accuracy"] < 0.95
