"""SFT: its loss by hand, masks that no cut changes, answers that become completions, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import (
    AA,
    WINDOW,
    batch_of,
    build,
    completions,
    gradient,
    item_of,
    items_of,
    random_llada,
    scored_groups,
    toy_policy,
)

from cluster.launch import run_locally
from cluster.workers import RolloutWorker
from recipes.check import check
from recipes.errors import RecipeError
from recipes.schema import Recipe
from recipes.source import load
from rl.bounds import elbo
from rl.items import Item, share
from rl.rollout_set import optimiser_steps
from rl.sft import SFTConfig, answer_tokens, given
from rl.text_batches import token_log_probs
from rollout.draws import groups_for
from rollout.masked import DecodePlan, MaskedRollout, MaskedSampler, MaskedSamplerConfig
from rollout.policies.llada.policy import LladaPolicy
from rollout.sudoku import SudokuPrompts

TEMPLATE = "<answer>{solution}</answer>"
LENGTH = 24
PROMPTS = SudokuPrompts(count=6).load()
STEPS = 12


@pytest.fixture(scope="module")
def llada() -> LladaPolicy:
    return random_llada()


def rollouts(policy: LladaPolicy, size: int = 1, count: int = 3) -> list[MaskedRollout]:
    sampler = MaskedSampler(MaskedSamplerConfig(length=LENGTH), policy)
    groups = groups_for(PROMPTS, seed=0, step=0, count=count, size=size)
    return given(sampler, groups, TEMPLATE)


def items(policy: LladaPolicy, draws: int, size: int = 1) -> list[Item]:
    """Of a whole optimiser step, rewards 0."""
    replays = [rollout.replay for rollout in rollouts(policy, size)]
    scored = scored_groups(replays, np.zeros((3, size)))
    (made,), _ = optimiser_steps(scored, {"r": 0.0}, build(SFTConfig(draws=draws), LENGTH), 0)
    return made


def test_completions_are_the_answers_with_their_end_and_eos(llada: LladaPolicy):
    made = rollouts(llada, size=2)
    tokenizer = llada.tokenizer
    eot, eos = tokenizer.convert_tokens_to_ids("<|eot_id|>"), llada.eos_token_id
    for rollout in made:
        answer = f"<answer>{rollout.group.columns['solution']}</answer>"
        ids = [*tokenizer(answer)["input_ids"], eot]
        assert rollout.media == [answer] * 2 and rollout.forwards == 0
        assert rollout.replay.tokens.tolist() == [ids + [eos] * (LENGTH - len(ids))] * 2
        assert rollout.summary.lengths == (len(ids) + 1,) * 2 and rollout.summary.ended == 2
        assert rollout.replay.seeds[0] != rollout.replay.seeds[1]
        (prompt,) = llada.encode([rollout.group.prompt])
        assert rollout.replay.prompt.tolist() == prompt.tolist()


def test_the_loss_is_that_of_the_formula(llada: LladaPolicy):
    algorithm, draws = build(SFTConfig(draws=3), LENGTH), 3
    step = items(llada, draws)
    (batch,) = algorithm.batches(llada, step, lambda replay: replay, 3 * draws, 1)
    loss, table = algorithm.loss(llada, batch)
    per_completion = torch.zeros(3)
    for j, item in enumerate(step):
        clean = torch.from_numpy(np.concatenate([item.replay.prompt, item.replay.tokens[0]]))
        rates = (1 / batch.scale[j]).tolist()
        assert all(d / 3 <= t < (d + 1) / 3 + 1e-3 for d, t in enumerate(rates))
        for d, t in enumerate(rates):
            noised = batch.tokens[j, d, -len(clean) :]
            hidden = noised == llada.mask_token_id
            assert not hidden[:-LENGTH].any() and torch.equal(noised[~hidden], clean[~hidden])
            with torch.no_grad():
                logits = llada.network(noised[None]).logits[0].float()
            logits[:, llada.mask_token_id] = -torch.inf
            losses = -logits.log_softmax(-1)[torch.arange(len(clean)), clean]
            per_completion[j] += losses[hidden].sum() / t / LENGTH / draws
    assert loss.item() == pytest.approx(per_completion.mean().item(), rel=1e-4)
    torch.testing.assert_close(table["elbo"], -per_completion, rtol=1e-4, atol=1e-5)


def test_the_mean_over_masks_is_the_bound_and_not_the_likelihood():
    policy, algorithm = toy_policy(), build(SFTConfig(draws=40000), 2)
    item = item_of(completions(np.array([[0, 0]])), [1.0], [1.0])
    batch = batch_of(policy, [item], algorithm.masks)
    assert AA == 0
    bound = elbo(token_log_probs(policy, batch), batch.scale).item()
    assert bound == pytest.approx(-1.307840, abs=0.05)


def test_loss_and_gradient_depend_on_no_micro_batch_and_no_rank(llada: LladaPolicy):
    algorithm = build(SFTConfig(draws=2))
    step = items_of(llada, algorithm)
    loss, whole, tables = gradient(llada, algorithm, step, 12)
    largest = float(whole.abs().max())
    assert largest > 1e-3 and len(tables[0]["elbo"]) == 12
    for size in (1, 5):
        other, other_gradient, _ = gradient(llada, algorithm, step, size)
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(other_gradient, whole, rtol=1e-3, atol=1e-4 * largest)
    parts = [gradient(llada, algorithm, part, 4) for part in share(step, 3)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-5)
    together = torch.stack([part[1] for part in parts]).sum(0)
    torch.testing.assert_close(together, whole, rtol=1e-3, atol=1e-4 * largest)


def test_a_pass_has_masks_of_its_own_and_a_rank_without_work_adds_nothing(llada: LladaPolicy):
    algorithm = build(SFTConfig(draws=2, epochs=2))
    scored = scored_groups([i.replay for i in items_of(llada, algorithm)], np.zeros((4, 3)))
    first, second = optimiser_steps(scored, {"r": 1.0}, algorithm, 0)[0]
    losses = [gradient(llada, algorithm, step, 12)[0] for step in (first, second, first)]
    assert losses[0] == losses[2] != losses[1]
    (batch,) = algorithm.batches(llada, [], lambda replay: replay, 4, 1)
    loss, table = algorithm.loss(llada, batch)
    assert loss.item() == 0 and len(table["elbo"]) == 0


def test_completions_without_a_mask_are_in_the_table(llada: LladaPolicy):
    algorithm = build(SFTConfig(draws=1))
    replay = completions(np.full((200, WINDOW), 30))
    (batch,) = algorithm.batches(
        llada, [item_of(replay, np.ones(200), np.ones(200) / 200)], lambda r: r, 200, 1
    )
    assert not batch.scored.flatten(1).any(1).all(), "no completion came without a mask"
    with torch.no_grad():
        _, table = algorithm.loss(llada, batch)
    assert len(table["elbo"]) == 200 and (table["elbo"] == 0).any()


def test_groups_of_one_train_whatever_their_rewards_and_all_weigh_the_same(llada: LladaPolicy):
    for size in (1, 4):
        step = items(llada, 1, size)
        assert [item.weights.tolist() for item in step] == [[1 / (3 * size)] * size] * 3
        assert all((item.distillation == 0).all() for item in step)


def test_a_minimum_reward_leaves_out_what_scores_less():
    algorithm = build(SFTConfig(minimum_reward=0.5))
    replays = [completions(np.zeros((2, WINDOW))) for _ in range(3)]
    rewards = np.array([[0.5, 0.4], [0.1, np.nan], [0.9, 1.0]])
    (step,), metrics = optimiser_steps(scored_groups(replays, rewards), {"r": 1.0}, algorithm, 0)
    assert [item.weights.tolist() for item in step] == [[1 / 3, 0], [1 / 3, 1 / 3]]
    assert metrics["zero_std_ratio"] == pytest.approx(1 / 3)
    halves = optimiser_steps(scored_groups(replays, rewards), {"r": 0.5}, algorithm, 0)[0]
    assert [item.weights.tolist() for item in halves[0]] == [[0, 1]]
    assert optimiser_steps(scored_groups(replays, 0 * rewards), {"r": 1.0}, algorithm, 0)[0] == []


def test_an_answer_fits_to_the_last_token_and_no_further(llada: LladaPolicy):
    text = "3214143241232341"
    exact = answer_tokens(llada, f" {text}\n", 17)
    assert len(exact) == 17 and llada.decode(exact[None]) == [text]
    with pytest.raises(ValueError, match=r"takes 17 tokens .* rollout\.length is 16"):
        answer_tokens(llada, text, 16)


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>"])
def test_special_tokens_in_an_answer_are_refused(llada: LladaPolicy, token: str):
    with pytest.raises(ValueError, match="special token") as raised:
        answer_tokens(llada, f"1{token}2", LENGTH)
    assert token in str(raised.value)


def recipe(directory: Path, answers: list[str], *more: str) -> Any:
    path = directory / "answers.jsonl"
    rows = [{"prompt": f"p{n}", "id": f"q{n}", "answer": text} for n, text in enumerate(answers)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = [
        f"prompts={{kind: file, path: {path}}}",
        "evaluation.prompts={kind: sudoku, split: validation, count: 4}",
        "rl.completion='{answer}'",
        *more,
    ]
    return load(Path("sudoku/sft"), Recipe, settings)


def test_a_worker_names_the_prompt_of_an_answer_that_is_too_long(
    llada_directory: Path, tmp_path: Path
):
    loaded = recipe(tmp_path, ["12", "1" * 30, "34"], f"policy.checkpoint={llada_directory}").value
    worker = RolloutWorker(loaded.model_dump_json(), "cpu", 1)
    groups = groups_for(loaded.prompts.load(), seed=0, step=0, count=3, size=1)
    records, *parts = worker.generate(groups, [DecodePlan(given="{answer}")] * 3)
    problems = {g.prompt_id: r.problem for g, r in zip(groups, records, strict=True) if r.problem}
    assert list(problems) == ["q1"] and "prompt 'q1': the answer takes 31" in problems["q1"]
    texts = [media[0] for media in parts[1::2] if media]
    assert sorted(texts) == ["12", "34"]


@pytest.mark.parametrize(
    ("answers", "more", "words"),
    [
        (["1", ""], [], "rl.completion: prompt 'q1' has no column 'answer'"),
        (["1"], ["rl.completion='{sulution}'"], "has no column 'sulution'"),
        (["1"], ["rl.completion=text"], "names no column"),
        (["1"], ["rl.minimum_reward=0.5"], "every weight is 0"),
        (["1"], ["rl.dipod={form: joint}"], "rl.dipod"),
    ],
)
def test_recipes_without_answers_or_with_nothing_to_filter_by_are_refused(
    answers: list[str], more: list[str], words: str, tmp_path: Path
):
    with pytest.raises(RecipeError) as raised:
        check(recipe(tmp_path, answers, *more), 0)
    assert words in str(raised.value) and len(raised.value.problems) == 1


def test_a_run_makes_the_answers_likelier_and_evaluates_by_decoding(
    llada_directory: Path, tmp_path: Path
):
    from rich.console import Console

    settings = [
        f"policy.checkpoint={llada_directory}",
        f"steps={STEPS}",
        "prompts.count=64",
        "rollout.prompts_per_step=16",
        "rollout.steps=6",
        "optimizer={learning_rate: 1e-2, decay: none}",
        f"evaluation={{every: {STEPS}, samples: 8}}",
        "learner={ranks: 1, micro_batch: 32}",
        "workers.count=1",
        "tracking=[]",
    ]
    loaded = load(Path("sudoku/sft"), Recipe, settings).value
    run_locally(loaded, tmp_path / "run", Console(quiet=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    perplexities = [np.exp(-row["elbo/mean"]) for row in rows]
    assert perplexities[-1] < 0.2 * perplexities[0]
    assert all(row["reward/sudoku/mean"] == 1.0 for row in rows), "solutions are right"
    assert all(row["rollout/nfe_per_sample"] == 0 for row in rows)
    (first, last) = [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]
    assert first["evaluation/nfe_per_sample"] == 6, "evaluation decodes"
    assert last["evaluation/length/mean"] != first["evaluation/length/mean"]
