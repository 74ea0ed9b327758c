"""Distillations whose draws follow their discrepancy: whole runs in one process, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel
from rich.console import Console
from safetensors.torch import load_file

from cluster.launch import run_locally
from recipes.check import check
from recipes.errors import RecipeError
from recipes.schema import DistillRecipe
from recipes.source import load

SMALL = [
    "rollout.steps=3", "rollout.prompts_per_step=8", "rollout.batch_size=8",
    "learner.micro_batch=5", "optimizer.decay=none", "checkpoints.every=2",
    "evaluation={every: 4, samples: 6, rewards: []}", "tracking=[]",
]  # fmt: skip
TWO_STEP = ["rollout.group_size=1", "distill.warmup_steps=1", "distill.regions={kind: label}"]
RUNS = {"aria": SMALL, "two_step": [*SMALL, *TWO_STEP]}


def run(path: Path, name: str, steps: int) -> Path:
    recipe = load(Path(f"digits/{name}"), DistillRecipe, [*RUNS[name], f"steps={steps}"]).value
    run_locally(recipe, path, Console(quiet=True))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.mark.parametrize("name", list(RUNS))
def test_going_on_keeps_the_tracker(tmp_path: Path, name: str):
    """Two and two steps are four: draws, regions and weights byte for byte."""
    whole = run(tmp_path / "whole", name, 4)
    run(tmp_path / "parts", name, 2)
    parts = run(tmp_path / "parts", name, 4)
    for one, other in zip(rows(whole), rows(parts), strict=True):
        regions = {k: v for k, v in one.items() if k.startswith("region")}
        assert regions and regions == {k: other[k] for k in regions}
    states = [
        load_file(path / "checkpoints" / "step_000004" / "optimizer.safetensors")
        for path in (whole, parts)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    drawn = [[value for key, value in row.items() if key.endswith("/q")] for row in rows(whole)]
    assert drawn[0] != drawn[-1]


def test_a_smaller_student_loads_with_stock_diffusers(tmp_path: Path):
    path = run(tmp_path / "run", "aria", 2) / "checkpoints" / "step_000002" / "policy"
    network: Any = WanTransformer3DModel.from_pretrained(path / "transformer")
    assert len(network.blocks) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.layers=9", "4 blocks"),
        ("distill.pairs.held_out=['77']", "no prompt has this id"),
        ("distill.regions={kind: kmeans, count: 40}", "40 regions of 10 prompts"),
        ("distill.regions={kind: kmeans}", "need a count"),
        ("rollout.store=somewhere", "takes no teacher samples"),
        ("policy.lora={rank: 2, alpha: 2}", "leave it out"),
    ],
)
def test_mistakes_name_their_place(override: str, message: str):
    with pytest.raises(RecipeError, match=message):
        check(load(Path("digits/aria"), DistillRecipe, [override]), 0)
