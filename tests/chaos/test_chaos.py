"""A seeded monkey kills and stops actors, a node and the driver: the numbers stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena import Arena, arena
from monkey import KINDS, Blow, Disturbed, blows, numbers, pace_of, restarts, rows, scores, weights

pytestmark = pytest.mark.timeout(900)

COMMON = [
    "tracking=[]", "checkpoints.keep_last=9", "checkpoints.keep_best=null",
    "cluster={colocated: true, job_timeout: 25, start_timeout: 200, max_restarts: 9}",
    "learner.ranks=2", "workers.count=2", "rollout.group_size=4", "rollout.batch_size=8",
    "rollout.prompts_per_step=8", "checkpoints.every=3",
]  # fmt: skip
DIGITS = [
    *COMMON, "steps=8", "rollout.steps=6", "rl.minibatches=2",
    "evaluation={every: 4, samples: 40, rewards: [{kind: digit_held_out, deadline: 20}]}",
    "rewards=[{kind: digit_log_prob, deadline: 20}]",
]  # fmt: skip
COUNTDOWN = [
    *COMMON, "steps=6", "rollout.length=8", "rollout.block_length=8", "rollout.steps=4",
    "rollout.prompts_per_step=4", "learner.micro_batch=8",
    "evaluation={every: 3, samples: 8, steps: 4, "
    "prompts: {kind: countdown, split: validation, count: 8, numbers: [3, 3], largest: 9}}",
    "rewards=[{kind: countdown, deadline: 20}]",
]  # fmt: skip
RECIPES = {"digits/flash_grpo": DIGITS, "countdown/spg": COUNTDOWN}
SEEDS = {"digits/flash_grpo": range(14), "countdown/spg": range(14, 22)}
CASES = [(recipe, seed) for recipe, seeds in SEEDS.items() for seed in seeds]
Play = Callable[[str], Path]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Arena]:
    with arena() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(cluster: Arena, tmp_path_factory: pytest.TempPathFactory) -> Play:
    """The run of a recipe that nobody disturbs; made once."""
    made: dict[str, Path] = {}

    def play(recipe: str) -> Path:
        if recipe not in made:
            path = tmp_path_factory.mktemp("undisturbed")
            made[recipe] = Disturbed(cluster, recipe, RECIPES[recipe], path).play([])
        return made[recipe]

    return play


def assert_same(run: Path, other: Path) -> None:
    """Each step once, and every number and tensor of it: no sample is missing or used twice."""
    steps = [row["step"] for row in rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert numbers(run) == numbers(other)
    assert scores(run) == scores(other)
    assert weights(run) == weights(other)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "seed"), CASES)
def test_what_a_monkey_does_costs_nothing_but_time(
    cluster: Arena, undisturbed: Play, tmp_path: Path, recipe: str, seed: int, record_property
):
    whole = undisturbed(recipe)
    planned = blows(seed, len(rows(whole)))
    disturbed = Disturbed(cluster, recipe, RECIPES[recipe], tmp_path, pace_of(whole))
    try:
        run = disturbed.play(planned)
    finally:
        record_property("blows", "; ".join(disturbed.struck))
        record_property("starts", disturbed.starts)
        record_property("told", restarts(disturbed.run))
    assert disturbed.struck
    assert_same(run, whole)


def test_the_monkeys_leave_nothing_out():
    """Each kind dies, and each kind of actor hangs, on both recipes together; the same every time."""
    planned: list[Blow] = [blow for _, seed in CASES for blow in blows(seed, 11)]
    assert {(b.victim, b.stop) for b in planned} == {
        *((kind, False) for kind in KINDS),
        *((kind, True) for kind in ("rollout", "reward", "learner")),
    }
    assert planned == [blow for _, seed in CASES for blow in blows(seed, 11)]
    assert len(CASES) >= 20
