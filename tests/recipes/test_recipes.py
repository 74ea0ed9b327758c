"""Recipes: what loads, what is refused, and where the message points."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
import yaml

from recipes.check import check
from recipes.derived import derived
from recipes.errors import RecipeError
from recipes.schema import KINDS, Recipe, recipe_type
from recipes.source import PACKAGED, editor_schema, load, packaged

DIGITS = PACKAGED / "digits" / "flash_grpo.yaml"


def refused(path: Path, *overrides: str, gpus: int = 0) -> str:
    with pytest.raises(RecipeError) as caught:
        check(load(path, recipe_type, overrides), gpus)
    return str(caught.value)


def write(directory: Path, text: str, name: str = "mine.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_valid_and_short(name: str):
    loaded = load(Path(name), recipe_type)
    try:
        check(loaded, gpus=8 * 12)
    except RecipeError as error:
        # What is not installed here is said with the remedy, and nothing else is wrong.
        remedies = ("rectify env create", "pip install 'rectify[", "answers.jsonl: cannot be read")
        assert all(any(r in p.message for r in remedies) for p in error.problems), error
    assert derived(loaded.value)["samples per step"]
    assert len((PACKAGED / f"{name}.yaml").read_text().splitlines()) <= 60


def test_extends_merges_and_another_kind_replaces(tmp_path: Path):
    path = write(
        tmp_path,
        f"""
        extends: {DIGITS}
        name: mine
        rl:
          kind: flow_grpo
        rollout: {{steps: 10}}
    """,
    )
    recipe = load(path, Recipe).value
    assert recipe.rl.kind == "flow_grpo"
    assert recipe.rl.initial_noise == "independent"
    assert recipe.rollout.steps == 10
    assert recipe.rollout.group_size == 8


def test_extends_by_packaged_name_and_circles(tmp_path: Path):
    path = write(tmp_path, "extends: digits/flash_grpo\nname: other\n")
    assert load(path, Recipe).value.name == "other"
    write(tmp_path, "extends: two.yaml\n", "one.yaml")
    write(tmp_path, "extends: one.yaml\n", "two.yaml")
    message = refused(tmp_path / "one.yaml")
    assert "circle: one.yaml -> two.yaml -> one.yaml" in message


def test_scalars_are_yaml_1_2(tmp_path: Path):
    path = write(tmp_path, f"extends: {DIGITS}\nname: no\nrl: {{clip_range: 1e-3}}\n")
    recipe = load(path, Recipe).value
    assert recipe.name == "no"
    assert recipe.rl.clip_range == 1e-3


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (
            "rl:\n  kind: flash_grpo\n  clip_rang: 1\n",
            ":5:3: rl.clip_rang:",
            "did you mean 'clip_range'",
        ),
        ("rl:\n  kind: flash_grop\n", ":4:3: rl.kind:", "did you mean 'flash_grpo'"),
        ("steps: many\n", ":3:1: steps:", 'valid integer; found "many"'),
        ("steps: 1\nsteps: 2\n", ":4:1: steps:", "written twice"),
        ("rewards: []\n", ":3:1: rewards:", "at least 1 item"),
        ("rewards:\n- kind: ink\n  weigth: 1\n", ":5:3: rewards.0.weigth:", "'weight'"),
        ("rollout:\n  group_size: 1\n", ":4:3: rollout.group_size:", "greater than or equal to 2"),
        ("steps: [1\n", ":4:1:", "not YAML"),
        (
            "policy:\n  lora:\n    rank: !!python/none 1\n",
            ":5:11: policy.lora.rank:",
            "not allowed",
        ),
        ("steps: 1e999\n", ":3:8: steps:", "out of range"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, place: str, words: str):
    path = write(tmp_path, f"extends: {DIGITS}\nname: mine\n{text}")
    message = refused(path)
    assert f"mine.yaml{place}" in message
    assert words in message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("rl.pool=[0, 7]", "rl.pool", "outside the grid"),
        ("rollout.group_size=1", "rollout.group_size", "greater than or equal to 2"),
        ("rl.minibatches=3", "rl.minibatches", "do not divide by 3"),
        ("learner.ranks=3", "learner.ranks", "do not divide by"),
        (
            "policy.lora.targets=[to_q, to_x]",
            "policy.lora.targets",
            "'to_x' matches no linear layer",
        ),
        ("workers.gpus=1", "workers.gpus", "this machine has 0"),
        ("rollout.batch_size=4", "rollout.batch_size", "holds no group"),
        ("policy.checkpoint=/nowhere", "policy.checkpoint", "has no transformer/config.json"),
        ("rewards.0.weight=0", "rewards", "every weight is 0"),
        (
            "evaluation.rewards=[{kind: digit_log_prob}]",
            "evaluation.rewards.0",
            "two rewards are called",
        ),
        ("rewards.0={kind: function, path: 'nope:f'}", "rewards.0", "not importable"),
        ("rl.tail={steps: 7}", "rl.tail.steps", "a tail is at most that"),
        ("rl={kind: flow_grpo_fast, window: 5}", "rl.window", "do not fit"),
        ("rl={kind: flash_grpo, antithetic: true}", "rl.antithetic", "needs rl.initial_noise"),
        ("prompts={kind: file, path: none.jsonl}", "prompts.path", "cannot be read"),
        ("rl.clip_range", "", "expected key.path=value"),
        ("rl.clip_range.x=1", "rl.clip_range", "number"),
        ("rewards.5.weight=1", "rewards.5", "index below 1"),
        ("name=../escape", "name", "pattern"),
    ],
)
def test_impossible_combinations_are_refused(override: str, key: str, words: str):
    message = refused(DIGITS, override)
    assert key in message
    assert words in message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("rl={kind: flash_grpo}", "rl.kind", "trained with one of spg, diffu_grpo, fpo"),
        ("rollout={kind: flow}", "rollout.kind", "is sampled with masked, not flow"),
        ("rollout.block_length=7", "rollout.block_length", "does not divide rollout.length 24"),
        ("rollout.steps=25", "rollout.steps", "no multiple of 3 blocks"),
        ("evaluation.steps=48", "evaluation.steps", "up to rollout.length 24"),
        ("learner.micro_batch=3", "learner.micro_batch", "each takes 2"),
        ("rl={kind: espo, draws: 3}", "rl", "multiple of 2"),
        ("rl.kl_coefficient=0.1", "rl.kl_coefficient", "less than or equal to 0"),
        ("rl.dipod.beta=1", "rl.dipod.beta", "unknown key"),
        ("policy.lora={targets: [q_proj, k_prj]}", "policy.lora.targets", "did you mean 'k_proj'"),
        ("policy.checkpoint=/nowhere", "policy.checkpoint", "has no config.json"),
        ("prompts.empty=[4, 13]", "prompts", "no range within 0 to 12"),
        (
            "prompts={kind: math, dataset: gsm8k, source: none.jsonl}",
            "prompts.source",
            "no such file",
        ),
        ("policy.loops=3", "policy.loops", "was not trained with looped blocks"),
        (
            "evaluation.prompts={kind: file, path: none.jsonl}",
            "evaluation.prompts.path",
            "cannot be read",
        ),
    ],
)
def test_impossible_text_recipes_are_refused(override: str, key: str, words: str):
    message = refused(Path("sudoku/spg_dipod"), override)
    assert key in message
    assert words in message


def test_a_flow_has_no_variational_gap_and_no_text_algorithm():
    assert "has no variational gap" in refused(DIGITS, "evaluation.gap={samples: 2}")
    assert "is sampled with flow, not masked" in refused(DIGITS, "rollout={kind: masked}")
    assert "trained with one of flash_grpo" in refused(DIGITS, "rl={kind: spg}")


def test_files_that_are_no_recipes(tmp_path: Path):
    assert "is a directory" in refused(tmp_path)
    assert "did you mean 'digits/flash_grpo'" in refused(Path("digits/flash_grp"))
    assert "found nothing" in refused(write(tmp_path, ""))
    assert "found list" in refused(write(tmp_path, "- 1"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "binary.yaml")
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
    )
    assert "too large" in refused(write(tmp_path, bomb))
    assert refused(write(tmp_path, "a: " + "[" * 5000))


def test_two_hundred_malformed_documents(tmp_path: Path):
    """Characters and lines of a valid recipe shuffled, cut and replaced: only RecipeError, or valid."""
    generator = random.Random(0)
    lines = DIGITS.read_text().splitlines()
    refusals = 0
    for number in range(200):
        mutated = list(lines)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(mutated))
            line = mutated[at]
            cut = generator.randrange(len(line) + 1)
            extra = generator.choice(
                [*list("{}[]:,&*!|>'\"%@`#-?\t\x00é"), "- ", ": ", "nan", "1e9"]
            )
            mutated[at] = generator.choice(
                [line[:cut] + extra + line[cut:], line[cut:], "", " " + line]
            )
        try:
            check(load(write(tmp_path, "\n".join(mutated)), Recipe), 0)
        except RecipeError as error:
            refusals += 1
            assert all(problem.message for problem in error.problems), number
    assert refusals > 100


def test_editor_schema_accepts_packaged_recipes_and_refuses_mistakes():
    schema = editor_schema(KINDS)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = yaml.safe_load(DIGITS.read_text().replace("1e-3", "0.001"))
    validator.validate(json.loads(json.dumps(document)))
    document["rollout"]["group_sizes"] = 3
    assert not validator.is_valid(document)
    distillation = yaml.safe_load((DIGITS.parent / "two_step.yaml").read_text())
    validator.validate(json.loads(json.dumps(distillation)))
    distillation["rl"] = {"kind": "spg"}
    assert not validator.is_valid(distillation)
