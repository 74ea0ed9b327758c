"""Guided text: the exact laws of what is returned, what it costs, what it may depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from pytest import MonkeyPatch
from test_masked_sampler import (
    CONFIGS,
    EOS_TEXTS,
    PROMPTS,
    SMALL,
    Config,
    TablePolicy,
    decode,
    equal,
    groups_of,
    random_llada,
    record,
    script_policy,
)
from torch import Tensor

from rollout.draws import Group, keyed_uniform
from rollout.guidance.contract import GuidanceError
from rollout.guidance.text import GuidedText, TextBestOfN, TextMethod, TextSMC, log_product
from rollout.masked import MaskedRollout, MaskedSamplerConfig
from rollout.policies.llada.policy import LladaPolicy

Scores = Callable[[Sequence[str], Sequence[Group]], np.ndarray]
# Every text of at most three letters A and B, shorter ones ended by an EOS.
TEXTS = ["".join(letters) for n in range(4) for letters in itertools.product("AB", repeat=n)]
BY_LETTER: Config = {"length": 3, "block_length": 1, "steps": 3}
# Chi-square by degrees of freedom: exceeded by chance once in 1000.
CRITICAL = {9: 27.88, 14: 36.12}
# At which 9 texts are common, and the others one outcome more.
LAM = 2.5
NOT_SCORED = "AB"


def tree_policy() -> TablePolicy:
    """Unrelated logits of A, B and the end for each of the 64 states of three places."""
    logits = 0.6 * torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(3))

    def table(tokens: Tensor) -> Tensor:
        answers = logits[(tokens[:, 1:] * torch.tensor([16, 4, 1])).sum(1)]
        return torch.cat([torch.zeros(len(tokens), 1, 4), answers], dim=1)

    return TablePolicy(table, "AB", eos=2, mask=3)


def law() -> np.ndarray:
    """p of each of ``TEXTS``, letter after letter."""
    policy = tree_policy()
    found: list[float] = []
    for text in TEXTS:
        wanted = ["AB".index(letter) for letter in text] + [2] * (len(text) < 3)
        row, log_p = torch.tensor([[0, 3, 3, 3]]), 0.0
        for place, token in enumerate(wanted, 1):
            where = torch.arange(4)[None] == place
            log_p += float(policy.logits(row.clone(), None, where)[0].log_softmax(0)[token])
            row[0, place] = token
        found.append(math.exp(log_p))
    assert sum(found) == pytest.approx(1, abs=1e-5)
    return np.array(found)


REWARDS = np.random.default_rng(5).uniform(-1, 1, size=len(TEXTS))


def table_scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
    """Distinct rewards; one text is not scored."""
    return np.array([math.nan if t == NOT_SCORED else REWARDS[TEXTS.index(t)] for t in texts])


def tilted(lam: float) -> np.ndarray:
    weights = law() * np.exp(lam * REWARDS) * np.array([t != NOT_SCORED for t in TEXTS])
    return weights / weights.sum()


def hash_of(text: str) -> float:
    """Some number in [0, 1) of a text."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text)) * 0.6180339887 % 1


def hash_scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
    return np.array([hash_of(text) for text in texts])


def chi_square(media: Sequence[str], probabilities: np.ndarray) -> float:
    """Texts expected less than five times are one outcome; impossible ones must not occur."""
    observed = np.bincount([TEXTS.index(text) for text in media], minlength=len(TEXTS))
    assert observed[probabilities == 0].sum() == 0
    expected = len(media) * probabilities
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum())


def guided(
    method: TextBestOfN | TextSMC,
    groups: Sequence[Group],
    policy: Any = None,
    scores: Scores = table_scores,
    **config: Any,
) -> tuple[list[MaskedRollout], dict[str, list[int]]]:
    sampler = GuidedText(MaskedSamplerConfig(**config), policy or tree_policy(), scores)
    rollouts, counts = sampler.sample(groups, method)
    return rollouts, {name: column.tolist() for name, column in counts.columns.items()}


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> LladaPolicy:
    return random_llada(tmp_path_factory.mktemp("llada"), layers=2)


@pytest.mark.parametrize("potential", ["diff", "max", "add"])
def test_smc_draws_from_the_tilted_law_as_particles_grow_in_number(potential: Any):
    """Chi-square at 99.9 % of 1,000 draws of 64 particles; of 4, and of other tilts, far off."""
    few, many = (
        guided(
            TextSMC(particles=n, beta=1 / LAM, potential=potential, select="sample"),
            groups_of("0", size=1000),
            **BY_LETTER,
            batch_size=6400,
        )[0][0].media
        for n in (4, 64)
    )
    assert chi_square(many, tilted(LAM)) < CRITICAL[9]
    assert chi_square(few, tilted(LAM)) > 2 * CRITICAL[9]
    for other in (0.0, LAM / 2, 2 * LAM):
        assert chi_square(many, tilted(other)) > 4 * CRITICAL[9]


def test_the_best_of_n_has_the_law_of_the_highest_of_n():
    """P(r <= r(x))^N - P(r < r(x))^N, the text that is not scored lowest; and E max within 4 SE."""
    n, draws, p = 3, 3000, law()
    rewards = np.where([t == NOT_SCORED for t in TEXTS], -np.inf, REWARDS)
    up_to = np.array([p[rewards <= r].sum() for r in rewards])
    highest = up_to**n - (up_to - p) ** n
    (rollout,), _ = guided(TextBestOfN(samples=n), groups_of("0", size=draws), **BY_LETTER)
    rare = highest * draws < 5
    assert highest[rare].sum() < 0.01
    observed = np.bincount([TEXTS.index(t) for t in rollout.media], minlength=15)[~rare]
    expected = draws * highest[~rare]
    assert ((observed - expected) ** 2 / expected).sum() < CRITICAL[14]
    finite = np.where(np.isfinite(rewards), rewards, 0)
    mean = highest @ finite
    error = math.sqrt((highest @ finite**2 - mean**2) / draws)
    found = np.mean([finite[TEXTS.index(text)] for text in rollout.media])
    assert abs(found - mean) < 4 * error
    assert mean - p @ finite > 40 * error


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("method", [TextBestOfN(samples=1), TextSMC(particles=1)])
def test_one_candidate_is_the_plain_sampler_s(
    llada: LladaPolicy, config: Config, method: TextBestOfN | TextSMC
):
    groups = groups_of(*PROMPTS, size=2)
    config = {"length": 32, "block_length": 8, **config}
    plain = decode(llada, groups, **config)
    rollouts, counts = guided(method, groups, llada, lambda t, g: np.zeros(len(t)), **config)
    ahead = 0
    if method.kind == "smc":
        ahead = 2 * 3 * (2 if config.get("guidance_scale") else 1)
    for a, b in zip(plain, rollouts, strict=True):
        assert b.forwards == a.forwards + ahead
        assert equal(a, MaskedRollout(b.group, b.replay, b.media, a.forwards, b.summary))
    assert sum(counts["forwards"]) == sum(r.forwards for r in rollouts)


@pytest.mark.parametrize(
    ("config", "per_block"),
    [({"steps": 4}, 2), ({"steps": 80}, 4), ({"threshold": 0.9}, 3), ({"guidance_scale": 2.0}, 8)],
    ids=str,
)
def test_cost_is_exact(config: Config, per_block: int, monkeypatch: MonkeyPatch):
    """Texts end in block 1, 2, 2 and 1; looking ahead costs an evaluation of those that go on."""
    policy = script_policy(EOS_TEXTS, [0.999, 0.5, 0.999, 0.6] * 2)
    calls = record(policy, monkeypatch)
    groups = groups_of("0", "1", "2", "3", size=2)
    options: Config = {**SMALL, "remasking": "random", "batch_size": 1000, **config}
    if "threshold" in config:
        options["remasking"], options["temperature"] = "low_confidence", 1e-3
    ahead = 2 if "guidance_scale" in config else 1
    for method, looks in ((TextBestOfN(samples=3), 0), (TextSMC(particles=3), 1)):
        calls.clear()
        rollouts, counts = guided(
            method, groups, policy, lambda texts, _: np.zeros(len(texts)), **options
        )
        forwards = [3 * (per_block * blocks + looks * ahead * (blocks - 1)) for blocks in (1, 2)]
        by_group = [forwards[0], forwards[1], forwards[1], forwards[0]]
        assert counts["forwards"] == [n for n in by_group for _ in range(2)]
        assert counts["rewards"] == [3 * (1 + looks * two) for two in (0, 1, 1, 0) for _ in "ab"]
        assert [r.forwards for r in rollouts] == [2 * n for n in by_group]
        assert sum(len(tokens) for tokens, _, _ in calls) == sum(counts["forwards"])
        assert not any(map(any, (counts[k] for k in ("backwards", "decodes", "reward_backwards"))))
        assert method.evaluations(MaskedSamplerConfig(**options)) * 3 >= forwards[1]
        if "threshold" not in config:
            assert method.evaluations(MaskedSamplerConfig(**options)) * 3 == forwards[1]


@pytest.mark.parametrize("method", [TextBestOfN(), TextSMC()])
@pytest.mark.parametrize(("nfe", "candidates"), [(1, 1), (23, 1), (26, 1), (52, 2), (1000, 38)])
def test_a_budget_is_used_up_but_not_passed(
    method: TextBestOfN | TextSMC, nfe: int, candidates: int
):
    """24 steps in 3 blocks: 24 evaluations a completion, 26 a particle."""
    steps = method.evaluations(MaskedSamplerConfig())
    assert steps == (26 if method.kind == "smc" else 24)
    fitted = method.at_budget(nfe, steps)
    assert fitted.candidates == (candidates if steps == 26 else max(nfe // 24, 1))
    assert type(fitted) is type(method)
    assert fitted.candidates * steps <= max(nfe, steps) < (fitted.candidates + 1) * steps


def test_copies_of_a_particle_go_on_with_their_own_noise():
    """Only what begins with A counts: all particles become copies of those, and end differently."""
    policy, calls = script_policy(["aaaa"], [0.2] * 4), list[list[str]]()

    def scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
        calls.append(list(texts))
        return np.array([float(text.startswith("a")) for text in texts])

    method = TextSMC(particles=64, beta=1 / 50, select="sample")
    config: Config = {"length": 4, "block_length": 1, "steps": 4, "batch_size": 64}
    guided(method, groups_of("0"), policy, scores, **config)
    began = [{text[:1] for text in texts} for texts in calls]
    assert len(began[0]) > 3
    assert began[1:] == [{"a"}] * 3
    survivors = sum(text.startswith("a") for text in calls[0])
    assert survivors < 20
    assert len({text[:3] for text in calls[-1]}) > survivors


def factor(potential: str, rewards: Sequence[float]) -> float:
    if potential == "diff":
        return rewards[-1] - (rewards[-2] if len(rewards) > 1 else 0.0)
    return max(rewards) if potential == "max" else sum(rewards)


@pytest.mark.parametrize("potential", ["diff", "max", "add"])
def test_particles_are_resampled_by_what_their_own_paths_gathered(potential: Any):
    """Followed by hand from the scored texts: a path's rewards are those of its text's prefixes."""
    calls: list[list[str]] = []

    def scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
        calls.append(list(texts))
        return hash_scores(texts, groups)

    def table(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 5)

    n, (group,) = 16, groups_of("0")
    lam = 8 if potential == "diff" else 3
    method = TextSMC(particles=n, beta=1 / lam, potential=potential)
    config: Config = {"length": 6, "block_length": 1, "steps": 6}
    policy = TablePolicy(table, "abcd", eos=5, mask=4)
    (rollout,), _ = guided(method, [group], policy, scores, **config)
    found: dict[str, float] = {}
    logs, resampled = np.zeros(n), list[bool]()
    for k, texts in enumerate(calls):
        prefixes = [text[: k + 1] for text in texts]
        found |= {a: hash_of(b) for a, b in zip(prefixes, texts, strict=True)}
        paths = [[found[prefix[: i + 1]] for i in range(k + 1)] for prefix in prefixes]
        logs += [lam * factor(potential, path) for path in paths]
        weights = np.exp(logs) / np.exp(logs).sum()
        resampled.append(bool(1 / (weights**2).sum() < n / 2))
        if resampled[-1] and k < 5:
            offset = keyed_uniform(group.draw(0).seed, "resampling", k + 1)
            places = np.searchsorted(weights.cumsum(), (np.arange(n) + offset) / n)
            prefixes, logs = [prefixes[place] for place in places], np.zeros(n)
        if k < 5:
            assert [text[: k + 1] for text in calls[k + 1]] == prefixes
    assert len(set(resampled[:5])) == 2
    assert rollout.media == [max(calls[-1], key=hash_of)]


def test_steps_of_decoding_belong_to_the_text_that_is_returned():
    """In a block the first token says a and the second b, in a random order."""

    def table(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 4)
        pairs = tokens[:, 1:].unflatten(1, (-1, 2))
        logits[:, 1:, 0] = (pairs == 3).all(2).repeat_interleave(2, dim=1) * 80 - 40
        logits[..., 2] = -80
        return logits

    policy, groups = TablePolicy(table, "ab", eos=2, mask=3), groups_of("0", size=8)
    config: Config = {"length": 8, "block_length": 2, "steps": 8, "remasking": "random"}

    (rollout,), _ = guided(TextSMC(particles=8, beta=1 / 20), groups, policy, hash_scores, **config)
    assert len(set(rollout.media)) > 2
    for text, steps in zip(rollout.media, rollout.replay.decode_step.tolist(), strict=True):
        assert steps == [2 * (i // 2) + "ab".index(letter) for i, letter in enumerate(text)]


METHODS: list[TextBestOfN | TextSMC] = [
    TextBestOfN(samples=4),
    TextSMC(particles=5, beta=1 / 3),
    TextSMC(particles=5, beta=1 / 3, potential="add", select="sample"),
    TextSMC(particles=5, beta=1 / 3, potential="max", select="sample"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_results_are_a_function_of_the_draws(method: TextBestOfN | TextSMC):
    """Not of what is decoded beside them, of its order, or of the global generator."""
    groups, policy = groups_of("0", "1", "2", "0", size=6), tree_policy()
    first, counts = guided(method, groups, policy, **BY_LETTER)
    torch.manual_seed(999)
    before = torch.get_rng_state()
    again, _ = guided(method, groups[::-1], policy, **BY_LETTER, batch_size=1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(equal(a, b) for a, b in zip(first, again[::-1], strict=True))
    alone = [guided(method, [group], **BY_LETTER, batch_size=1) for group in groups]
    assert all(equal(a, b[0]) for a, (b, _) in zip(first, alone, strict=True))
    assert counts["forwards"] == [n for _, c in alone for n in c["forwards"]]
    assert counts["rewards"] == [n for _, c in alone for n in c["rewards"]]
    assert len({tuple(r.media) for r in first}) == 4
    seeds = [r.replay.seeds.tolist() for r in first]
    assert seeds == [[group.draw(j).seed for j in range(6)] for group in groups]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_prompts_of_different_lengths_are_guided_as_each_alone(
    llada: LladaPolicy, method: TextBestOfN | TextSMC
):
    groups, config = groups_of(*PROMPTS), {**SMALL, "temperature": 1.0, "cache": "dual"}
    together, _ = guided(method, groups, llada, hash_scores, **config)
    for group, rollout in zip(groups, together, strict=True):
        assert equal(guided(method, [group], llada, hash_scores, **config)[0][0], rollout)
        steps = rollout.replay.decode_step[0]
        assert sorted(steps.tolist()) == list(range(8))


def test_texts_are_scored_for_their_own_group():
    """Each group wants its own letter."""

    def scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
        return np.array([t.count(g.prompt) for t, g in zip(texts, groups, strict=True)])

    policy = script_policy(["aaaa"] * 4, [0.2] * 4)
    policy.encode = lambda prompts: [torch.tensor(["abcd".index(p)]) for p in prompts]
    config: Config = {"length": 4, "block_length": 1, "steps": 4}
    groups = groups_of(*"abcd", size=4)
    method = TextSMC(particles=32, beta=1 / 8)
    for rollout in guided(method, groups, policy, scores, **config)[0]:
        assert rollout.media == [rollout.group.prompt * 4] * 4


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_any_score_a_plain_sample_comes_out(method: TextBestOfN | TextSMC):
    def scores(texts: Sequence[str], groups: Sequence[Group]) -> np.ndarray:
        return np.full(len(texts), np.nan)

    (rollout,), _ = guided(method, groups_of("0", size=1500), scores=scores, **BY_LETTER)
    assert chi_square(rollout.media, law()) < CRITICAL[14]


def test_golden_products_of_potentials():
    rewards = torch.tensor([[0, 0.2, 1], [0, 0.6, 0.4], [0, -0.1, 0.9]], dtype=torch.float64).T
    products = log_product(rewards, "diff", 0.5).exp()
    assert products.tolist() == pytest.approx([1.648721, 1.221403, 1.568312], abs=1e-6)
    factors = (0.5 * rewards.diff(dim=0, prepend=torch.zeros(1, 3))).exp()
    assert products.tolist() == pytest.approx(factors.prod(0).tolist())
    assert log_product(rewards, "max", 0.5).tolist() == pytest.approx([0.6, 0.6, 0.45])
    assert log_product(rewards, "add", 0.5).tolist() == pytest.approx([0.7, 0.8, 0.35])


def test_methods_are_told_by_their_kind():
    adapter: TypeAdapter[Any] = TypeAdapter(TextMethod)
    assert adapter.validate_python({"kind": "best_of_n", "samples": 3}) == TextBestOfN(samples=3)
    made = adapter.validate_python(
        {"kind": "smc", "particles": 2, "beta": 0.25, "potential": "add"}
    )
    assert made == TextSMC(particles=2, beta=0.25, potential="add")
    for wrong in ({"kind": "smc", "beta": 0}, {"kind": "smc", "samples": 2}, {"kind": "beam"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_candidates_that_cannot_differ_and_scores_of_another_shape_are_refused():
    groups = groups_of("0")
    config: Config = {**BY_LETTER, "temperature": 0.0}
    for method in METHODS:
        with pytest.raises(GuidanceError, match=r"temperature 0: set rollout\.temperature"):
            guided(method, groups, **config)
    guided(TextBestOfN(samples=1), groups, **config)
    guided(TextBestOfN(samples=2), groups, **config, remasking="random")
    with pytest.raises(ValueError, match=r"scores of 8 texts have the shape \(8, 1\)"):
        guided(TextBestOfN(), groups, None, lambda t, g: np.zeros((len(t), 1)), **BY_LETTER)
