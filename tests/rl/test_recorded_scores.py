"""The scores that workers record for objectives which compare, on their way to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import (
    CONFIGS,
    OUTCOMES,
    REWARDS,
    WINDOW,
    build,
    completions,
    random_llada,
    scored_groups,
    text_rollouts,
)

from cluster.local import LocalLearner, LocalRolloutPool
from recipes.derived import derived
from recipes.schema import Recipe
from recipes.source import load
from rl.catalogue import build_algorithm
from rl.contracts import Sampled
from rl.dipod import DipodConfig
from rl.espo import ESPOConfig
from rl.items import Item
from rl.metrics import DriftError, staleness_metrics
from rl.old_scores import with_old
from rl.rollout_set import optimiser_steps
from rl.text import TextSettings
from rollout.draws import groups_for
from rollout.prompts import DigitPrompts

COMPARING = ("diffu_grpo", "espo", "fpo", "trace_rl")


def test_recorded_scores_do_not_depend_on_how_completions_are_cut():
    policy, algorithm = random_llada(), build(CONFIGS["espo"], stale=True)
    d, made = algorithm.forwards_per_completion, text_rollouts(random_llada())
    whole = with_old(algorithm, policy, made, 3, 12 * d)
    parts = [r for one in made for r in with_old(algorithm, policy, [one], 3, 2 * d)]
    for left, right in zip(whole, parts, strict=True):
        assert left.replay.old is not None and right.replay.old is not None
        assert left.replay.old.shape == (3, 3, d, WINDOW) and left.replay.old.dtype == np.float32
        np.testing.assert_allclose(left.replay.old, right.replay.old, rtol=0, atol=1e-5)
        assert left.forwards == right.forwards == 5 + 3 * 3 * d
        assert len({a.tobytes() for a in left.replay.old}) == 3, "every pass has masks of its own"


def test_draws_that_only_distil_are_not_recorded():
    config = CONFIGS["trace_rl"].model_copy(update={"dipod": DipodConfig(draws=2)})
    policy, algorithm = random_llada(), build(config, stale=True)
    plain = build(CONFIGS["trace_rl"], stale=True)
    made = text_rollouts(policy)
    left, right = (with_old(a, policy, made, 2, 5 * 12) for a in (algorithm, plain))
    for one, other in zip(left, right, strict=True):
        assert one.replay.old is not None and other.replay.old is not None
        np.testing.assert_allclose(one.replay.old, other.replay.old, rtol=0, atol=1e-5)
        assert one.forwards == other.forwards


@pytest.mark.parametrize(("kind", "config"), CONFIGS.items())
def test_only_what_compares_asks_for_scores(kind: str, config: TextSettings):
    groups = groups_for(DigitPrompts().load(), seed=0, step=0, count=2, size=2)
    assert {p.passes for p in build(config).plans(0, groups)} == {0}
    stale = build(config, stale=True)
    expected = config.epochs if kind in COMPARING else 0
    assert {p.passes for p in stale.plans(0, groups)} == {expected}
    assert stale.evaluation_plan(None).passes == 0
    assert not stale.on_policy


def test_a_step_that_only_distils_asks_for_none():
    dipod = DipodConfig(form="alternating", every=3)
    algorithm = build(ESPOConfig(dipod=dipod), stale=True)
    groups = groups_for(DigitPrompts().load(), seed=0, step=0, count=1, size=2)
    assert [algorithm.plans(step, groups)[0].passes for step in range(4)] == [4, 4, 0, 4]


# Through workers and ranks.


def recipe_of(kind: str, base: Path, *more: str) -> Recipe:
    settings = [
        f"policy.checkpoint={base}",
        "prompts={kind: sudoku, count: 32}",
        "rollout.length=8",
        "rollout.block_length=4",
        "rollout.steps=4",
        "rollout.prompts_per_step=4",
        "rollout.group_size=3",
        "rollout.batch_size=6",
        "rl.epochs=2",
        "learner.micro_batch=12",
        "optimizer.learning_rate=1e-3",
        *more,
    ]
    return load(Path(f"sudoku/{kind}"), Recipe, settings).value


def drawn(recipe: Recipe, weights: Any) -> list[Sampled]:
    pool = LocalRolloutPool(recipe)
    pool.load(weights)
    stale = recipe.schedule.stale
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed, stale)
    groups = groups_for(recipe.prompts.load(), seed=0, step=0, count=4, size=3)
    return list(pool.generate(groups, algorithm.plans(0, groups)))


def steps_of(recipe: Recipe, samples: Sequence[Sampled]) -> list[list[Item]]:
    scored = scored_groups([s.replay for s in samples], REWARDS)
    stale = recipe.schedule.stale
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed, stale)
    return optimiser_steps(scored, {"r": 1.0}, algorithm, 0)[0]


@pytest.mark.parametrize("kind", COMPARING)
def test_workers_record_what_ranks_with_their_weights_compute(kind: str, llada_directory: Path):
    sync = recipe_of(kind, llada_directory)
    stale = recipe_of(kind, llada_directory, "schedule.mode=async")
    learner = LocalLearner(stale)
    left, right = (drawn(recipe, learner.publish(0)) for recipe in (sync, stale))
    rank = learner.rank
    for plain, recorded in zip(left, right, strict=True):
        assert plain.replay.old is None and plain.media == recorded.media
        assert recorded.forwards == plain.forwards + 2 * 3 * rank.algorithm.draws
    for items in steps_of(stale, right):
        for batch in rank.algorithm.batches(rank.policy, items, lambda c: c, 12, 8):
            if batch.old is not None:
                with torch.no_grad():
                    own = rank.algorithm.scores(rank.policy, batch)
                torch.testing.assert_close(batch.old, own, rtol=0, atol=2e-5)


def test_ranks_take_the_recorded_scores_and_compute_none(llada_directory: Path):
    """Newer weights: the first ratio of a sync update is 1, that of a stale one the recorded one."""
    sync = recipe_of("espo", llada_directory)
    stale = recipe_of("espo", llada_directory, "schedule.mode=one_step_ahead")
    learners = [LocalLearner(recipe) for recipe in (sync, stale)]
    samples = drawn(stale, learners[1].publish(0))
    steps = steps_of(stale, samples)
    first = [learner.update(steps[:1]) for learner in learners]
    np.testing.assert_allclose(first[1].table["ratio"], 1, atol=1e-4)
    a_round = first[0].forwards // 2
    assert [update.forwards for update in first] == [2 * a_round, a_round]
    plain, corrected = (learner.update(steps[1:]).table["ratio"] for learner in learners)
    assert (plain == 1).all()
    assert np.abs(corrected - 1).min() > 1e-4


def test_the_first_step_proves_that_workers_have_the_weights_of_the_ranks(llada_directory: Path):
    recipe = recipe_of("fpo", llada_directory, "schedule.mode=async")
    learner = LocalLearner(recipe)
    steps = steps_of(recipe, drawn(recipe, learner.publish(0)))
    algorithm = learner.rank.algorithm
    drift = algorithm.check_drift(learner.replay(steps[0]), "float32")
    assert drift["drift/ratio_p99"] < 1e-3
    with torch.no_grad():
        for parameter in learner.rank.policy.trainable().values():
            parameter.mul_(1.5)
    with pytest.raises(DriftError, match="not the learner's"):
        algorithm.check_drift(learner.replay(steps[0]), "float32")


def test_staleness_counts_versions_by_group():
    sample = scored_groups([completions(OUTCOMES)], REWARDS[:1])[0].sample
    samples = [replace(sample, version=version) for version in (5, 5, 4, 2)]
    found = staleness_metrics(samples, 5)
    assert found == {"rollout/staleness_mean": 1.0, "rollout/staleness_max": 3.0}
    assert staleness_metrics([], 5) == {}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("digits/flash_grpo", "clipped ratio"),
        ("sudoku/espo", "4 more times"),
        ("sudoku/spg", "spg has no ratio"),
        ("digits/nft", "nft has no ratio"),
    ],
)
def test_a_recipe_says_what_is_done_about_old_rollouts(recipe: str, words: str):
    sync, stale = (
        derived(load(Path(recipe), Recipe, [f"schedule.mode={mode}"]).value)
        for mode in ("sync", "async")
    )
    assert words in stale["rollouts of older weights"]
    assert "rollouts of older weights" not in sync
    assert "on-policy" not in stale["optimiser steps"]
