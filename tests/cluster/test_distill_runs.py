"""Whole distillations in one process: what they leave, how they go on, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from cluster.launch import run_locally
from cluster.local import LocalRolloutPool
from cluster.teacher_store import identity, stored
from distill.catalogue import teacher_plan
from distill.store import StoreMismatch, TeacherStore
from distill.teacher import draws_of
from recipes.check import check
from recipes.derived import derived
from recipes.errors import RecipeError
from recipes.schema import DistillRecipe, recipe_type
from recipes.source import load
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig

SETTINGS = [
    "steps=3",
    "rollout.steps=3",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.batch_size=4",
    "learner.micro_batch=4",
    "optimizer.decay=none",
    "evaluation.every=3",
    "evaluation.samples=4",
    "evaluation.rewards=[]",
    "checkpoints.every=3",
    "distill.warmup_steps=1",
    "tracking=[]",
]
DMD = ["distill.dmd=0.1", "distill.fake_score={updates: 1}", "distill.noise=fresh"]
LORA = [
    "distill.parameters=lora_per_step",
    "policy.lora={rank: 2, alpha: 4}",
    "distill.discriminator={updates: 1}",
    "learner.micro_batch=3",
]


def recipe_of(*overrides: str) -> DistillRecipe:
    return load(Path("digits/two_step"), DistillRecipe, [*SETTINGS, *overrides]).value


def run(path: Path, *overrides: str) -> Path:
    run_locally(recipe_of(*overrides), path, Console(quiet=True))
    return path


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def numbers(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows without what a clock decides."""
    timed = ("time", "busy/", "idle/", "cost/seconds", "cost/actor_seconds", "mismatch/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(path, kind)]


def state(path: Path, step: int = 3) -> Path:
    return path / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as it is, small."""
    return run(
        tmp_path_factory.mktemp("runs") / "plain", "evaluation.rewards=[{kind: digit_held_out}]"
    )


def test_a_run_measures_teacher_student_and_training(plain: Path):
    train, evaluations = rows(plain, "train"), rows(plain, "evaluation")
    assert [row["step"] for row in train] == [1, 2, 3]
    assert [row["step"] for row in evaluations] == [0, 3]
    first, last = evaluations
    for name in ("digit_log_prob/mean", "digit_held_out/accuracy", "digit_held_out/frechet"):
        assert {f"{who}/{name}" for who in ("teacher", "teacher_2_steps", "evaluation")} <= set(
            first
        )
        assert f"evaluation/{name}" in last
        # Before training the student is its teacher in two steps.
        assert first[f"evaluation/{name}"] == first[f"teacher_2_steps/{name}"]
    assert first["teacher/digit_log_prob/mean"] != first["teacher_2_steps/digit_log_prob/mean"]
    assert first["mismatch/max"] <= first["mismatch/tolerance"]
    assert {"drift/contrast_ratio", "drift/sharpness_ratio"} <= set(first) & set(last)
    assert "loss/discriminator" not in train[0]  # warm-up
    for row in train[1:]:
        for part in ("final", "first"):
            assert 0 <= row[f"discriminator/{part}/accuracy"] <= 1
            assert row[f"discriminator/{part}/r1"] >= 0
        assert {
            "loss/discriminator",
            "loss/adversarial/final",
            "error/final",
            "error/first",
        } <= set(row)
        assert row["grad_norm"] > 0


def test_a_run_counts_what_it_costs(plain: Path):
    """4 samples a step: 3 teacher steps; 2 of the student, then also 2 (2 + 6) + 2 of the critics."""
    train = rows(plain, "train")
    assert [row["cost/nfe"] for row in train] == [12, 24, 36]
    assert [row["cost/learner_forwards"] for row in train] == [8, 8 + 80, 8 + 160]
    assert [row["cost/backwards"] for row in train] == [8, 24, 40]


def test_training_moves_every_network(plain: Path):
    tensors = load_file(state(plain))
    assert {name.split(":")[0] for name in tensors} == {"student", "heads"}
    steps = {name: int(t[0]) for name, t in tensors.items() if name.endswith("optimizer_steps")}
    assert steps == {"student:optimizer_steps": 3, "heads:optimizer_steps": 4}
    moments = {name: t for name, t in tensors.items() if name.endswith(".exp_avg_sq")}
    for part in ("student:transformer.", "student:transformer_2.", "heads:heads.f"):
        assert any(t.max() > 0 for name, t in moments.items() if name.startswith(part))
    policy = TwoStepPolicy.load(WanConfig(checkpoint=str(state(plain).parent / "policy")))
    for name, parameter in policy.trainable().items():
        assert parameter.equal(tensors[f"student:{name}.ema"])


@pytest.mark.parametrize("overrides", [[], DMD, LORA], ids=["plain", "dmd", "lora"])
def test_a_run_that_went_on_equals_one_that_never_stopped(tmp_path: Path, overrides: Sequence[str]):
    """All networks, moments and averages to the last byte, and every metric."""
    often = ["evaluation.every=2", "checkpoints.every=1", "evaluation.samples=2", *overrides]
    whole = run(tmp_path / "whole", *often)
    stopped = run(tmp_path / "stopped", "steps=2", *often)
    assert not state(stopped).exists()
    run(stopped, *often)
    assert state(stopped).read_bytes() == state(whole).read_bytes()
    assert [row["step"] for row in rows(stopped, "train")] == [1, 2, 3]
    assert numbers(stopped) == numbers(whole)
    assert numbers(stopped, "evaluation")[-1] == numbers(whole, "evaluation")[-1]


def filled(recipe: DistillRecipe, directory: Path, groups: int = 6) -> Path:
    """A store of the recipe's teacher, in two shards."""
    made = TeacherStore.create(directory, identity(recipe), 2)
    pool, size = LocalRolloutPool(recipe), recipe.rollout.group_size
    draws = draws_of(recipe.prompts.load(), recipe.seed, groups // 2, size)
    for shard in range(2):
        drawn = draws(shard)
        found = pool.generate(drawn, [teacher_plan()] * len(drawn))
        made.write(shard, [stored(sample, lambda kept: kept) for sample in found])
    return directory


def test_a_store_gives_the_samples_of_a_run(tmp_path: Path):
    place = f"rollout.store={filled(recipe_of(), tmp_path / 'store')}"
    first = run(tmp_path / "first", place, "steps=2", "checkpoints.every=1")
    train = rows(first, "train")
    assert [row["cost/nfe"] for row in train] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in train)
    run(first, place, "checkpoints.every=1")
    again = run(tmp_path / "again", place)
    assert state(first).read_bytes() == state(again).read_bytes()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.steps=4", r"sampler \(there .*'steps': 3.*in the recipe .*'steps': 4"),
        ("rollout.shift=5.0", r"sampler \(there .*'shift': 3\.0.*'shift': 5\.0"),
        ("rollout.guidance_scale=2.0", r"sampler \("),
        ("rollout.group_size=1", r"sampler \("),
        ("policy.dtype=bfloat16", r"dtype \(there float32, in the recipe bfloat16\)"),
    ],
)
def test_samples_of_another_teacher_are_refused(tmp_path: Path, override: str, named: str):
    made = TeacherStore.create(tmp_path / "store", identity(recipe_of()), 1)
    made.write(0, [])
    recipe = recipe_of(f"rollout.store={tmp_path / 'store'}", override)
    with pytest.raises(
        StoreMismatch, match=f"samples of another teacher: {named}.*rectify teacher"
    ):
        run_locally(recipe, tmp_path / "run", Console(quiet=True))


def messages(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        check(load(Path("digits/two_step"), recipe_type, [*SETTINGS, *overrides]), gpus=0)
    return [f"{problem.key}: {problem.message}" for problem in refused.value.problems]


TRAINS_NOTHING = ["distill.adversarial=0", "distill.regression=0", "distill.dmd=0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.parameters=lora_per_step"],
         "policy.lora: distill.parameters lora_per_step trains it; give rank and targets"),
        (["policy.lora={rank: 2}"],
         "distill.parameters: full_per_step trains whole networks; leave out policy.lora, or say "
         "lora_per_step"),
        (["policy.lora={rank: 2}", "distill.parameters=shared"],
         "distill.parameters: shared trains whole networks; leave out policy.lora, or say "
         "lora_per_step"),
        ([*LORA, "learner.zero_stage=3"],
         "learner.zero_stage: adapters of two steps share a frozen base; give 0, 1 or 2"),
        (TRAINS_NOTHING,
         "distill: adversarial, regression and dmd are all 0: nothing trains the sample"),
        (["rollout.batch_size=1"],
         "rollout.batch_size: 1 holds no group of rollout.group_size 2"),
        (["evaluation.gap={samples: 2}"],
         "evaluation.gap: a flow has no variational gap; leave it out"),
        (["evaluation.steps=8"], "evaluation.steps: the student takes 2 steps; leave it out"),
    ],
)  # fmt: skip
def test_a_mistake_has_its_message(overrides: list[str], message: str):
    assert messages(*overrides) == [message]


def test_data_and_stores_that_are_not_there_are_refused(tmp_path: Path):
    checkpoint = f"policy.checkpoint={WanConfig().prepare()}"
    assert messages(checkpoint, "distill.real=data") == [
        "distill.real: real data is known for digits and moving-digits; give real: teacher"
    ]
    (message,) = messages(f"rollout.store={tmp_path}")
    assert message.startswith("rollout.store: ") and "holds no teacher samples" in message
    check(
        load(Path("digits/two_step"), recipe_type, [f"rollout.store={tmp_path}"]), 0, filling=True
    )


def test_mistakes_are_told_together():
    assert len(messages(*TRAINS_NOTHING, "evaluation.steps=8", "rollout.batch_size=1")) == 3


def test_a_recipe_tells_what_it_will_do():
    told = derived(recipe_of(*DMD))
    assert told["samples per step"] == "4 = 2 prompts x 2"
    assert told["student"] == "2 steps, sigma 1.0000 and 0.7500, full_per_step"
    assert told["updates per student step"] == "2 of the heads, 1 of the fake score"
    assert told["teacher"].startswith("3 steps, guidance 1, drawn while")
