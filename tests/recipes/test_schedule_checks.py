"""What a recipe may overlap, and what is refused where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.check import check
from recipes.errors import RecipeError
from recipes.schema import Recipe
from recipes.source import load

PARTS = "schedule={parts: 4}"


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        check(load(Path(name), Recipe, list(overrides)), gpus=0)
    return str(error.value)


def test_parts_of_a_set_that_depend_on_each_other_are_refused():
    assert "global is the whole set's" in refused(
        "digits/flash_grpo", PARTS, "rl.advantages={std: global}"
    )
    assert "do not divide into 5 parts" in refused("digits/flash_grpo", "schedule={parts: 5}")
    assert "take the whole set" in refused("digits/flash_grpo", PARTS, "rl.minibatches=2")
    assert "draws whole sets ahead" in refused(
        "digits/flash_grpo", "schedule={parts: 4, mode: async}"
    )
    assert "weighs completions by the whole set's tokens" in refused(
        "sudoku/spg", PARTS, "rl.epochs=1"
    )


@pytest.mark.parametrize("mode", ["sync", "one_step_ahead", "async"])
def test_every_mode_goes_with_every_kind_of_objective(mode: str):
    for name in ("digits/flash_grpo", "digits/nft", "sudoku/spg"):
        check(load(Path(name), Recipe, [f"schedule={{mode: {mode}}}"]), gpus=0)


def test_parts_that_stand_alone_are_taken():
    check(load(Path("digits/flash_grpo"), Recipe, [PARTS]), gpus=0)


def test_actors_that_share_a_gpu_take_turns():
    gpus = ["learner.gpus=0.5", "workers.gpus=0.5", "cluster.address=auto"]
    message = refused("digits/flash_grpo", "schedule={mode: async}", *gpus)
    assert "at the same time" in message
    check(load(Path("digits/flash_grpo"), Recipe, gpus), gpus=0)
