"""``rectify compare``: points are what they say, break-even is arithmetic, mistakes cost nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.compare import BASE, PLAIN, Cells, Point, Trained, in_process, measure, opened, settled
from cluster.compare_report import (
    beside,
    break_even,
    cost_of_reward,
    short,
    summarised,
    write_comparison,
)
from cluster.guided import term
from cluster.launch import run_locally
from cluster.run import describe
from cluster.sample import draw, open_checkpoint
from cluster.tracking import MetricsFile
from recipes.check_comparison import unreachable
from recipes.schema import Recipe
from recipes.source import load
from rewards.digits import DigitLogProb
from rl.contracts import GuidancePlan
from rl.tilt import FlowTilt, RewardSum
from rollout.draws import EVALUATION_STEP, Prompt, groups_for
from rollout.guidance.gradient import NTRK
from rollout.guidance.search import BestOfN
from rollout.policies.wan_conditional import WanPolicy

COMPARE = (
    "compare={kind: flow, budgets: [4, 8], samples: 10, methods: [{kind: best_of_n}, {kind: ntrk}]}"
)
SMALL = ["rollout.steps=4", "steps=1", "evaluation.every=1", "checkpoints.every=1"]


@pytest.fixture(scope="module")
def run(
    digits_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recipe]:
    """A run of one step, and its recipe with a comparison."""
    recipe = digits_recipe(*SMALL, COMPARE, "optimizer.learning_rate=3e-2")
    path = tmp_path_factory.mktemp("runs") / "tilted"
    path.mkdir()
    describe(path, recipe, recipe.prompts.load())
    run_locally(recipe, path, Console(quiet=True))
    return path, recipe


def test_a_reward_sum_weighs_and_its_slope_is_its_derivative(base_policy: WanPolicy) -> None:
    config = DigitLogProb(weight=2.0)
    rewards = RewardSum([term(config, None), term(DigitLogProb(name="again", weight=-0.5), None)])
    tilt = FlowTilt(base_policy, rewards)
    groups = groups_for(
        [Prompt("3", "a handwritten 3", {"digit": 3})], seed=0, step=0, count=4, size=1
    )
    clean = torch.stack([g.draw(0).noise("x", base_policy.latent_shape) for g in groups]) / 3
    single = config.build()
    served = single(["3"] * 4, list(base_policy.decode(clean)), digit=[3] * 4)
    assert tilt.scores(clean, groups).tolist() == pytest.approx([1.5 * s for s in served if s])
    x = clean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tilt.potential(x, 0.0, x, groups).sum(), x)
    direction = slope / slope.norm()
    ahead, behind = (tilt.potential(clean + e * direction, 0.0, clean + e * direction, groups)
                     for e in (1e-2, -1e-2))  # fmt: skip
    assert ((ahead - behind).sum() / 2e-2).item() == pytest.approx(slope.norm().item(), rel=0.05)
    unrounded = tilt.potential(clean, 0.0, clean, groups).tolist()
    assert unrounded == pytest.approx([1.5 * s for s in served if s], rel=0.02)


def test_points_cost_what_they_say_and_raise_the_reward(run: tuple[Path, Recipe]) -> None:
    path, recipe = run
    trained = opened([path], recipe)
    points = measure(recipe, in_process(recipe), trained)
    cells = [(p.policy, p.method, p.budget) for p in points]
    label = "tilted step 1"
    assert cells == [
        (BASE, PLAIN, 4), (BASE, "best_of_n", 4), (BASE, "best_of_n", 8), (BASE, "ntrk", 4),
        (BASE, "ntrk", 8), (label, PLAIN, 4), (label, "ntrk", 4), (label, "ntrk", 8),
    ]  # fmt: skip
    by = dict(zip(cells, points, strict=True))
    assert by[BASE, "best_of_n", 8].work["forwards"] == 8
    assert by[BASE, "ntrk", 4].work == {
        "forwards": 4, "backwards": 3, "decodes": 3, "rewards": 3, "reward_backwards": 3,
        "fallbacks": 0, "equivalents": 10,
    }  # fmt: skip
    assert by[BASE, "ntrk", 8].work["rewards"] == 2 * 4  # and the two copies' samples are compared
    # One plain copy is the plain sample; two are never worse.
    assert by[BASE, "best_of_n", 4].reward == by[BASE, PLAIN, 4].reward
    assert by[BASE, "best_of_n", 8].reward >= by[BASE, PLAIN, 4].reward
    assert by[BASE, "ntrk", 4].reward > by[BASE, PLAIN, 4].reward
    # What the run logged of the same evaluation, on as many samples.
    source = open_checkpoint(path)
    drawn = draw(source, count=10)
    media = np.concatenate([r.media for r in drawn.rollouts])
    digits = [r.group.columns["digit"] for r in drawn.rollouts]
    scores = DigitLogProb().build()([""] * 10, list(media), digit=digits)
    assert by[label, PLAIN, 4].reward == pytest.approx(np.mean(scores), abs=1e-6)
    row = [r for r in MetricsFile(path / "metrics.jsonl").read() if r["kind"] == "train"][-1]
    assert trained[0].equivalents == row["cost/forwards"] + 2 * row["cost/backwards"]


def test_an_adapter_of_another_base_is_not_put_on_this_one(run: tuple[Path, Recipe]) -> None:
    """It is drawn by a policy of its own, and not under guidance."""
    path, recipe = run
    (one,) = opened([path], recipe)
    with torch.no_grad():
        frozen = next(p for p in one.source.policy.module.parameters() if not p.requires_grad)
        frozen.add_(0.1)
    points = measure(recipe, in_process(recipe), [one])
    assert [p.method for p in points if p.policy == one.label] == [PLAIN]


def test_a_workers_guided_samples_do_not_depend_on_its_jobs(run: tuple[Path, Recipe]) -> None:
    _, recipe = run
    pool = in_process(recipe).pool
    groups = groups_for(recipe.prompts.load(), seed=1, step=EVALUATION_STEP, count=5, size=1)
    plan = GuidancePlan(NTRK(best_of=2))
    together = list(pool.generate(groups, [plan] * 5))
    alone = list(pool.generate(groups[3:4], [plan]))
    assert np.array_equal(together[3].media, alone[0].media)
    assert together[3].facts == alone[0].facts == {
        "work/forwards": (8.0,), "work/backwards": (6.0,), "work/decodes": (8.0,),
        "work/rewards": (8.0,), "work/reward_backwards": (6.0,), "work/fallbacks": (0.0,),
    }  # fmt: skip


def test_cells_of_another_seed_are_other_samples(run: tuple[Path, Recipe]) -> None:
    _, recipe = run
    parts = in_process(recipe)
    one, other = (Cells(recipe, parts.scorer, seed).plain(parts.pool, BASE) for seed in (0, 1))
    assert one.reward != other.reward and (one.seed, other.seed) == (0, 1)


def summary_row(policy: str, method: str, reward: float, equivalents: float) -> dict[str, Any]:
    return {"policy": policy, "method": method, "reward": reward, "equivalents": equivalents}


def test_break_even_is_interpolated_and_says_when_there_is_none() -> None:
    curve = [summary_row(BASE, "svdd", r, c) for r, c in ((0.0, 10), (1.0, 100), (2.0, 1000))]
    assert cost_of_reward(curve, 1.0) == pytest.approx(100)
    assert cost_of_reward(curve, 0.5) == pytest.approx(10 * 10**0.5)
    assert cost_of_reward(curve, -1.0) == 10
    assert cost_of_reward(curve, 2.5) is None
    weak = [summary_row(BASE, "best_of_n", 0.2, 10)]
    cheap = [summary_row(BASE, "ntrk", 1.5, 8)]
    summary = [*curve, *weak, *cheap, summary_row("run", PLAIN, 1.0, 10)]
    trained = Trained("run", source=None, equivalents=9000, seconds=1.0)  # type: ignore[arg-type]
    assert break_even(summary, [trained]) == [
        ["run", "svdd", "after 100 samples"],
        ["run", "best_of_n", "at once: no budget tried reaches its reward"],
        ["run", "ntrk", "never: the method is not dearer at its reward"],
    ]


def test_what_is_written_holds_every_point(run: tuple[Path, Recipe], tmp_path: Path) -> None:
    path, recipe = run
    two = recipe.model_copy(update={"compare": recipe.comparison.model_copy(
        update={"seeds": 2, "methods": (BestOfN(),)})})  # fmt: skip
    trained = opened([path], two)
    points = measure(two, in_process(two), trained)
    assert {p.seed for p in points} == {0, 1}
    measured = write_comparison(tmp_path / "out", points, trained, "digit_log_prob")
    names = {file.name for file in measured.files}
    assert names == {f"compare.{kind}" for kind in ("json", "csv", "png", "svg", "html")}
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(document["points"]) == len(points) == 8
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    means = summarised(points)
    assert [float(r["digit_log_prob"]) for r in rows] == pytest.approx(
        [m["reward"] for m in means], abs=1e-4
    )
    assert all(row["seeds"] == "2" for row in rows)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "data:image/svg+xml" in page and "Was training worth it" in page


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        (["rewards=[{kind: ink}]", "compare={kind: flow, methods: [{kind: ntrk}]}"],
         "compare", "methods that can use it: best_of_n"),
        (["compare={kind: flow, served: true, methods: [{kind: dps}]}"], "compare", "follows the gradient"),
        (["compare={kind: masked}"], "compare.kind", "compared with flow"),
        (["compare={kind: flow, reward: digit_logprob}"], "compare.reward", "did you mean 'digit_log_prob'"),
        (["compare={kind: flow, methods: [{kind: ntrk, rho: 1.5}]}"], "rho", "less than 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_nothing_is_written(
    overrides: list[str], place: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [part for one in overrides for part in ("--set", one)]
    result = CliRunner().invoke(app, ["compare", "digits/flash_grpo", *options])
    assert result.exit_code == 2
    assert place in result.stderr and words in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_or_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for options, words in (
        (["--checkpoint", str(tmp_path)], "no checkpoint"),
        (["--out", str(tmp_path / "full")], "not empty"),
    ):
        result = CliRunner().invoke(app, ["compare", "digits/flash_grpo", *options])
        assert result.exit_code == 2 and words in result.stderr
    result = CliRunner().invoke(app, ["compare", "digits/two_step"])
    assert result.exit_code == 2 and "follows no reward" in result.stderr


@pytest.mark.slow
def test_on_ray_served_rewards_give_the_numbers_of_local_ones(
    run: tuple[Path, Recipe], tmp_path: Path
) -> None:
    """Through the actors, NTRK left out (it needs the gradient here), and into the run's report."""
    path, recipe = run
    asked = recipe.comparison.model_copy(update={"methods": (BestOfN(),), "served": True})
    local = measure(recipe.model_copy(update={"compare": asked}), in_process(recipe))
    document = tmp_path / "recipe.yaml"
    document.write_text(
        f"extends: {path / 'recipe.yaml'}\ncompare:\n  kind: flow\n  served: true\n  methods:\n"
        "    - {kind: best_of_n, best_of: 4}\n"
    )
    options = ["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--report"]
    result = CliRunner().invoke(app, ["compare", str(document), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["points"]
    assert [p["reward"] for p in found[:3]] == [p.reward for p in local]
    assert found[1]["work"] == local[1].work
    assert "Against inference-time alignment" in (path / "report.html").read_text()


def test_what_tells_of_hacking_comes_first_and_the_reward_itself_is_not_repeated() -> None:
    names = ["digit_log_prob/mean", "ink/mean", "digit_held_out/mean", "digit_held_out/std"]
    names += ["digit_held_out/diversity", "digit_held_out/frechet", "digit_held_out/accuracy"]
    metrics = {f"evaluation/{name}": 0.0 for name in names}
    point = Point(BASE, PLAIN, 8, 0, 0.0, {}, 0.0, metrics)
    assert [short(name) for name in beside([point], "digit_log_prob")] == [
        "digit_held_out/accuracy",
        "digit_held_out/frechet",
        "digit_held_out/diversity",
        "ink/mean",
    ]


def test_default_methods_are_those_that_the_reward_allows(
    digits_recipe: Callable[..., Recipe],
) -> None:
    """And they run: a reward without a gradient, no ``compare`` in the recipe, options given."""
    recipe = settled(digits_recipe("rewards=[{kind: ink}]", "rollout.steps=3"), [3], 4)
    kinds = ["best_of_n", "svdd", "smc"]
    assert [m.kind for m in recipe.comparison.methods] == kinds
    assert [p.method for p in measure(recipe, in_process(recipe))] == [PLAIN, *kinds]
    kept = settled(digits_recipe(), [], None).comparison
    assert [m.kind for m in kept.methods] == [*kinds, "dps", "ntrk"] and kept.budgets == ()


def test_a_reward_of_another_environment_is_asked_where_it_is_served():
    hpsv2 = "rewards=[{kind: hpsv2}]"
    loaded = load(Path("digits/flash_grpo"), Recipe, [hpsv2])
    ((key, words),) = unreachable(loaded.value)
    assert key == "rewards.0" and "say compare: {kind: flow, served: true}" in words
    served = load(Path("digits/flash_grpo"), Recipe, [hpsv2, "compare={kind: flow, served: true}"])
    assert list(unreachable(served.value)) == []
