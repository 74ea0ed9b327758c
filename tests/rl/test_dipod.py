"""DiPOD: what its term adds to each objective on text, its alternating form, and its form on flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import (
    CONFIGS,
    WINDOW,
    TablePolicy,
    batch_of,
    batches,
    build,
    completions,
    joint,
    random_policy,
    scored_groups,
)

from rewards.calling import Scores
from rl.bounds import Masks, full_masks
from rl.contracts import Sampled, Scored
from rl.dipod import DipodConfig
from rl.flash_grpo import FlashGRPO, FlashGRPOConfig
from rl.flow_batches import FlowBatch
from rl.items import Item, micro_steps, share
from rl.rollout_set import optimiser_steps
from rl.spg import SPGConfig
from rl.text import TextAlgorithm, TextSettings
from rl.text_batches import TextBatch
from rollout.draws import groups_for, keyed_generator
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig, Transitions
from rollout.masked import Completions
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DigitPrompts


def certain_policy() -> TablePolicy:
    """Everywhere log p = -1 of token 0 and -2 of token 1."""
    rest = math.log(1 - math.exp(-1) - math.exp(-2))
    policy = random_policy(window=200, vocabulary=3, context=False)
    with torch.no_grad():
        policy.theta.copy_(torch.tensor([-1.0, -2.0, rest]).expand(200, 3))
    return policy


@pytest.mark.parametrize(("beta", "golden"), [(None, -0.5), (0.05, -0.4166667)])
@pytest.mark.parametrize(("negatives", "masking"), [("mix", "full"), ("elbo", "exact")])
def test_spg_golden_arithmetic(beta: float | None, golden: float, negatives: Any, masking: str):
    """L = (100, 200), A = (.5, -.5), l = (-1, -2), from rewards to the loss.

    With everything masked once the upper bound is the plain log-likelihood too.
    """
    dipod = None if beta is None else DipodConfig(coefficient=beta)
    config = SPGConfig(negatives=negatives, masking="random", dipod=dipod)
    algorithm = build(config, 200, 200)
    group = completions(np.array([[0] * 200, [1] * 200]), [100, 200])
    scored = scored_groups([group], np.array([[1.0, 0.0]]))
    steps, _ = optimiser_steps(scored, {"r": 1.0}, algorithm, 0)
    assert len(steps) == 4
    assert steps[0][0].advantages.tolist() == [0.5, -0.5]

    def full(c: Completions, member: int, generator: torch.Generator) -> Masks:
        return full_masks(int(c.lengths[member]), 200, 1, 1, generator, 0.0)

    policy = certain_policy()
    batch = batch_of(policy, steps[0], full if masking == "full" else algorithm.masks)
    assert batch.scored.shape[1] == (1 if masking == "full" else 2)
    loss, table = algorithm.loss(policy, batch)
    assert loss.item() == pytest.approx(golden, abs=1e-6)
    assert table["elbo"].tolist() == pytest.approx([-1.0, -2.0], abs=1e-6)
    assert table["loss"].sum().item() == pytest.approx(golden, abs=1e-6)


# The joint form on text.

# Positive, negative and zero advantages; a group of equal rewards; a sample without a score.
MIXED = np.array([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [0.0, np.nan, 1.0]])
LENGTHS = np.array([[6, 3, 5], [1, 2, 4], [4, 6, 2]])


def groups_of_text() -> list[Completions]:
    rng = np.random.default_rng(3)
    made: list[Completions] = []
    for g, lengths in enumerate(LENGTHS):
        tokens = rng.integers(2, size=(3, WINDOW))
        made.append(completions(tokens, lengths.tolist(), prompt=2 + g, seed=g))
    return made


def first_items(algorithm: TextAlgorithm, step: int = 0) -> list[Item]:
    scored = scored_groups(groups_of_text(), MIXED)
    return optimiser_steps(scored, {"r": 1.0}, algorithm, step)[0][0]


def bounds_of(policy: TablePolicy, batch: TextBatch, draws: slice) -> list[Tensor]:
    """ELBO of each completion in nats from the given draws, one forward a draw and place."""
    values: list[Tensor] = []
    for j in range(len(batch.tokens)):
        terms: list[Tensor] = []
        for d in range(*draws.indices(batch.tokens.shape[1])):
            tokens, total = batch.tokens[j, d], torch.zeros((), dtype=torch.float64)
            for i in batch.scored[j, d].nonzero().flatten().tolist():
                where = torch.zeros(1, len(tokens), dtype=torch.bool)
                where[0, len(tokens) - WINDOW + i] = True
                logits = policy.logits(tokens[None], None, where)[0]
                total = total + logits.log_softmax(0)[batch.targets[j, i]]
            terms.append(batch.scale[j, d] * total)
        values.append(torch.stack(terms).mean())
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_the_joint_term_is_the_bound_of_all_rollouts_by_length(name: str):
    """On top of each objective, from its own masks or two more, in the same single forward."""
    plain, with_term = build(CONFIGS[name]), build(joint(CONFIGS[name]))
    extra = 0 if plain.bounded else 2
    assert with_term.forwards_per_completion == plain.draws + extra
    policy, items = random_policy(WINDOW, 2, reference=True), first_items(with_term)
    # Groups of equal rewards count in the term, and in a KL.
    assert len(first_items(plain)) == (3 if plain.config.kl_coefficient else 2)
    assert len(items) == 3
    (batch,) = batches(policy, with_term, items, 9)
    policy.calls.clear()
    loss, table = with_term.loss(policy, batch)
    reference = [9 * plain.draws] if plain.config.kl_coefficient else []
    assert policy.calls == [9 * (plain.draws + extra), *reference]
    (gradient,) = torch.autograd.grad(loss, policy.theta)
    without = [replace(i, distillation=np.zeros(3), evaluations=3 * plain.draws) for i in items]
    (own,) = batches(policy, plain, without, 9)
    assert torch.equal(own.tokens, batch.tokens[:, : plain.draws])
    bare, _ = plain.loss(policy, own)
    (bare_gradient,) = torch.autograd.grad(bare, policy.theta)
    nats = bounds_of(policy, batch, slice(plain.draws if extra else 0, None))
    scored = np.isfinite(MIXED).flatten()
    kept = torch.stack([bound for bound, valid in zip(nats, scored, strict=True) if valid])
    term = -0.3 * kept.sum() / float(LENGTHS.flatten()[scored].sum())
    torch.testing.assert_close(loss - bare, term, rtol=1e-6, atol=1e-7)
    (term_gradient,) = torch.autograd.grad(term, policy.theta)
    torch.testing.assert_close(gradient - bare_gradient, term_gradient, rtol=1e-6, atol=1e-7)
    per_token = torch.stack(nats) / torch.from_numpy(LENGTHS).flatten()
    torch.testing.assert_close(table["elbo"], per_token, rtol=1e-6, atol=1e-7, check_dtype=False)
    assert term_gradient.abs().max() > 1e-4


def test_on_policy_the_term_is_a_shift_of_the_baseline():
    """SPG with lower bounds only: A + beta in place of A, to the last digit but rounding."""
    config = SPGConfig(negatives="elbo", masking="random", draws=3)
    policy, beta = random_policy(WINDOW, 2, reference=True), 0.3
    items = first_items(build(joint(config)))
    shifted = [replace(i, advantages=i.advantages + beta, distillation=np.zeros(3)) for i in items]
    gradients: list[Tensor] = []
    for algorithm, part in ((build(joint(config)), items), (build(config), shifted)):
        (batch,) = batches(policy, algorithm, part, 9)
        loss, _ = algorithm.loss(policy, batch)
        gradients.append(torch.autograd.grad(loss, policy.theta)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().max() > 1e-3


# The alternating form.


def alternating(config: TextSettings) -> TextAlgorithm:
    dipod = DipodConfig(form="alternating", every=3, steps=5, draws=2)
    return build(config.model_copy(update={"dipod": dipod, "epochs": 2}))


def test_every_so_maniest_step_only_distils():
    algorithm, scored = alternating(SPGConfig()), scored_groups(groups_of_text(), MIXED)
    for step in range(7):
        steps, metrics = optimiser_steps(scored, {"r": 1.0}, algorithm, step)
        items = [item for part in steps for item in part]
        if step in (2, 5):
            assert metrics["distilled"] == 1
            assert [len(part) for part in steps] == [3] * 5
            assert [part[0].epoch for part in steps] == [0, 1, 2, 3, 4]
            assert not any(item.weights.any() for item in items)
            for part in steps:
                shares = np.array([item.distillation for item in part])
                valid = np.isfinite(MIXED) * LENGTHS
                assert shares == pytest.approx(valid / valid.sum())
        else:
            assert "distilled" not in metrics
            assert [len(part) for part in steps] == [2, 2]
            assert not any(item.distillation.any() for item in items)
            assert sum(item.weights.sum() for item in steps[0]) == pytest.approx(
                1 - LENGTHS[1].sum() / LENGTHS[np.isfinite(MIXED)].sum()
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distilling_step_s_gradient_is_the_bound_s(name: str):
    algorithm = alternating(CONFIGS[name])
    policy, items = random_policy(WINDOW, 2, reference=True), first_items(algorithm, step=2)
    (batch,) = batches(policy, algorithm, items, 9)
    loss, _ = algorithm.loss(policy, batch)
    nats = bounds_of(policy, batch, slice(0 if algorithm.bounded else algorithm.draws, None))
    kept = [b for b, valid in zip(nats, np.isfinite(MIXED).flatten(), strict=True) if valid]
    wanted = -torch.stack(kept).sum() / float(LENGTHS[np.isfinite(MIXED)].sum())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)
    gradient, wanted_gradient = (torch.autograd.grad(v, policy.theta)[0] for v in (loss, wanted))
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-7)


# Flows.

GROUPS = groups_for(DigitPrompts().load(), seed=0, step=0, count=3, size=2)
SCORES = np.array([[0.3, 1.0], [0.5, 0.5], [np.nan, 0.1]])


def flow_items(
    policy: WanPolicy, form: Literal["joint", "alternating"] | None, step: int = 0
) -> tuple[FlashGRPO, list[list[Item]]]:
    """Three groups of two in one sampling; the first lacks nothing, the last a score."""
    dipod = form and DipodConfig(form=form, coefficient=0.4, draws=2, every=2, steps=3)
    sampler = FlowSamplerConfig(steps=4)
    config = FlashGRPOConfig(dipod=dipod)
    algorithm = FlashGRPO(config, sampler.grid(), sampler.guidance_scale, 0)
    plans = algorithm.plans(step, GROUPS)
    assert all(plan.keep_final == (form is not None) for plan in plans)
    scored = [
        Scored(
            Sampled(r.group, 0, r.replay, r.media, r.summary, {}, r.forwards, 0.0, 0),
            {"r": Scores(row, (), 0)},
        )
        for r, row in zip(FlowSampler(sampler, policy).sample(GROUPS, plans), SCORES, strict=True)
    ]
    return algorithm, optimiser_steps(scored, {"r": 1.0}, algorithm, step)[0]


def flow_batches(
    policy: WanPolicy, algorithm: FlashGRPO, items: Sequence[Item], size: int
) -> list[FlowBatch]:
    count = micro_steps([items], size)
    return list(algorithm.batches(policy, items, lambda replay: replay, size, count))


def flow_gradient(
    policy: WanPolicy, algorithm: FlashGRPO, items: Sequence[Item], size: int
) -> tuple[float, Tensor]:
    policy.module.zero_grad()
    total = 0.0
    for batch in flow_batches(policy, algorithm, items, size):
        loss, _ = algorithm.loss(policy, batch)
        loss.backward()
        total += loss.item()
    parts = [p.grad for p in policy.trainable().values() if p.grad is not None]
    return total, torch.cat([part.flatten() for part in parts]).clone()


def flow_matching(policy: WanPolicy, items: Sequence[Item], epoch: int = 0) -> Tensor:
    """mean |v(x_t, t) - (eps - x0)|^2 of the five scored samples, two noises each."""
    errors: list[Tensor] = []
    for item, row in zip(items, SCORES, strict=True):
        replay: Transitions = item.replay
        condition = policy.encode([item.prompt])
        for clean, seed, score in zip(replay.final, replay.seeds, row, strict=True):
            generator = keyed_generator(int(seed), "distillation", epoch)
            times = 1 - torch.rand(2, generator=generator)
            noises = torch.randn((2, *clean.shape), generator=generator)
            for t, noise in zip(times, noises, strict=True):
                x0 = torch.from_numpy(clean)
                v = policy.velocity(((1 - t) * x0 + t * noise)[None], t[None], condition)[0]
                if not math.isnan(score):
                    errors.append((v - (noise - x0)).square().mean())
    assert len(errors) == 10
    return torch.stack(errors).mean()


def test_flows_add_the_flow_matching_loss_of_their_own_samples(lora_policy: WanPolicy):
    """For every scored sample, equal rewards or not; in whatever micro-batches and ranks."""
    algorithm, (items,) = flow_items(lora_policy, "joint")
    assert [item.evaluations for item in items] == [2 + 4] * 3
    bare = [replace(item, distillation=np.zeros(2)) for item in items]
    state = torch.random.get_rng_state()
    loss, gradient = flow_gradient(lora_policy, algorithm, items, 18)
    plain, plain_gradient = flow_gradient(lora_policy, algorithm, bare, 18)
    assert torch.equal(state, torch.random.get_rng_state())
    term = 0.4 * flow_matching(lora_policy, items)
    assert term.item() > 0.1
    assert loss - plain == pytest.approx(term.item(), abs=1e-5)
    lora_policy.module.zero_grad()
    term.backward()
    parts = [p.grad for p in lora_policy.trainable().values() if p.grad is not None]
    wanted = torch.cat([part.flatten() for part in parts])
    size = float(wanted.abs().max())
    torch.testing.assert_close(gradient - plain_gradient, wanted, rtol=1e-3, atol=1e-4 * size)
    for micro_batch in (4, 7):
        other, other_gradient = flow_gradient(lora_policy, algorithm, items, micro_batch)
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-4 * size)
    ranks = [flow_gradient(lora_policy, algorithm, part, 6)[1] for part in share(items, 2)]
    torch.testing.assert_close(ranks[0] + ranks[1], gradient, rtol=1e-3, atol=1e-4 * size)


def test_noise_of_flow_matching_is_the_sample_s_and_the_pass_s(lora_policy: WanPolicy):
    algorithm, (items,) = flow_items(lora_policy, "joint")
    torch.manual_seed(5)
    (first,) = flow_batches(lora_policy, algorithm, items, 18)
    torch.manual_seed(6)
    (again,) = flow_batches(lora_policy, algorithm, items, 18)
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.sigma, again.sigma)
    later = [replace(item, epoch=1) for item in items]
    (other,) = flow_batches(lora_policy, algorithm, later, 18)
    assert (first.clean != other.clean).flatten(1).any(1).all()
    assert (first.sigma[first.clean_node] != other.sigma[other.clean_node]).all()
    assert len(first.clean_node) == 12
    assert len(first.clean.flatten(1).unique(dim=0)) == 12


def test_flows_without_the_term_keep_and_evaluate_nothing_more(lora_policy: WanPolicy):
    algorithm, (items,) = flow_items(lora_policy, None)
    assert [len(item.replay.final) for item in items] == [0]
    assert [item.evaluations for item in items] == [2]
    (batch,) = flow_batches(lora_policy, algorithm, items, 4)
    assert len(batch.clean) == 0


def test_a_distilling_step_of_flows_is_the_flow_matching_loss(lora_policy: WanPolicy):
    algorithm, steps = flow_items(lora_policy, "alternating", step=1)
    assert [[item.epoch for item in items] for items in steps] == [[0] * 3, [1] * 3, [2] * 3]
    for epoch, items in enumerate(steps[:2]):
        loss, gradient = flow_gradient(lora_policy, algorithm, items, 5)
        wanted = flow_matching(lora_policy, items, epoch)
        assert loss == pytest.approx(wanted.item(), abs=1e-5)
        assert gradient.abs().max() > 0
    _, (items,) = flow_items(lora_policy, "alternating", step=0)
    assert not any(item.distillation.any() for item in items)
