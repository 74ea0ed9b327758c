"""DiffusionNFT: its loss in numbers, the states it trains at, and what a recipe may say of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recipes.check import check
from recipes.derived import derived
from recipes.errors import RecipeError
from recipes.schema import Recipe, recipe_type
from recipes.source import load
from rewards.calling import Scores
from rl.contracts import Sampled, Scored
from rl.items import Item, micro_steps, share
from rl.metrics import DriftError
from rl.nft import NFT, NFTConfig, OldPolicyConfig, implicit_losses, preference
from rl.nft_batches import ForwardBatch
from rl.rollout_set import optimiser_steps
from rollout.draws import groups_for
from rollout.flow_sampler import FlowRollout, FlowSampler, FlowSamplerConfig
from rollout.policies.base import FlowPolicy
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DigitPrompts

GROUPS = groups_for(DigitPrompts().load(), seed=0, step=0, count=4, size=4)
SCORES = np.random.default_rng(0).normal(size=(4, 4))
RECIPE = Path("digits/nft")


def numbers(*values: float) -> list[Tensor]:
    """One state of one element for each value."""
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


def scalar_loss(velocity: Tensor, r: float, beta: float) -> Tensor:
    """The specification's point: x = .5 at t = .8, x0 = 1, v_old = -1.2."""
    x, clean, old = numbers(0.5, 1.0, -1.2)
    t = torch.tensor([0.8], dtype=torch.float64)
    positive, negative = implicit_losses(x, t, clean, velocity, old, beta)
    return (r * positive + (1 - r) * negative)[0] / beta


def sampled(
    policy: FlowPolicy, guidance: float = 1.0, **config: Any
) -> tuple[NFT, list[FlowRollout]]:
    sampler = FlowSampler(FlowSamplerConfig(steps=8, guidance_scale=guidance), policy)
    algorithm = NFT(NFTConfig(**config), sampler.grid, guidance)
    return algorithm, sampler.sample(GROUPS, algorithm.plans(0, GROUPS))


def items_of(
    algorithm: NFT, made: Sequence[FlowRollout], values: np.ndarray = SCORES
) -> list[list[Item]]:
    """The optimiser steps that the driver makes of scores (groups, size)."""
    scored = [
        Scored(
            Sampled(r.group, 0, r.replay, r.media, r.summary, {}, r.forwards, 0.0, 0),
            {"r": Scores(row, (), 0)},
        )
        for r, row in zip(made, values, strict=True)
    ]
    return optimiser_steps(scored, {"r": 1.0}, algorithm, 0)[0]


def batches(
    policy: FlowPolicy, algorithm: NFT, items: Sequence[Item], size: int
) -> list[ForwardBatch]:
    count = micro_steps([items], size)
    return list(algorithm.batches(policy, items, lambda replay: replay, size, count))


def gradient(
    policy: FlowPolicy, algorithm: NFT, items: Sequence[Item], size: int
) -> tuple[float, Tensor]:
    policy.module.zero_grad()
    total = 0.0
    for batch in batches(policy, algorithm, items, size):
        loss, _ = algorithm.loss(policy, batch)
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    return total, torch.cat([g.flatten() for g in gradients]).clone()


def nudge(policy: FlowPolicy) -> None:
    """Weights that are no longer those that sampled."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def test_loss_and_gradient_of_the_specification():
    (velocity,) = numbers(-1.2)
    velocity.requires_grad_()
    loss = scalar_loss(velocity, r=0.7, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.46, abs=1e-12)
    assert velocity.grad is not None
    assert velocity.grad.item() == pytest.approx(-0.64, abs=1e-12)
    assert scalar_loss(*numbers(-1.0), r=0.7, beta=1.0).item() == pytest.approx(0.396, abs=1e-12)


def test_the_error_is_divided_by_a_constant():
    """w+ has the value of |x0+ - x0|; with its gradient a lone positive loss would have half of this."""
    (velocity,) = numbers(-1.0)
    velocity.requires_grad_()
    scalar_loss(velocity, r=1.0, beta=1.0).backward()
    assert velocity.grad is not None
    assert velocity.grad.item() == pytest.approx(2 * -0.8, abs=1e-12)


def test_beta_mixes_the_implicit_policies():
    """At v = -1, beta = .5: v+ = -1.1 and v- = -1.3, x0+ = 1.38 and x0- = 1.54."""
    loss = scalar_loss(*numbers(-1.0), r=0.7, beta=0.5)
    assert loss.item() == pytest.approx((0.7 * 0.38 + 0.3 * 0.54) / 0.5, abs=1e-12)
    slopes = []
    for beta in (1.0, 0.1):
        (velocity,) = numbers(-1.2)
        velocity.requires_grad_()
        scalar_loss(velocity, r=0.7, beta=beta).backward()
        assert velocity.grad is not None
        slopes.append(velocity.grad.item())
    assert slopes[1] == pytest.approx(slopes[0], abs=1e-12)


def test_advantages_become_preferences():
    advantages = torch.tensor([-7.0, -5.0, -1.0, 0.0, 2.0, 5.0, 9.0])
    expected = [0, 0, 0.4, 0.5, 0.7, 1, 1]
    assert preference(advantages, 10).tolist() == pytest.approx(expected)
    expected = [0, 0, 0, 0.5, 1, 1, 1]
    assert preference(advantages, 2).tolist() == pytest.approx(expected)


def test_the_divisor_only_decides_where_preferences_saturate(lora_policy: WanPolicy):
    """With v at v_old the gradient is the advantage times that of flow matching."""
    algorithm, made = sampled(lora_policy, kl_coefficient=0)
    (items,) = items_of(algorithm, made)
    wide = NFT(NFTConfig(divisor=40, kl_coefficient=0), FlowSamplerConfig(steps=8).grid(), 1.0)
    _, narrow_gradient = gradient(lora_policy, algorithm, items, 16)
    _, wide_gradient = gradient(lora_policy, wide, items, 16)
    assert narrow_gradient.abs().max() > 1e-3
    torch.testing.assert_close(wide_gradient, narrow_gradient, rtol=1e-3, atol=1e-5)


def test_the_velocity_of_the_weights_that_sampled_comes_along(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy, draws=3)
    before = copy.deepcopy(lora_policy)
    (items,) = items_of(algorithm, made)
    nudge(lora_policy)
    lags: list[Tensor] = []
    for batch in batches(lora_policy, algorithm, items, 16):
        with torch.no_grad():
            old = before.velocity(batch.x, batch.t, batch.condition)
        torch.testing.assert_close(batch.old, old, rtol=1e-4, atol=1e-5)
        lags.append(algorithm.loss(lora_policy, batch)[1]["lag"])
    assert torch.cat(lags).min() > 1e-3


def test_states_are_the_sample_and_fresh_noise_at_sigmas_of_the_grid(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy, draws=3)
    (items,) = items_of(algorithm, made)
    (batch,) = batches(lora_policy, algorithm, items, 48)
    assert [item.evaluations for item in items] == [12] * 4
    finals = torch.cat([torch.from_numpy(r.replay.final) for r in made])
    torch.testing.assert_close(batch.clean, finals.repeat_interleave(3, dim=0))
    t = batch.t.reshape(-1, 1, 1, 1, 1)
    noise = (batch.x - (1 - t) * batch.clean) / t
    assert noise.mean().abs() < 0.05
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert len(torch.unique(noise[:, 0, 0, 0, 0])) == 48
    sigmas = set(torch.tensor(algorithm.sigmas).tolist())
    times = batch.t.reshape(-1, 3).tolist()
    assert all(set(own) <= sigmas and len(set(own)) == 3 for own in times)
    assert {time for own in times for time in own} == sigmas


def test_every_pass_has_states_of_its_own(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy, draws=2, epochs=2)
    assert made[0].forwards == 4 * (8 + 4)
    first, second = (
        batches(lora_policy, algorithm, items, 32)[0] for items in items_of(algorithm, made)
    )
    assert torch.equal(first.clean, second.clean)
    assert (first.x != second.x).flatten(1).any(1).all()
    times = torch.cat([first.t.reshape(-1, 2), second.t.reshape(-1, 2)], dim=1)
    assert all(len(set(own)) == 4 for own in times.tolist())


def test_sampling_again_gives_the_same_states(lora_policy: WanPolicy):
    first, second = (sampled(lora_policy)[1] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.replay.velocity, b.replay.velocity)
        assert np.array_equal(a.replay.seeds, b.replay.seeds)


def test_loss_and_gradient_do_not_depend_on_micro_batches(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy, kl_coefficient=0.1)
    (items,) = items_of(algorithm, made)
    nudge(lora_policy)
    loss, whole = gradient(lora_policy, algorithm, items, 32)
    assert whole.abs().max() > 1e-3
    for size in (3, 5, 48):
        other, other_gradient = gradient(lora_policy, algorithm, items, size)
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(other_gradient, whole, rtol=1e-3, atol=1e-5)


def test_ranks_together_are_one_rank(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy)
    (items,) = items_of(algorithm, made)
    loss, whole = gradient(lora_policy, algorithm, items, 8)
    parts = [gradient(lora_policy, algorithm, part, 8) for part in share(items, 3)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-5)
    summed = torch.stack([part[1] for part in parts]).sum(0)
    torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-5)


def test_a_rank_without_work_adds_nothing(lora_policy: WanPolicy):
    algorithm, _ = sampled(lora_policy)
    (batch,) = algorithm.batches(lora_policy, [], lambda replay: replay, 4, 1)
    loss, table = algorithm.loss(lora_policy, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(len(column) == 0 for column in table.values())
    assert algorithm.metrics({k: v.numpy() for k, v in table.items()}) == {}


def test_samples_without_a_score_do_not_count_and_equal_ones_do(lora_policy: WanPolicy):
    """A group of equal rewards has r = 1/2: it holds v_theta at v_old, whatever the KL."""
    algorithm, made = sampled(lora_policy, kl_coefficient=0)
    scores = SCORES.copy()
    scores[0, 2] = np.nan
    scores[1] = 0.25
    (items,) = items_of(algorithm, made, scores)
    assert len(items) == 4
    assert items[0].weights.tolist() == [1 / 15, 1 / 15, 0, 1 / 15]
    at_old = gradient(lora_policy, algorithm, items[1:2], 8)[1].abs().max()
    nudge(lora_policy)
    assert gradient(lora_policy, algorithm, items[1:2], 8)[1].abs().max() > 100 * at_old


def test_the_kl_is_the_squared_difference_of_velocities(base_policy: WanPolicy):
    policy = copy.deepcopy(base_policy)
    algorithm, made = sampled(policy, kl_coefficient=0.5, draws=1)
    (items,) = items_of(algorithm, made)
    (batch,) = batches(policy, algorithm, items, 16)
    loss, table = algorithm.loss(policy, batch)
    assert table["kl"].max() == 0
    nudge(policy)
    loss, table = algorithm.loss(policy, batch)
    free, _ = NFT(NFTConfig(kl_coefficient=0), FlowSamplerConfig(steps=8).grid(), 1.0).loss(
        policy, batch
    )
    now = policy.velocity(batch.x, batch.t, batch.condition)
    expected = (now - batch.old).square().flatten(1).mean(1)
    torch.testing.assert_close(table["kl"], expected.detach(), rtol=1e-3, atol=1e-7)
    assert (loss - free).item() == pytest.approx(0.5 * expected.mean().item(), rel=1e-3)


def test_guided_velocities_are_compared_with_guided_ones(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy, guidance=2.0, draws=1)
    assert made[0].forwards == 2 * 4 * (8 + 1)
    (items,) = items_of(algorithm, made)
    (batch,) = batches(lora_policy, algorithm, items, 16)
    assert algorithm.loss(lora_policy, batch)[1]["lag"].max() < 1e-4
    _, plain = sampled(lora_policy, draws=1)
    assert np.abs(plain[0].replay.velocity - made[0].replay.velocity).max() > 1e-2


class OneGaussian(FlowPolicy):
    """Data N(mean, 0.5^2) with the exact velocity; the mean trains."""

    blocks = width = 1
    latent_shape = (1, 1, 1, 1)
    std = 0.5

    def __init__(self) -> None:
        super().__init__(nn.ParameterDict({"mean": nn.Parameter(torch.tensor(1.5))}), False, False)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def encode_null(self, count: int) -> Tensor:
        return torch.zeros(count, 1, 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        mean, t = self.network["mean"], t.reshape(-1, 1, 1, 1, 1)
        slope = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
        return slope * (x - (1 - t) * mean) - mean

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        raise NotImplementedError

    def pixels(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 4, 1).clamp(0, 1)

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("advantage", "closer"), [(3.0, True), (-3.0, False)])
def test_preferred_samples_become_likelier(advantage: float, closer: bool):
    """The policy's likelihood of a sample is that of a Gaussian: it rises with r > 1/2, else falls."""
    policy = OneGaussian()
    algorithm, made = sampled(policy, draws=8, kl_coefficient=0)
    for rollout in made:
        for member, x0 in enumerate(rollout.replay.final.flatten()):
            chosen = np.arange(4) == member
            item = Item(rollout.replay, 32, "", advantage * chosen, 1.0 * chosen, 0.0 * chosen, 0)
            _, slope = gradient(policy, algorithm, [item], 32)
            towards = np.sign(x0 - 1.5)
            assert (np.sign(-slope.item()) == towards) == closer


def test_rewards_move_the_policy_and_its_old_velocity_holds_it_back():
    """Samples above the mean are preferred: the mean rises, and less far from where v_old is kept."""
    policy = OneGaussian()
    algorithm, made = sampled(policy, draws=8, kl_coefficient=0)
    finals = np.stack([r.replay.final.flatten() for r in made])
    (items,) = items_of(algorithm, made, finals)
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.02)
    means: list[float] = []
    for _ in range(60):
        gradient(policy, algorithm, items, 128)
        optimizer.step()
        means.append(policy.module["mean"].item())
    assert means[0] > 1.5
    assert means[-1] > means[0]
    assert abs(means[-1] - means[-2]) < 0.1 * (means[1] - means[0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {0: 0, 1: 0.001, 120: 0.12, 500: 0.5, 9000: 0.5}),
        (
            {"flat_steps": 75, "rate": 0.0075, "ceiling": 0.999},
            {0: 0, 75: 0, 76: 0.0075, 175: 0.75, 400: 0.999},
        ),
        ({"rate": 0}, {1: 0, 10**6: 0}),
    ],
)
def test_the_schedule_of_the_old_policy(config: dict[str, Any], expected: dict[int, float]):
    algorithm = NFT(
        NFTConfig(old_policy=OldPolicyConfig(**config)), FlowSamplerConfig(steps=8).grid(), 1.0
    )
    assert {n: algorithm.old_decay(n) for n in expected} == pytest.approx(expected)


def test_other_weights_in_the_sampler_are_noticed(lora_policy: WanPolicy):
    algorithm, made = sampled(lora_policy)
    (items,) = items_of(algorithm, made)

    def drift() -> dict[str, float]:
        (batch,) = batches(lora_policy, algorithm, items, 32)
        table = algorithm.loss(lora_policy, batch)[1]
        return algorithm.check_drift({k: v.numpy() for k, v in table.items()}, "float32")

    assert drift()["drift/velocity_p99"] < 1e-5
    with torch.no_grad():
        for parameter in lora_policy.trainable().values():
            parameter.mul_(10)
    with pytest.raises(DriftError, match="the rollout weights, prompts or guidance are not"):
        drift()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.tail={steps: 2}", "rl.tail"),
        ("rl.antithetic=true", "rl.antithetic"),
        ("rl.initial_noise=shared", "rl.initial_noise"),
        ("rl.clip_range=0.1", "rl.clip_range"),
        ("rl.dipod={coefficient: 0.1}", "rl.dipod"),
        ("rollout.diffusion={kind: flow}", "injects no noise when it samples; leave it out"),
        ("rl.draws=9", "9 draws are more than the 8 sigmas of the grid"),
        ("rl.beta=0", "rl.beta"),
    ],
)
def test_what_nft_has_no_use_for_is_refused(override: str, words: str):
    with pytest.raises(RecipeError) as refused:
        check(load(RECIPE, recipe_type, [override]), gpus=0)
    assert words in str(refused.value)


def test_the_recipe_says_what_it_costs():
    recipe = load(RECIPE, Recipe, ["rl.draws=3"]).value
    shown = derived(recipe)
    assert shown["noised states per sample and pass"] == "3"
    assert "ratio" not in shown["optimiser steps"]
