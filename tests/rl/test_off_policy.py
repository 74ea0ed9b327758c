"""Rollouts that older weights drew: ratios to those weights, recorded where they were used."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from toy import (
    CONFIGS,
    OUTCOMES,
    WINDOW,
    batch_of,
    build,
    completions,
    every_mask,
    item_of,
    random_llada,
    random_policy,
    text_rollouts,
)

from rl.catalogue import build_algorithm
from rl.flash_grpo import FlashGRPOConfig
from rl.flow_batches import FlowBatch, micro_batches
from rl.flow_grpo import FlowGRPOConfig
from rl.fpo import FPOConfig
from rl.items import Item
from rl.old_scores import with_old
from rl.text import TextSettings
from rl.text_batches import token_log_probs
from rollout.draws import groups_for, keyed_generator
from rollout.flow import TailConfig, log_prob, sde_step
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig, Transitions
from rollout.policies.base import FlowPolicy
from rollout.policies.llada.policy import LladaPolicy
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DigitPrompts

COMPARING = ("diffu_grpo", "espo", "fpo", "trace_rl")
PER_TOKEN = ("diffu_grpo", "trace_rl")
# Nothing is clipped: ratios stay between .01 and 1.99.
OPEN = 0.99


def moved(policy: Any, size: float, seed: int = 3) -> Any:
    """A copy whose trained weights are a step further."""
    other, generator = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def gradients(policy: Any) -> Tensor:
    found = [p.grad for p in policy.trainable().values() if p.grad is not None]
    return torch.cat([g.flatten() for g in found]).clone()


# Flows.

ADVANTAGES = np.random.default_rng(0).normal(size=(3, 4))
REDUCTIONS: list[tuple[Any, float]] = [
    (FlowGRPOConfig(clip_range=OPEN), 1.0),
    (FlowGRPOConfig(clip_range=OPEN), 3.0),
    (FlashGRPOConfig(clip_range=OPEN, initial_noise="shared", antithetic=True), 3.0),
    (FlashGRPOConfig(clip_range=OPEN, tail=TailConfig(steps=2)), 1.0),
]


def replayed(
    policy: WanPolicy, replays: Sequence[Transitions], scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Mean and deviation of each branch under ``policy``, group by group, in plain torch."""
    groups = groups_for(DigitPrompts().load(), seed=0, step=0, count=3, size=4)
    found: list[tuple[Tensor, Tensor]] = []
    for group, t in zip(groups, replays, strict=True):
        x, sigma, after, g = map(torch.from_numpy, (t.x, t.sigma, t.sigma_next, t.g))
        condition = policy.encode([group.prompt] * len(x))
        velocity = policy.velocity(x, sigma, condition)
        if scale != 1:
            null = policy.velocity(x, sigma, policy.encode_null(len(x)))
            velocity = null + scale * (velocity - null)
        s, dt, g = (v.reshape(-1, 1, 1, 1, 1) for v in (sigma, sigma - after, g))
        mean = x - velocity * dt - g**2 / (2 * s) * (x + (1 - s) * velocity) * dt
        deviation = (g * dt.sqrt()).expand_as(mean)
        found.append((mean[t.node], deviation[t.node]))
    return found


@pytest.mark.parametrize(("config", "scale"), REDUCTIONS)
def test_the_gradient_of_a_flow_is_that_of_the_weighted_advantages(
    lora_policy: WanPolicy, config: Any, scale: float
):
    """grad of mean w A exp(log p_new - log p_old), whatever reduces the variance of rollouts."""
    sampler = FlowSamplerConfig(steps=6, guidance_scale=scale)
    algorithm = build_algorithm(config, sampler, seed=0, stale=True)
    groups = groups_for(DigitPrompts().load(), seed=0, step=0, count=3, size=4)
    made = FlowSampler(sampler, lora_policy).sample(groups, algorithm.plans(0, groups))  # pyright: ignore[reportArgumentType]
    replays, policy = [r.replay for r in made], moved(lora_policy, 0.03)
    branches = sum(len(r.x_next) for r in replays)
    items = [
        Item(r.replay, len(r.replay.x), r.group.prompt, row, np.full(4, 1 / branches), np.zeros(4), 0)
        for r, row in zip(made, ADVANTAGES, strict=True)
    ]  # fmt: skip
    (batch,) = micro_batches(policy, items, lambda t: t, sum(i.evaluations for i in items), 1)
    loss, table = algorithm.loss(policy, batch)
    loss.backward()
    with torch.no_grad():
        before = replayed(lora_policy, replays, scale)
    now, expected, ratios = replayed(policy, replays, scale), torch.zeros(()), list[Tensor]()
    for t, row, new, old in zip(replays, ADVANTAGES, now, before, strict=True):
        x_next = torch.from_numpy(t.x_next)
        new_log, old_log = (Normal(*p).log_prob(x_next).flatten(1).mean(1) for p in (new, old))
        ratio = (new_log - old_log).exp()
        weights = algorithm.timestep_weights(torch.from_numpy(t.index)[t.node])  # pyright: ignore[reportAttributeAccessIssue]
        advantages = torch.from_numpy(row[t.member]).float()
        expected = expected - (weights * advantages * ratio).sum() / branches
        ratios.append(ratio.detach())
    reference = torch.autograd.grad(expected, list(policy.trainable().values()))
    torch.testing.assert_close(table["ratio"], torch.cat(ratios), rtol=0, atol=2e-5)
    assert (table["ratio"] - 1).abs().max() > 2e-3
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    joined = torch.cat([g.flatten() for g in reference])
    torch.testing.assert_close(gradients(policy), joined, rtol=1e-3, atol=1e-5)


class ScalarPolicy(FlowPolicy):
    """States of one number: the velocity is theta tanh(x) + 1 / 2, everything in fp64."""

    latent_shape = (1, 1, 1, 1)

    def __init__(self, theta: float) -> None:
        value = torch.tensor(theta, dtype=torch.float64)
        super().__init__(nn.ParameterDict({"theta": nn.Parameter(value)}), False, False)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.network["theta"] * x.tanh() + 0.5

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    def encode_null(self, count: int) -> Tensor:
        return torch.zeros(count, 1)

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        raise NotImplementedError

    def pixels(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


def expectation(trained: float, sampled: float, stale: bool) -> Tensor:
    """The gradient at weights ``trained``, in expectation over what ``sampled`` draws: quadrature."""
    points, mass = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(24))
    x, sigma = torch.full((1, 1, 1, 1, 1), 1.2).double(), torch.tensor([0.6]).double()
    after, g = sigma - 0.1, torch.tensor([0.8]).double()
    with torch.no_grad():
        velocity = ScalarPolicy(sampled).velocity(x, sigma, x)
        mean, std = sde_step(x, velocity, sigma, after, g)
        x_next = mean + std * points.reshape(-1, 1, 1, 1, 1)
        old = log_prob(x_next, mean, std)
    rewards = (4 * x_next).sin() + x_next.square()
    node = torch.zeros(24, dtype=torch.int64)
    none = x[:0]
    batch = FlowBatch(
        x, x, node[:1], sigma, after, g, x_next, node, old, rewards.flatten(), mass / mass.sum(),
        none, node[:0], mass[:0],
    )  # fmt: skip
    policy, config = ScalarPolicy(trained), FlowGRPOConfig(clip_range=OPEN)
    algorithm = build_algorithm(config, FlowSamplerConfig(steps=4), seed=0, stale=stale)
    algorithm.loss(policy, batch)[0].backward()
    return gradients(policy)


def test_the_expected_gradient_of_old_samples_is_that_of_new_ones():
    """Where log p is not averaged over elements the correction is exact, in one state and over noise."""
    fresh = expectation(0.5, 0.5, stale=False)
    corrected, as_they_are = (expectation(0.5, 0.7, stale=stale) for stale in (True, False))
    torch.testing.assert_close(corrected, fresh, rtol=1e-6, atol=0)
    assert (as_they_are - fresh).abs() > 0.05 * fresh.abs()


# Text.


def open_config(kind: str, **more: Any) -> TextSettings:
    return CONFIGS[kind].model_copy(
        update={"clip_range": OPEN, "kl_coefficient": 0.0, "epochs": 2, **more}
    )


@pytest.mark.parametrize("kind", COMPARING)
def test_the_gradient_of_a_text_is_that_of_the_weighted_advantages(kind: str):
    """Against plain torch that draws the masks again and asks both policies, in the second pass."""
    old, policy = random_llada(), moved(random_llada(), 0.004)
    algorithm = build(open_config(kind), stale=True)
    made = with_old(algorithm, old, text_rollouts(old), 2, 3 * algorithm.forwards_per_completion)
    weights, rng = np.random.default_rng(4).random((4, 3)), np.random.default_rng(5)
    items = [
        item_of(r.replay, rng.normal(size=3), row, epoch=1)
        for r, row in zip(made, weights, strict=True)
    ]
    size = 12 * algorithm.forwards_per_completion
    (batch,) = algorithm.batches(policy, items, lambda replay: replay, size, 1)
    policy.module.zero_grad()
    loss, table = algorithm.loss(policy, batch)
    loss.backward()

    def terms(model: LladaPolicy) -> list[tuple[Tensor, Tensor, float]]:
        """Log-probabilities (d, G) at the scored places, the draws' scales, and the length."""
        found: list[tuple[Tensor, Tensor, float]] = []
        for r in made:
            for j in range(3):
                c = r.replay
                generator = keyed_generator(int(c.seeds[j]), "masks", 1)
                masks = algorithm.masks(c, j, generator)
                whole = torch.from_numpy(np.concatenate([c.prompt, c.tokens[j]]))
                hidden = torch.cat([masks.prompt, masks.hidden], 1)
                seen = whole.masked_fill(hidden, model.mask_token_id)
                logits = model.logits(seen, None, torch.ones_like(hidden))
                every = logits.reshape(*seen.shape, -1).log_softmax(-1)
                own = every.gather(2, whole.expand_as(seen)[..., None])[:, -WINDOW:, 0]
                found.append((own * masks.scored, masks.scale, float(c.lengths[j])))
        return found

    with torch.no_grad():
        before = terms(old)
    expected, ratios = torch.zeros(()), list[Tensor]()
    advantages = np.concatenate([i.advantages for i in items])
    for a, w, new, was in zip(advantages, weights.flatten(), terms(policy), before, strict=True):
        (log_new, scale, length), (log_old, _, _) = new, was
        if kind in PER_TOKEN:
            scored = log_old != 0
            ratio = (log_new - log_old).exp()[scored].mean()
        else:
            sums = (scale[:, None] * (log_new - log_old)).sum() / len(scale)
            ratio = (sums / (length if kind == "espo" else 1)).exp()
        expected = expected - w * a * ratio
        ratios.append(ratio.detach())
    reference = torch.autograd.grad(expected, list(policy.trainable().values()))
    torch.testing.assert_close(table["ratio"], torch.stack(ratios), rtol=1e-4, atol=1e-5)
    assert (table["ratio"] - 1).abs().median() > 1e-3 and table["clipped"].max() == 0
    joined = torch.cat([g.flatten() for g in reference])
    torch.testing.assert_close(gradients(policy), joined, rtol=1e-3, atol=1e-4)


def test_the_expected_gradient_of_old_completions_is_that_of_new_ones():
    """All outcomes of a policy whose bound is its likelihood, each as often as the old one says it."""
    old, policy = random_policy(2, 2, context=False), random_policy(2, 2, context=False)
    with torch.no_grad():
        policy.trainable()["theta"].add_(torch.tensor([[[0.3, -0.1], [-0.2, 0.1]]]))
    rewards = np.array([1.0, -0.5, 0.25, 2.0])

    def law(theta: Tensor) -> Tensor:
        first, second = theta[0].softmax(1)
        return torch.stack([first[a] * second[b] for a, b in OUTCOMES])

    def expected(stale: bool) -> Tensor:
        algorithm = build(FPOConfig(draws=4, clip_range=OPEN), 2, stale=stale)
        replay, chosen = completions(OUTCOMES), law(old.theta).detach().numpy()
        if stale:
            seen = batch_of(old, [item_of(replay, rewards, chosen)], lambda *_: every_mask(2))
            scores = token_log_probs(old, seen).detach().float().numpy()
            replay = replace(replay, old=scores[None])
        batch = batch_of(policy, [item_of(replay, rewards, chosen)], lambda *_: every_mask(2))
        policy.module.zero_grad()
        algorithm.loss(policy, batch)[0].backward()
        return gradients(policy)

    objective = -(law(policy.theta) * torch.from_numpy(rewards)).sum()
    (fresh,) = torch.autograd.grad(objective, [policy.theta])
    torch.testing.assert_close(expected(stale=True), fresh.flatten(), rtol=1e-6, atol=1e-8)
    assert (expected(stale=False) - fresh.flatten()).norm() > 0.2 * fresh.norm()
