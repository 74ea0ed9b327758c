"""Each objective against its formula; masks and losses that no cut into micro-batches changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import (
    CONFIGS,
    REWARDS,
    WINDOW,
    batch_of,
    batches,
    build,
    completions,
    gradient,
    item_of,
    items_of,
    joint,
    random_llada,
    random_policy,
    scored_groups,
)

from rl.advantages import group_advantages
from rl.diffu_grpo import DiffuGRPOConfig
from rl.espo import ESPOConfig
from rl.fpo import FPOConfig
from rl.items import share
from rl.rollout_set import optimiser_steps
from rl.spg import SPGConfig
from rl.text import TextAlgorithm, TextSettings, clipped
from rl.text_batches import TextBatch, token_log_probs
from rl.trace_rl import TraceRLConfig
from rl.wd1 import WD1Config
from rollout.policies.llada.policy import LladaPolicy

LENGTHS = (6, 3, 5, 1, 4)
ADVANTAGES = (-0.7, -0.4, 0.0, -1.2, 0.3)
WITH_RATIO = ("diffu_grpo", "fpo", "espo", "trace_rl")
PER_TOKEN = ("spg", "diffu_grpo", "trace_rl")


def prepared(config: TextSettings) -> tuple[TextAlgorithm, TextBatch, Tensor]:
    """An algorithm, a batch at its own masks, and random log-probabilities in fp64."""
    algorithm = build(config)
    policy = random_policy(WINDOW, 2, context=False)
    tokens = np.zeros((len(LENGTHS), WINDOW), np.int64)
    item = item_of(completions(tokens, LENGTHS, prompt=4), ADVANTAGES, np.ones(5))
    batch = batch_of(policy, [item], algorithm.masks)
    generator = torch.Generator().manual_seed(7)
    values = -3 * torch.rand(batch.scored.shape, generator=generator, dtype=torch.float64)
    return algorithm, batch, values * batch.scored


def nudged(log_probs: Tensor, batch: TextBatch, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = size * torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    return (log_probs + noise) * batch.scored


def bound(log_probs: Tensor, batch: TextBatch, j: int) -> Tensor:
    """ELBO of completion ``j`` in nats, in loops."""
    draws = range(log_probs.shape[1])
    rows = [log_probs[j, d][batch.scored[j, d]].sum() * batch.scale[j, d] for d in draws]
    return torch.stack(rows).mean()


def upper(log_probs: Tensor, batch: TextBatch, j: int, b: float) -> Tensor:
    """EUBO of completion ``j`` per covered token, in loops and not in log space."""
    terms: list[Tensor] = []
    for i in range(WINDOW):
        draws = [d for d in range(log_probs.shape[1]) if batch.scored[j, d, i]]
        if draws:
            powers = [batch.scale[j, d] * (b * log_probs[j, d, i]).exp() for d in draws]
            terms.append((torch.stack(powers).sum() / log_probs.shape[1]).log() / b)
    return torch.stack(terms).mean()


def ppo(ratio: Tensor, advantage: Tensor | float, c: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - c, 1 + c) * advantage)


def spg_formula(config: SPGConfig) -> Callable[..., Tensor]:
    def formula(x: Tensor, old: Tensor, reference: Tensor, batch: TextBatch, j: int) -> Tensor:
        advantage, length = ADVANTAGES[j], LENGTHS[j]
        lower = bound(x, batch, j) / length
        if advantage > 0 or config.negatives == "elbo":
            return -advantage * lower
        omega = {"mix": config.omega, "eubo": 1.0, "zero": 0.0}[config.negatives]
        mixed = omega * upper(x, batch, j, config.b) + (1 - omega) * lower
        return -advantage * mixed * (config.negatives != "zero")

    return formula


def token_formula(c: float, beta: float, k3: bool) -> Callable[..., Tensor]:
    """Token-level PPO, a mean over a completion's tokens, and a KL."""

    def formula(x: Tensor, old: Tensor, reference: Tensor, batch: TextBatch, j: int) -> Tensor:
        place = batch.scored[j]
        losses = ppo((x[j] - old[j])[place].exp(), ADVANTAGES[j], c)
        difference = (reference[j] - x[j])[place]
        kl = difference.exp() - difference - 1 if k3 else difference**2 / 2
        assert len(losses) == LENGTHS[j]
        return (losses + beta * kl).mean()

    return formula


def sequence_formula(c: float, beta: float, per_token: bool) -> Callable[..., Tensor]:
    """PPO on bounds in nats, over the length where the ratio is per token."""

    def formula(x: Tensor, old: Tensor, reference: Tensor, batch: TextBatch, j: int) -> Tensor:
        length = LENGTHS[j] if per_token else 1
        new, before, anchor = (bound(part, batch, j) for part in (x, old, reference))
        kl = (new - anchor) ** 2 / (2 * length)
        return ppo(((new - before) / length).exp(), ADVANTAGES[j], c) + beta * kl

    return formula


def wd1_formula(x: Tensor, old: Tensor, reference: Tensor, batch: TextBatch, j: int) -> Tensor:
    return -ADVANTAGES[j] * x[j, 0, : LENGTHS[j]].mean()


def spg_case(draws: int = 3, **options: Any) -> tuple[TextSettings, Callable[..., Tensor]]:
    config = SPGConfig(draws=draws, **options)
    return config, spg_formula(config)


FORMULAS: dict[str, tuple[TextSettings, Callable[..., Tensor]]] = {
    "spg": spg_case(),
    # A single draw does not cover all tokens.
    "spg random": spg_case(masking="random", omega=0.3, b=1.0, draws=1),
    "spg eubo": spg_case(negatives="eubo", masking="random"),
    "spg elbo": spg_case(negatives="elbo"),
    "spg zero": spg_case(negatives="zero"),
    "diffu_grpo": (DiffuGRPOConfig(), token_formula(0.5, 0.04, True)),
    "trace_rl": (TraceRLConfig(segments=3), token_formula(0.2, 0.0, False)),
    "trace_rl kl": (
        TraceRLConfig(segments=3, kl_coefficient=0.1),
        token_formula(0.2, 0.1, False),
    ),
    "fpo": (FPOConfig(draws=3), sequence_formula(0.5, 0.0, False)),
    "fpo kl": (FPOConfig(draws=3, kl_coefficient=0.1), sequence_formula(0.5, 0.1, False)),
    "espo": (ESPOConfig(draws=4), sequence_formula(0.2, 0.0, True)),
    "espo kl": (ESPOConfig(draws=4, kl_coefficient=0.1), sequence_formula(0.2, 0.1, True)),
    "wd1": (WD1Config(), wd1_formula),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", [0.02, 0.8], ids=["inside the clip", "on both sides"])
def test_value_and_gradient_are_the_formula_s(name: str, size: float):
    config, formula = FORMULAS[name]
    algorithm, batch, log_probs = prepared(config)
    old, reference = (nudged(log_probs, batch, size, seed) for seed in (1, 2))
    x, y = (log_probs.clone().requires_grad_() for _ in range(2))
    anchor = reference if config.kl_coefficient else None
    losses, table = algorithm.objective(x * batch.scored, old, anchor, batch)
    wanted = torch.stack([formula(y, old, reference, batch, j) for j in range(len(LENGTHS))])
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), y)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-6)
    if name in WITH_RATIO:
        assert bool(table["clipped"].any()) == (size > 0.1)
    assert gradient.abs().max() > 0.001


@pytest.mark.parametrize("name", WITH_RATIO)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("rise", [3.0, -3.0])
def test_beyond_the_clip_range_only_the_way_back_has_a_gradient(
    name: str, advantage: float, rise: float
):
    """Log-probabilities 3 above or below the old ones: the ratio is outside for every objective."""
    algorithm, batch, old = prepared(CONFIGS[name])
    batch = replace(batch, advantages=torch.full((len(LENGTHS),), advantage))
    present = ((old + rise) * batch.scored).requires_grad_()
    losses, table = algorithm.objective(present, old, None, batch)
    losses.sum().backward()
    assert present.grad is not None
    gone_too_far = advantage * rise > 0
    assert table["clipped"].tolist() == [float(gone_too_far)] * len(LENGTHS)
    assert ((table["ratio"] > 1.5) if rise > 0 else (table["ratio"] < 0.5)).all()
    pulls = present.grad.flatten(1).abs().max(1).values > 0
    assert pulls.tolist() == [advantage != 0 and not gone_too_far] * len(LENGTHS)
    if pulls.any():
        assert (present.grad * -advantage >= 0).all()


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_beyond_the_range_of_exp_leaves_the_gradient_finite(advantage: float):
    """100 nats over a whole completion: the others of its batch must not become NaN."""
    log_ratio = torch.tensor([100.0, 0.1, -200.0], requires_grad=True)
    losses, ratio, _ = clipped(log_ratio, torch.tensor([advantage, 1.0, -1.0]), 0.5)
    (torch.tensor([0.0, 1.0, 1.0]) * losses).sum().backward()
    assert torch.isfinite(ratio).all()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.0, -math.exp(0.1), 0.0])


def test_k3_is_never_negative_and_zero_at_the_reference():
    algorithm, batch, log_probs = prepared(DiffuGRPOConfig())
    reference = nudged(log_probs, batch, 1.0, 3)
    _, table = algorithm.objective(log_probs, log_probs, reference, batch)
    assert (table["kl"] > 0).all()
    _, table = algorithm.objective(log_probs, log_probs, log_probs, batch)
    assert not table["kl"].any()


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_kl_is_to_the_weights_before_training_and_the_ratio_to_the_old_scores(name: str):
    """From a policy that has moved: what is frozen and what was stored, not what is present."""
    algorithm = build(CONFIGS[name].model_copy(update={"kl_coefficient": 0.1}))
    policy = random_policy(WINDOW, 2, reference=True)
    tokens = np.random.default_rng(0).integers(2, size=(5, WINDOW))
    item = item_of(completions(tokens, LENGTHS), ADVANTAGES, np.full(5, 0.2))
    batch = batch_of(policy, [item], algorithm.masks)
    frozen = token_log_probs(policy, batch).detach()
    with torch.no_grad():
        noise = torch.randn(policy.theta.shape, generator=torch.Generator())
        policy.theta.add_(0.1 * noise)
    stored = nudged(algorithm.scores(policy, batch).detach(), batch, 0.05, 4)
    present = token_log_probs(policy, batch)
    losses, wanted = algorithm.objective(present, stored, frozen, batch)
    loss, table = algorithm.loss(policy, replace(batch, old=stored))
    assert loss.item() == pytest.approx(0.2 * losses.sum().item(), rel=1e-6)
    for column in ("ratio", "kl"):
        torch.testing.assert_close(table[column], wanted[column].detach())
        assert (table[column] != (1.0 if column == "ratio" else 0.0)).all()


@pytest.mark.parametrize("config", [SPGConfig, WD1Config])
def test_objectives_without_a_kl_refuse_its_coefficient(config: type[TextSettings]):
    assert config(kl_coefficient=0.0).kl_coefficient == 0
    with pytest.raises(ValueError, match="kl_coefficient"):
        config(kl_coefficient=0.1)


def test_golden_group_advantages_are_what_text_algorithms_use_by_default():
    golden = [0.633333, 0.633333, -0.266667, -0.366667, -0.366667, -0.266667]
    rewards = {"r": np.array([[1, 1, 0.1, 0, 0, 0.1]])}
    for name in CONFIGS.keys() - {"wd1"}:
        (row,) = build(CONFIGS[name]).advantages(rewards, {"r": 1.0})
        assert row == pytest.approx(golden, abs=5e-7)
    (row,) = group_advantages(rewards, {"r": 1.0}, TextSettings().advantages)
    assert row == pytest.approx(golden, abs=5e-7)


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum()


def test_wd1_weighs_by_softmaxes_of_plus_and_minus_the_advantage():
    algorithm = build(WD1Config(psi=2.0))
    rewards = np.array([[1.0, 0.0, 0.25, 0.0], [0.5, np.nan, 0.5, 1.0], [0.3] * 4])
    got = algorithm.advantages({"r": rewards}, {"r": 1.0})
    first, second = rewards[0], rewards[1, [0, 2, 3]]
    assert got[0] == pytest.approx(4 * (softmax(2 * first) - softmax(-2 * first)))
    assert np.isnan(got[1, 1])
    assert got[1, [0, 2, 3]] == pytest.approx(3 * (softmax(2 * second) - softmax(-2 * second)))
    assert not got[2].any()
    assert np.nansum(got, axis=1) == pytest.approx(np.zeros(3), abs=1e-12)


def test_wd1_s_loss_is_a_mean_over_groups_of_weighted_likelihoods():
    """And a group of equal rewards is not sent, one of samples without scores neither."""
    rewards = np.array([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [0.0, 1.0, 1.0]])
    policy, algorithm = random_policy(4, 3), build(WD1Config(), 4)
    rng = np.random.default_rng(0)
    lengths = [[4, 2, 3], [1, 2, 3], [2, 4, 1]]
    groups = [completions(rng.integers(3, size=(3, 4)), row) for row in lengths]
    steps, _ = optimiser_steps(scored_groups(groups, rewards), {"r": 1.0}, algorithm, 0)
    assert [len(items) for items in steps] == [2] * 4
    batch = batch_of(policy, steps[0], algorithm.masks)
    loss, _ = algorithm.loss(policy, batch)
    log_probs = policy.theta[-1].log_softmax(1)  # of a whole answer masked
    wanted = torch.zeros((), dtype=torch.float64)
    for group, row, sizes in zip(groups, rewards, lengths, strict=True):
        weights = softmax(row - row.mean()) - softmax(row.mean() - row)
        for j, n in enumerate(sizes):
            chosen = log_probs[torch.arange(n), torch.from_numpy(group.tokens[j, :n])]
            wanted = wanted - weights[j] * chosen.mean() / 3
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)
    missing = np.full((1, 3), np.nan)
    steps, _ = optimiser_steps(scored_groups(groups[:1], missing), {"r": 1.0}, algorithm, 0)
    assert steps == []


# A small LLaDA from here on.


@pytest.fixture(scope="module")
def llada() -> LladaPolicy:
    return random_llada()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dipod", [False, True])
def test_loss_and_gradient_depend_on_no_micro_batch_and_no_rank(
    llada: LladaPolicy, name: str, dipod: bool
):
    algorithm = build(joint(CONFIGS[name]) if dipod else CONFIGS[name])
    items = items_of(llada, algorithm)
    state = torch.random.get_rng_state()
    loss, whole, _ = gradient(llada, algorithm, items, 12, shift=0.01)
    assert torch.equal(state, torch.random.get_rng_state())
    largest = float(whole.abs().max())
    assert largest > 1e-3
    for size in (1, 5):
        other, other_gradient, _ = gradient(llada, algorithm, items, size, shift=0.01)
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(other_gradient, whole, rtol=1e-3, atol=1e-4 * largest)
    parts = [gradient(llada, algorithm, part, 4, shift=0.01) for part in share(items, 3)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-5)
    together = torch.stack([part[1] for part in parts]).sum(0)
    torch.testing.assert_close(together, whole, rtol=1e-3, atol=1e-4 * largest)


def test_a_rank_without_work_adds_exactly_nothing(llada: LladaPolicy):
    for config in CONFIGS.values():
        algorithm = build(joint(config.model_copy()))
        (batch,) = algorithm.batches(llada, [], lambda replay: replay, 12, 1)
        if algorithm.needs_old:
            batch = replace(batch, old=algorithm.scores(llada, batch).detach())
        llada.module.zero_grad()
        loss, table = algorithm.loss(llada, batch)
        loss.backward()
        assert loss.item() == 0
        assert all(len(column) == 0 for column in table.values())
        gradients = [p.grad for p in llada.trainable().values() if p.grad is not None]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_before_an_update_the_ratio_is_one_and_nothing_is_clipped(llada: LladaPolicy, name: str):
    algorithm = build(CONFIGS[name].model_copy(update={"kl_coefficient": 0.1}))
    items = items_of(llada, algorithm)
    _, _, tables = gradient(llada, algorithm, items, 5)
    for column, value in (("ratio", 1.0), ("clipped", 0.0), ("kl", 0.0)):
        assert torch.cat([table[column] for table in tables]).tolist() == [value] * 12
    table = {k: v.numpy() for k, v in tables[0].items()}
    assert algorithm.check_drift(table, "float32")["drift/exact"] == 1.0


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_present_scores_are_the_old_ones_where_none_are_given(llada: LladaPolicy, name: str):
    algorithm = build(CONFIGS[name])
    (batch,) = batches(llada, algorithm, items_of(llada, algorithm), 12)
    stored = replace(batch, old=algorithm.scores(llada, batch).detach())
    left, right = (
        torch.autograd.grad(algorithm.loss(llada, b)[0], list(llada.trainable().values()))
        for b in (batch, stored)
    )
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_without_a_score_has_no_weight(llada: LladaPolicy, name: str):
    rewards = REWARDS.copy()
    rewards[1, 2] = np.nan
    algorithm = build(joint(CONFIGS[name]))
    items = items_of(llada, algorithm, rewards)
    lengths = np.array([item.replay.lengths for item in items], np.float64)
    lengths[1, 2] = 0
    by_length = lengths / lengths.sum()
    equal = (lengths > 0) / 11
    weights = np.array([item.weights for item in items])
    assert weights == pytest.approx(by_length if name in PER_TOKEN else equal)
    assert np.array([item.distillation for item in items]) == pytest.approx(0.3 * by_length)
    changed = items[1].replay.tokens.copy()
    changed[2, 0] = 50
    other = replace(items[1], replay=replace(items[1].replay, tokens=changed))
    before = gradient(llada, algorithm, items, 12)
    after = gradient(llada, algorithm, [items[0], other, *items[2:]], 12)
    assert math.isfinite(before[0])
    assert after[0] == pytest.approx(before[0], abs=1e-6)
    largest = float(before[1].abs().max())
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-5 * largest)
    assert not torch.equal(before[2][0]["elbo"], after[2][0]["elbo"])
