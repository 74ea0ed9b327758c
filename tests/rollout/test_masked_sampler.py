"""Decoding: the exact laws, which tokens a step commits, what it costs, what it may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor, nn

from rollout.draws import Group, Prompt, groups_for
from rollout.masked import (
    DecodePlan,
    MaskedRollout,
    MaskedSampler,
    MaskedSamplerConfig,
    transfer_counts,
)
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import LladaConfig, LladaPolicy
from rollout.policies.llada.pretraining import build_tokenizer, model_sizes

DRAWS = 10_000
# Chi-square of 4 outcomes (3 degrees of freedom): exceeded by chance once in 1000.
CRITICAL = 16.27
# Of AA, AB, BA, BB: random remasking, low confidence, and both tokens at once.
LAWS = (
    (0.410827, 0.136099, 0.170016, 0.283058),
    (0.738640, 0.030539, 0.141709, 0.089112),
    (0.219880, 0.049062, 0.597695, 0.133364),
)
Config = dict[str, Any]
SMALL: Config = {"length": 8, "block_length": 4, "steps": 8, "temperature": 0.0}
Table = Callable[[Tensor], Tensor]
Call = tuple[Tensor, Tensor, int]


class TablePolicy(MaskedDiffusionPolicy):
    """A policy whose logits (B, S, vocabulary) are a function's: one prompt token, no cache."""

    def __init__(self, table: Table, letters: str, eos: int, mask: int) -> None:
        super().__init__(nn.Linear(1, 1), adapted=False, reference=False)
        self.table, self.letters = table, letters
        self.eos_token_id, self.mask_token_id = eos, mask

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor([int(prompt)]) for prompt in prompts]

    def decode(self, tokens: Tensor) -> list[str]:
        eos = self.eos_token_id
        rows = [row[: (*row, eos).index(eos)] for row in tokens.tolist()]
        return ["".join(self.letters[i] for i in row) for row in rows]

    def logits(
        self, tokens: Tensor, attention_mask: Any, where: Tensor, cache: Any = None, start: int = 0
    ) -> Tensor:
        logits = self.table(tokens)
        logits[..., self.mask_token_id] = -torch.inf
        return logits[where]

    def new_cache(self) -> Any:
        raise NotImplementedError

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


def toy_policy() -> TablePolicy:
    """The two tokens of the specification: A is 0, B is 1, the mask 2; no token ends a text."""
    a, b, c, d, e, f = 2.0, -1.0, -0.5, 1.5, 0.3, -0.7

    def table(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 3)
        logits[:, -2, 0] = torch.tensor([a, e, b])[tokens[:, -1]]
        logits[:, -1, 0] = torch.tensor([c, f, d])[tokens[:, -2]]
        return logits

    return TablePolicy(table, "AB", eos=3, mask=2)


def script_policy(texts: Sequence[str], sure: Sequence[float]) -> TablePolicy:
    """Prompt n, unless masked, wants ``texts[n]`` ('.': EOS), place i with probability ``sure[i]``."""
    wanted = torch.tensor([["abcd.".index(letter) for letter in text] for text in texts])
    heights = torch.tensor([math.log(4 * p / (1 - p)) for p in sure])

    def table(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        known = tokens[:, 0] != 5
        one_hot = nn.functional.one_hot(wanted[tokens[known, 0]], 6)
        logits[known, 1:] = one_hot * heights[:, None]
        return logits

    return TablePolicy(table, "abcd", eos=4, mask=5)


def record(policy: MaskedDiffusionPolicy, monkeypatch: MonkeyPatch) -> list[Call]:
    """What the policy is asked from now on: ``tokens`` and ``where`` (B, S), ``start``."""
    calls: list[Call] = []
    compute = policy.logits

    def logits(tokens: Tensor, mask: Any, where: Tensor, cache: Any, start: int) -> Tensor:
        calls.append((tokens.clone(), where.clone(), start))
        return compute(tokens, mask, where, cache, start)

    monkeypatch.setattr(policy, "logits", logits)
    return calls


def random_llada(directory: Path, layers: int) -> LladaPolicy:
    """Random weights, large enough that a place's prediction depends on all others."""
    tokenizer = build_tokenizer("sudoku")
    sizes = {**model_sizes("sudoku"), "d_model": 64, "n_layers": layers, "initializer_range": 0.2}
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = LLaDAModelLM(LLaDAConfig(**sizes, **ids, pad_token_id=None))
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return LladaConfig(checkpoint=str(directory)).build()


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> LladaPolicy:
    return random_llada(tmp_path_factory.mktemp("llada"), layers=2)


def groups_of(*prompts: str, size: int = 1, seed: int = 1) -> list[Group]:
    """With this seed no text of the random network below ends early."""
    loaded = [Prompt(text, text, {}) for text in prompts]
    return groups_for(loaded, seed=seed, step=-1, count=len(loaded), size=size)


def decode(
    policy: MaskedDiffusionPolicy, groups: Sequence[Group], **config: Any
) -> list[MaskedRollout]:
    sampler = MaskedSampler(MaskedSamplerConfig(**config), policy)
    return sampler.sample(groups, [DecodePlan()] * len(groups))


def equal(a: MaskedRollout, b: MaskedRollout) -> bool:
    """Whether two rollouts are the same, steps and cost included."""
    names = ("prompt", "tokens", "lengths", "decode_step", "seeds")
    same = all(np.array_equal(getattr(a.replay, n), getattr(b.replay, n)) for n in names)
    return same and (a.media, a.forwards, a.summary) == (b.media, b.forwards, b.summary)


def test_schedule_golden_numbers():
    assert transfer_counts(32, 5) == [7, 7, 6, 6, 6]
    assert transfer_counts(32, 24) == [2] * 8 + [1] * 16
    assert transfer_counts(3, 5) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("remasking", "steps", "law"),
    [("random", 2, 0), ("low_confidence", 2, 1), ("low_confidence", 1, 2), ("random", 1, 2)],
)
def test_samples_follow_the_exact_law_and_no_other(remasking: str, steps: int, law: int):
    """Chi-square at 99.9 % over 10,000 draws of one batch; the other laws are rejected by far."""
    config = {"length": 2, "block_length": 2, "steps": steps, "remasking": remasking}
    (rollout,) = decode(toy_policy(), groups_of("0", size=DRAWS), **config)
    outcomes = rollout.replay.tokens[:, 0] * 2 + rollout.replay.tokens[:, 1]
    observed = np.bincount(outcomes, minlength=4)
    expected = DRAWS * np.array(LAWS)
    chi_square = ((observed - expected) ** 2 / expected).sum(axis=1)
    assert chi_square[law] < CRITICAL
    assert (np.delete(chi_square, law) > 50 * CRITICAL).all()


def test_temperature_divides_the_logits():
    """Probability .6 against .1 of four others becomes sqrt(6) to 1; chi-square at 99.9 %."""
    config = {"length": 1, "block_length": 1, "steps": 1, "temperature": 2.0}
    (rollout,) = decode(script_policy(["a"], [0.6]), groups_of("0", size=DRAWS), **config)
    expected = DRAWS * np.array([6**0.5, 1, 1, 1, 1]) / (6**0.5 + 4)
    observed = np.bincount(rollout.replay.tokens[:, 0], minlength=5)
    assert ((observed - expected) ** 2 / expected).sum() < 18.47


@pytest.mark.parametrize(("steps", "text"), [(2, "AA"), (1, "BA")])
def test_temperature_zero_takes_the_argmax_and_a_plan_overrides_the_recipe(steps: int, text: str):
    """Of (M, M) the argmax is BA; A at the second place is surer, and turns the first to A."""
    config = MaskedSamplerConfig(length=2, block_length=2, steps=3 - steps, temperature=1.0)
    plan = DecodePlan(steps=steps, temperature=0.0)
    (rollout,) = MaskedSampler(config, toy_policy()).sample(groups_of("0", size=50), [plan])
    assert (rollout.media, rollout.forwards) == ([text] * 50, 50 * steps)


@pytest.mark.parametrize(
    ("steps", "steps_of_places"),
    [(10, [3, 1, 4, 0, 2, 5, 6, 7, 8, 9]), (6, [1, 0, 2, 0, 1, 3, 3, 4, 4, 5])],
)
def test_the_schedule_commits_the_most_confident_first(steps: int, steps_of_places: list[int]):
    sure = [0.6, 0.8, 0.5, 0.9, 0.7, 0.9, 0.8, 0.7, 0.6, 0.5]
    config = {"length": 10, "block_length": 5, "steps": steps, "temperature": 0.0}
    (rollout,) = decode(script_policy(["abcdabcdab"], sure), groups_of("0"), **config)
    assert rollout.replay.decode_step[0].tolist() == steps_of_places
    assert (rollout.media, rollout.forwards) == (["abcdabcdab"], steps)


CONFIGS: list[Config] = [
    {"steps": 8},
    {"steps": 32, "remasking": "random"},
    {"threshold": 0.2},
    {"threshold": 0.2, "cache": "dual"},
    {"steps": 16, "guidance_scale": 1.5, "cache": "prefix"},
]
PROMPTS = ("1230", "Solve this 4x4 Sudoku.", "13 2", "one two three 4")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_committed_tokens_stay_and_logits_are_asked_for_at_masked_places_of_the_block(
    llada: LladaPolicy, config: Config, monkeypatch: MonkeyPatch
):
    calls = record(llada, monkeypatch)
    rollouts = decode(llada, groups_of(*PROMPTS), length=32, block_length=8, **config)
    width = max(len(ids) for ids in llada.encode(PROMPTS))
    final = torch.from_numpy(np.concatenate([r.replay.tokens for r in rollouts]))
    assert not torch.isin(final, torch.tensor([llada.mask_token_id, llada.eos_token_id])).any()
    block, seen = 0, torch.full_like(final, llada.mask_token_id)
    for tokens, where, start in calls:
        first = max(width - start, 0)
        place = start + first - width
        answer, asked = tokens[: len(final), first:], where[: len(final), first:]
        assert not where[:, :first].any()
        seen[:, place : place + answer.shape[1]] = answer
        if not (seen[:, 8 * block : 8 * block + 8] == llada.mask_token_id).any():
            block += 1
        masked = seen == llada.mask_token_id
        assert torch.equal(seen[~masked], final[~masked])
        masked[:, : 8 * block] = masked[:, 8 * block + 8 :] = False
        assert masked.any()
        assert torch.equal(asked, masked[:, place : place + answer.shape[1]])
    assert block == 3


EOS_TEXTS = ["ab.cabcd", "abcdabcd", "abcdabc.", ".bcdabcd"]


@pytest.mark.parametrize(
    ("config", "per_block"),
    [({"steps": 4}, 2), ({"steps": 8}, 4), ({"threshold": 0.9}, 3), ({"guidance_scale": 2.0}, 8)],
    ids=str,
)
def test_rows_stop_with_the_block_of_their_eos(
    config: Config, per_block: int, monkeypatch: MonkeyPatch
):
    policy = script_policy(EOS_TEXTS, [0.95, 0.5, 0.95, 0.6] * 2)
    calls = record(policy, monkeypatch)
    rollouts = decode(policy, groups_of("0", "1", "2", "3", size=3), **{**SMALL, **config})
    assert [r.forwards for r in rollouts] == [3 * per_block * blocks for blocks in (1, 2, 2, 1)]
    assert [r.media for r in rollouts] == [[t.split(".")[0]] * 3 for t in EOS_TEXTS]
    assert [r.summary.lengths for r in rollouts] == [(3,) * 3, (8,) * 3, (8,) * 3, (1,) * 3]
    assert [r.summary.ended for r in rollouts] == [3, 0, 3, 3]
    assert sum(len(tokens) for tokens, _, _ in calls) == sum(r.forwards for r in rollouts)


def test_a_threshold_commits_all_that_are_sure_and_at_least_one():
    """Every token has the step that committed it, -1 after the end."""
    policy = script_policy(EOS_TEXTS, [0.95, 0.5, 0.95, 0.6, 0.5, 0.95, 0.95, 0.95])
    rollouts = decode(policy, groups_of("0", "1", "2", "3"), threshold=0.9, **SMALL)
    assert [r.replay.decode_step[0].tolist() for r in rollouts] == [
        [0, 2, 0, -1, -1, -1, -1, -1],
        [0, 2, 0, 1, 4, 3, 3, 3],
        [0, 2, 0, 1, 4, 3, 3, 3],
        [0, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert rollouts[0].replay.tokens[0].tolist() == [0, 1, 4, 4, 4, 4, 4, 4]
    (strict,) = decode(policy, groups_of("1"), threshold=0.96, **SMALL)
    assert sorted(strict.replay.decode_step[0].tolist()) == list(range(8))


@pytest.mark.parametrize("config", [{"steps": 4}, {"steps": 8, "remasking": "random"}], ids=str)
def test_what_stands_after_the_end_never_matters(config: Config):
    sure, groups = [0.9, 0.8, 0.99, 0.7] * 2, groups_of("0", size=64)
    (plain,), (other,) = (
        decode(script_policy([text], sure), groups, **{**SMALL, **config})
        for text in ("ab.cabcd", "ab.a.d.a")
    )
    assert equal(plain, other)
    assert plain.summary.lengths == (3,) * 64


@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
def test_rows_that_go_on_keep_their_own_noise(remasking: str):
    policy, groups = script_policy(EOS_TEXTS, [0.6] * 8), groups_of("0", "1", "2", "3", size=8)
    config = {**SMALL, "temperature": 1.0, "remasking": remasking}
    for group, rollout in zip(groups, decode(policy, groups, **config), strict=True):
        assert equal(decode(policy, [group], **config)[0], rollout)


@torch.no_grad()
def plain_loop(policy: LladaPolicy, prompt: str, steps: int, w: float) -> list[int]:
    """8 tokens in blocks of 4, ``steps`` each, greedily, one row, as the specification words it."""
    (ids,) = policy.encode([prompt])
    row = torch.cat([ids, torch.full((8,), policy.mask_token_id)])
    for start in range(len(ids), len(row), 4):
        for i in range(steps):
            null = row.clone()
            null[: len(ids)] = policy.mask_token_id
            conditional, unconditional = (policy.module(x[None]).logits[0] for x in (row, null))
            logits = unconditional + (1 + w) * (conditional - unconditional)
            logits[:, policy.mask_token_id] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)
            open_places = [j for j in range(start, start + 4) if row[j] == policy.mask_token_id]
            open_places.sort(key=lambda j: -float(confidence[j]))
            for j in open_places[: 4 // steps + (i < 4 % steps)]:
                row[j] = best[j]
    return row[len(ids) :].tolist()


@pytest.mark.parametrize("w", [0.0, 1.5])
def test_a_batch_of_different_lengths_is_the_plain_loop_on_each(llada: LladaPolicy, w: float):
    config = {**SMALL, "steps": 6, "guidance_scale": 1 + w}
    assert len({len(ids) for ids in llada.encode(PROMPTS)}) > 2
    groups = groups_of(*PROMPTS)
    together = decode(llada, groups, **config)
    for group, rollout in zip(groups, together, strict=True):
        (alone,) = decode(llada, [group], **config)
        assert equal(alone, rollout)
        assert rollout.replay.tokens[0].tolist() == plain_loop(llada, group.prompt, 3, w)


def test_guidance_masks_the_whole_prompt_and_only_it(llada: LladaPolicy, monkeypatch: MonkeyPatch):
    calls = record(llada, monkeypatch)
    groups, config = groups_of("1230", "4321", size=2), {**SMALL, "temperature": 1.0, "steps": 4}
    guided = decode(llada, groups, guidance_scale=2.5, **config)
    width = len(llada.encode(["1230"])[0])
    for tokens, where, _ in calls:
        conditional, null = tokens.chunk(2)
        assert bool((null[:, :width] == llada.mask_token_id).all())
        assert torch.equal(null[:, width:], conditional[:, width:])
        assert torch.equal(*where.chunk(2))
    plain = decode(llada, groups, **config)
    assert [(g.forwards, p.forwards) for g, p in zip(guided, plain, strict=True)] == [(16, 8)] * 2
    assert not equal(plain[0], guided[0])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_results_are_a_function_of_the_draws(llada: LladaPolicy, config: Config):
    """Not of the order of groups, of what a worker did before, or of the global generator."""
    groups = groups_of(*PROMPTS, size=2)
    sampler = MaskedSampler(MaskedSamplerConfig(length=16, block_length=8, **config), llada)
    plans = [DecodePlan()] * len(groups)
    first = sampler.sample(groups, plans)
    sampler.sample(groups_of("a", "bb", size=3, seed=8), plans[:2])
    torch.manual_seed(999)
    before = torch.get_rng_state()
    again = sampler.sample(groups[::-1], plans)
    assert torch.equal(torch.get_rng_state(), before)
    for group, a, b in zip(groups, first, again[::-1], strict=True):
        assert a.group == group == b.group
        assert equal(a, b)
        assert a.replay.seeds.tolist() == [group.draw(i).seed for i in range(2)]
        assert a.replay.prompt.tolist() == llada.encode([group.prompt])[0].tolist()
    assert len({tuple(row) for r in first for row in r.replay.tokens.tolist()}) == 8


@pytest.mark.parametrize(
    ("layers", "config"),
    [(2, {"steps": 3}), (1, {}), (1, {"guidance_scale": 2.0}), (1, {"threshold": 0.2})],
)
def test_caches_are_exact_where_nothing_goes_stale(tmp_path: Path, layers: int, config: Config):
    """One step per block; or one layer, whose keys depend on their own token only."""
    policy, groups = random_llada(tmp_path, layers), groups_of(*PROMPTS, size=2)
    config = {"length": 24, "block_length": 8, "steps": 12, **config}
    plain, prefix, dual = (
        decode(policy, groups, cache=cache, **config) for cache in ("none", "prefix", "dual")
    )
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(plain, prefix, dual, strict=True))


def test_caches_compute_fewer_tokens(llada: LladaPolicy, monkeypatch: MonkeyPatch):
    """And change the samples."""
    calls = record(llada, monkeypatch)
    groups, whole = groups_of("1230", "4321", seed=5), len(llada.encode(["1230"])[0]) + 32
    computed = {"none": 32 * whole, "prefix": 4 * whole + 7 * 80, "dual": 4 * whole + 7 * 4 * 8}
    texts: set[tuple[int, ...]] = set()
    for cache, expected in computed.items():
        calls.clear()
        rollouts = decode(llada, groups, length=32, block_length=8, steps=32, cache=cache)
        assert [r.forwards for r in rollouts] == [32] * 2
        assert sum(tokens.numel() for tokens, _, _ in calls) == 2 * expected
        texts.add(tuple(rollouts[0].replay.tokens[0].tolist()))
    assert len(texts) == 3


@pytest.mark.parametrize("other", [DecodePlan(steps=8), DecodePlan(temperature=0.5)], ids=str)
def test_groups_with_different_plans_are_not_decoded_together(other: DecodePlan):
    sampler, groups = MaskedSampler(MaskedSamplerConfig(), toy_policy()), groups_of("0", "1")
    with pytest.raises(ValueError, match="same plan"):
        sampler.sample(groups, [DecodePlan(), other])
    config = MaskedSamplerConfig(length=2, block_length=2, steps=2)
    same = MaskedSampler(config, toy_policy()).sample(groups, [DecodePlan(), DecodePlan(orders=4)])
    assert [r.group for r in same] == groups


def test_an_exact_plan_uses_neither_cache_nor_threshold(llada: LladaPolicy):
    groups = groups_of("1230", "4321", seed=3)
    plain = decode(llada, groups, length=16, block_length=8, steps=16)
    config = MaskedSamplerConfig(length=16, block_length=8, steps=16, cache="dual", threshold=0.01)
    exact = MaskedSampler(config, llada).sample(groups, [DecodePlan(exact=True)] * 2)
    assert all(equal(a, b) for a, b in zip(plain, exact, strict=True))
