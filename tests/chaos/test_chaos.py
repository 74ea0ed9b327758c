"""A seeded monkey kills and stops actors, a node and the driver: the numbers stay what they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from arena import ACTORS, Arena, arena, called
from monkey import KINDS, Blow, Disturbed, blows, numbers, pace_of, restarts, rows, scores, weights

from cluster.ray_cluster import connected
from cluster.reward_actors import RayScorer
from cluster.rollout_pool import RayRolloutPool
from recipes.schema import Recipe
from rl.contracts import Sampled
from rollout.draws import groups_for
from rollout.flow import FlowPlan

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
AHEAD = [*DIGITS, "schedule={mode: one_step_ahead}"]
ASYNC = [*DIGITS, "schedule={mode: async, max_staleness: 2}"]
GAMES = {
    "digits": ("digits/flash_grpo", DIGITS),
    "countdown": ("countdown/spg", COUNTDOWN),
    "ahead": ("digits/flash_grpo", AHEAD),
    "async": ("digits/flash_grpo", ASYNC),
}
SEEDS = {"digits": range(10), "countdown": range(10, 15), "ahead": range(15, 20)}
CASES = [(game, seed) for game, seeds in SEEDS.items() for seed in seeds]
LOOSE = range(20, 24)
FINAL = ("evaluation/digit_log_prob/mean", "evaluation/digit_held_out/mean")
Play = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Arena]:
    with arena() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(cluster: Arena, tmp_path_factory: pytest.TempPathFactory) -> Play:
    """The n-th run of a game that nobody disturbs; made once."""
    made: dict[tuple[str, int], Path] = {}

    def play(game: str, number: int = 0) -> Path:
        if (game, number) not in made:
            path = tmp_path_factory.mktemp("undisturbed")
            made[game, number] = Disturbed(cluster, *GAMES[game], path).play([])
        return made[game, number]

    return play


@pytest.fixture
def disturbed(cluster: Arena, undisturbed: Play, tmp_path: Path, record_property) -> Play:
    """A run of a game that the monkey of a seed disturbs."""

    def play(game: str, seed: int) -> Path:
        whole = undisturbed(game, 0)
        planned = blows(seed, len(rows(whole)))
        game_on = Disturbed(cluster, *GAMES[game], tmp_path, pace_of(whole))
        try:
            run = game_on.play(planned)
        finally:
            record_property("blows", "; ".join(game_on.struck))
            record_property("starts", game_on.starts)
            record_property("told", restarts(game_on))
        assert game_on.struck
        return run

    return play


def assert_each_step_once(run: Path, other: Path) -> None:
    """No sample is missing or used twice: the ledger of evaluations says the same after each step."""
    ledgers: list[Any] = []
    for one in (run, other):
        train = [row for row in rows(one) if row["kind"] == "train"]
        assert [row["step"] for row in train] == list(range(1, len(train) + 1))
        ledgers.append([(row["cost/nfe"], row["rollout/dropped_groups"]) for row in train])
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
@pytest.mark.parametrize(("game", "seed"), CASES)
def test_what_a_monkey_does_costs_nothing_but_time(
    undisturbed: Play, disturbed: Play, game: str, seed: int
):
    run, whole = disturbed(game, seed), undisturbed(game, 0)
    assert_each_step_once(run, whole)
    assert numbers(run) == numbers(whole)
    assert scores(run) == scores(whole)
    assert weights(run) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LOOSE)
def test_an_asynchronous_run_ends_where_undisturbed_ones_do(
    undisturbed: Play, disturbed: Play, seed: int
):
    calm = [undisturbed("async", number) for number in range(3)]
    run = disturbed("async", seed)
    assert_each_step_once(run, calm[0])
    for key in FINAL:
        band = [rows(one)[-1][key] for one in calm]
        # Three runs show about half of the spread; a sample of forty is 0.025.
        room = max(max(band) - min(band), 0.05)
        assert min(band) - room <= rows(run)[-1][key] <= max(band) + room


def test_the_monkeys_leave_nothing_out():
    """Each kind dies and each kind of actor hangs, by the same plan every time."""
    seeds = [seed for _, seed in CASES] + list(LOOSE)
    planned: list[Blow] = [blow for seed in seeds for blow in blows(seed, 11)]
    assert {(b.victim, b.stop) for b in planned} == {
        *((kind, False) for kind in KINDS),
        *((kind, True) for kind in ("rollout", "reward", "learner")),
    }
    assert planned == [blow for seed in seeds for blow in blows(seed, 11)]
    assert len(seeds) >= 20


@pytest.mark.slow
def test_a_short_game_on_the_pools_alone(digits_recipe: Callable[..., Recipe], tmp_path: Path):
    """Rollout and reward processes die while a set is drawn and scored: the same set comes out."""
    recipe = digits_recipe("workers.count=2", "rollout.batch_size=2", "evaluation.rewards=[]",
                           "learner.ranks=1")  # fmt: skip
    groups = groups_for(recipe.prompts.load(), seed=0, step=0, count=24, size=2)
    draw = random.Random(0)
    moments = {draw.randrange(8): "rollout", draw.randrange(8, 16): "reward"}

    def hunted(samples: Iterator[Sampled]) -> Iterator[Sampled]:
        for place, sample in enumerate(samples):
            if kind := moments.get(place):
                draw.choice(called(psutil.Process().children(True), ACTORS[kind])).kill()
            yield sample

    with connected(recipe) as placement:
        pool, scorer = (
            RayRolloutPool(recipe, placement, str(tmp_path)),
            RayScorer(recipe, str(tmp_path)),
        )
        pool.start()
        scorer.start()
        with contextlib.closing(pool):
            plans = [FlowPlan()] * len(groups)
            calm, wild = (
                [
                    (one.sample.group, one.scores["digit_log_prob"].values.tobytes(),
                     ray.get(one.sample.media, timeout=60).tobytes())
                    for one in scorer.score(hunt(pool.generate(groups, plans)))
                ]
                for hunt in (iter, hunted)
            )  # fmt: skip
            assert pool.fleet.restarts == 1
    assert [group.group for group, *_ in wild] == list(range(24))
    assert wild == calm
