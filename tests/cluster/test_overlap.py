"""Runs whose sets are drawn while others train: which weights draw, what is equal, what comes back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from cluster.dispatch import Cancelled
from cluster.launch import build_trainer, run_locally
from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
from cluster.progress import Progress
from cluster.ray_cluster import ClusterError, connected
from cluster.rollout_pool import RayRolloutPool
from cluster.run import RunDirectory
from cluster.trained import STATE_FILE
from cluster.weights import Weights, pack, to_arrays
from recipes.schema import Recipe
from rl.contracts import Sampled
from rollout.draws import EVALUATION_STEP, Group, groups_for
from rollout.flow import FlowPlan

Make = Callable[..., Recipe]
AHEAD = "schedule={mode: one_step_ahead}"
COSTS = ("cost/learner_forwards", "cost/backwards", "cost/forwards")
SMALL = ["rollout.steps=4", "rollout.group_size=2", "evaluation.samples=4", "evaluation.every=9",
         "evaluation.rewards=[]", "checkpoints.keep_last=9", "checkpoints.keep_best=null",
         "learner.micro_batch=8"]  # fmt: skip


class Noting(LocalRolloutPool):
    """Notes which version drew which set."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.drawn: list[tuple[int, int, int]] = []

    def generate(
        self, groups: Sequence[Group], plans: Sequence[Any], weights: Weights | None = None
    ) -> Iterator[Sampled]:
        for sample in super().generate(groups, plans, weights):
            if sample.group.step != EVALUATION_STEP:
                self.drawn.append((sample.group.step, sample.group.group, sample.version))
            yield sample


def trained(recipe: Recipe, path: Path) -> Noting:
    pool, learner = Noting(recipe), LocalLearner(recipe)
    with Progress(recipe.steps, 0, Console(quiet=True)) as progress:
        directory = RunDirectory(recipe, path, [], progress, lambda media: media)
        directory.save = learner.save
        build_trainer(recipe, directory, pool, LocalScorer(recipe), learner, 0).train()
    return pool


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines of training without what a clock decides."""
    timed = ("time", "busy/", "idle/", "cost/seconds", "cost/actor_seconds")
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    found = [row for row in lines if row["kind"] == "train"]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


def state(path: Path, step: int) -> bytes:
    return (path / "checkpoints" / f"step_{step:06d}" / STATE_FILE).read_bytes()


def test_one_step_ahead_every_set_is_drawn_by_the_weights_before_the_last(
    digits_recipe: Make, tmp_path: Path
):
    pool = trained(digits_recipe(*SMALL, AHEAD, "steps=4"), tmp_path)
    assert sorted(pool.drawn) == [(s, g, max(s - 1, 0)) for s in range(4) for g in range(4)]


def test_async_every_sample_is_used_once_and_none_is_too_old(digits_recipe: Make, tmp_path: Path):
    recipe = digits_recipe(*SMALL, "schedule={mode: async, max_staleness: 2}", "steps=6")
    pool = trained(recipe, tmp_path)
    assert sorted((s, g) for s, g, _ in pool.drawn) == [(s, g) for s in range(6) for g in range(4)]
    assert all(0 <= step - version <= 2 for step, _, version in pool.drawn)
    nfe = [row["cost/nfe"] for row in rows(tmp_path)]
    assert nfe == [nfe[0] * (step + 1) for step in range(6)]


def test_one_step_ahead_is_the_same_run_again_and_after_a_resume(
    digits_recipe: Make, tmp_path: Path
):
    recipe = digits_recipe(*SMALL, AHEAD, "steps=4", "evaluation.every=2")
    for name in ("once", "again"):
        run_locally(recipe, tmp_path / name, Console(quiet=True))
    half = recipe.model_copy(update={"steps": 2})
    run_locally(half, tmp_path / "resumed", Console(quiet=True))
    run_locally(recipe, tmp_path / "resumed", Console(quiet=True))
    assert rows(tmp_path / "once") == rows(tmp_path / "again")
    assert rows(tmp_path / "once") == rows(tmp_path / "resumed")
    assert state(tmp_path / "once", 4) == state(tmp_path / "resumed", 4)


def test_a_run_ahead_is_another_run_than_in_sync(digits_recipe: Make, tmp_path: Path):
    for name, settings in (("sync", []), ("ahead", [AHEAD])):
        recipe = digits_recipe(*SMALL, *settings, "steps=3")
        run_locally(recipe, tmp_path / name, Console(quiet=True))
    sync, ahead = rows(tmp_path / "sync"), rows(tmp_path / "ahead")
    reward = next(key for key in sync[0] if key.startswith("reward/") and key.endswith("/mean"))
    assert [a[reward] == s[reward] for a, s in zip(ahead, sync, strict=True)] == [
        True, False, False
    ]  # fmt: skip


def test_a_set_in_parts_is_the_same_optimiser_step(digits_recipe: Make, tmp_path: Path):
    settings = ["rl.advantages={std: group}", "rollout.batch_size=2", "learner.micro_batch=2",
                "optimizer.learning_rate=1e-3", "steps=3"]  # fmt: skip
    for parts in (1, 2, 4):
        recipe = digits_recipe(*SMALL, *settings, f"schedule={{parts: {parts}}}")
        run_locally(recipe, tmp_path / str(parts), Console(quiet=True))
    whole, *others = [rows(tmp_path / str(parts)) for parts in (1, 2, 4)]
    for other in others:
        for a, b in zip(whole, other, strict=True):
            assert a.keys() == b.keys()
            # Every part is padded to whole micro-batches, which costs evaluations.
            same = [k for k in a if k not in ("kind", *COSTS)]
            # Adam's first steps are signs of gradients: what rounding changes grows from there.
            rel = 1e-3 if a["step"] == 1 else 3e-2
            assert [b[k] for k in same] == pytest.approx([a[k] for k in same], rel=rel, abs=rel)
    assert [row["optimizer_steps"] for row in others[1]] == [1.0] * 3


@pytest.fixture(scope="module")
def ray_pool(digits_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two actors on a real Ray."""
    recipe = digits_recipe(*SMALL, "workers.count=2", "rollout.batch_size=2")
    with connected(recipe) as placement:
        pool = RayRolloutPool(recipe, placement, str(tmp_path_factory.mktemp("logs")))
        pool.start()
        yield recipe, pool
        pool.close()


def draws(recipe: Recipe, step: int, count: int) -> list[Group]:
    return groups_for(recipe.prompts.load(), seed=0, step=step, count=count, size=2)


def published(recipe: Recipe, version: int) -> Weights:
    arrays = to_arrays(recipe.policy.build(seed=recipe.seed).trainable())
    rng = {name: a + 0.01 * version * (1 + a.size % 3) for name, a in arrays.items()}
    return pack(rng, version)


def finals(samples: list[Sampled]) -> dict[int, bytes]:
    media: dict[int, Any] = {s.group.group: ray.get(s.media, timeout=60) for s in samples}
    return {group: array.tobytes() for group, array in media.items()}


def test_calls_of_different_weights_at_once_are_each_drawn_by_their_own(ray_pool: Any):
    recipe, pool = ray_pool
    groups, plans = draws(recipe, 0, 4), [FlowPlan()] * 4
    old, new = published(recipe, 1), published(recipe, 2)
    alone = {w.version: list(pool.generate(groups, plans, w)) for w in (old, new)}
    calls = {w.version: pool.generate(groups, plans, w) for w in (old, new)}
    together: dict[int, list[Sampled]] = {1: [], 2: []}
    for _ in groups:
        for version, call in calls.items():
            together[version].append(next(call))
    for version in (1, 2):
        assert {s.version for s in together[version]} == {version}
        assert finals(together[version]) == finals(alone[version])
    assert finals(alone[1]) != finals(alone[2])


def test_what_is_not_taken_is_not_drawn(ray_pool: Any):
    recipe, pool = ray_pool
    pool.load(published(recipe, 1))
    groups = draws(recipe, 0, 40)
    call = pool.generate(groups, [FlowPlan()] * 40)
    first = next(call)
    evaluated = list(pool.generate(draws(recipe, EVALUATION_STEP, 4), [FlowPlan()] * 4))
    assert len(evaluated) == 4
    assert call.given - call.taken <= 4  # two for each actor
    rest = list(call)
    assert sorted(s.group.group for s in [first, *rest]) == list(range(40))


def test_newer_weights_reach_the_jobs_that_start_after_them(ray_pool: Any):
    recipe, pool = ray_pool
    pool.load(published(recipe, 1))
    call = pool.generate(draws(recipe, 0, 30), [FlowPlan()] * 30)
    versions = [next(call).version]
    pool.load(published(recipe, 2))
    versions += [sample.version for sample in call]
    assert versions[0] == 1
    assert versions[-1] == 2
    assert versions.count(1) <= 10


def test_a_cancelled_call_ends_with_an_error_and_the_next_one_is_served(ray_pool: Any):
    recipe, pool = ray_pool
    call = pool.generate(draws(recipe, 0, 30), [FlowPlan()] * 30)
    next(call)
    pool.cancel()
    with pytest.raises(Cancelled):
        list(call)
    assert len(list(pool.generate(draws(recipe, 1, 4), [FlowPlan()] * 4))) == 4


def test_a_call_that_arrives_while_the_dispatcher_is_busy_is_served(
    ray_pool: Any, monkeypatch: pytest.MonkeyPatch
):
    recipe, pool = ray_pool
    events = pool.dispatcher._events

    class Slow:
        """A thread that is interrupted between making an event and handing it over."""

        def put(self, event: Any) -> None:
            events.put(lambda: None)
            time.sleep(0.3)  # the dispatcher has a turn
            events.put(event)

        def __getattr__(self, name: str) -> Any:
            return getattr(events, name)

    monkeypatch.setattr(pool.dispatcher, "_events", Slow())
    call = pool.generate(draws(recipe, 0, 2), [FlowPlan()] * 2)
    monkeypatch.undo()
    assert len(list(call)) == 2


def test_weights_that_do_not_fit_end_the_call_with_their_own_error(ray_pool: Any):
    recipe, pool = ray_pool
    arrays = to_arrays(recipe.policy.build(seed=0).trainable())
    wrong = pack(dict(list(arrays.items())[:-1]), 7)
    with pytest.raises(RuntimeError, match="version 7 bind to"):
        list(pool.generate(draws(recipe, 0, 2), [FlowPlan()] * 2, wrong))
    pool.load(published(recipe, 1))
    assert len(list(pool.generate(draws(recipe, 0, 4), [FlowPlan()] * 4))) == 4


def test_a_pool_without_actors_says_so_to_every_caller(ray_pool: Any):
    recipe, pool = ray_pool  # its last use: nothing is left of it
    for member in pool.fleet.members:
        ray.kill(member.handle)
    for _ in range(2):
        with pytest.raises(ClusterError, match="no rollout actor is left"):
            list(pool.generate(draws(recipe, 0, 2), [FlowPlan()] * 2))
