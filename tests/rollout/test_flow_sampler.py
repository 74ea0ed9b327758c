"""Rollouts are functions of their draws; prefixes are shared; replays are exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rl.flash_grpo import FlashGRPO, FlashGRPOConfig
from rl.flow_batches import micro_batches
from rl.items import Item
from rollout.draws import groups_for
from rollout.flow import FlowPlan, TailConfig, dpmpp_2m_step, ode_step, sde_step
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DigitPrompts

PROMPTS = DigitPrompts().load()
SIZE = 4


@pytest.fixture
def sampler(base_policy: WanPolicy) -> FlowSampler:
    return FlowSampler(FlowSamplerConfig(steps=6), base_policy)


def draw_groups(count: int = 3, size: int = SIZE):
    return groups_for(PROMPTS, seed=3, step=1, count=count, size=size)


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_does_not_depend_on_its_company(sampler: FlowSampler, shared: bool):
    groups = draw_groups()
    plans = [FlowPlan((k,), shared_noise=shared) for k in (0, 2, 1)]
    together = sampler.sample(groups, plans)
    for group, plan, expected in zip(groups, plans, together, strict=True):
        (alone,) = sampler.sample([group], [plan])
        np.testing.assert_array_equal(alone.media, expected.media)
        np.testing.assert_array_equal(alone.replay.x_next, expected.replay.x_next)
        np.testing.assert_array_equal(alone.replay.log_prob, expected.replay.log_prob)


def test_results_ignore_the_global_generator(sampler: FlowSampler):
    groups, plans = draw_groups(1), [FlowPlan((1,))]
    (first,) = sampler.sample(groups, plans)
    torch.manual_seed(999)
    (second,) = sampler.sample(groups, plans)
    np.testing.assert_array_equal(first.media, second.media)


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_shared_prefix_is_computed_once(sampler: FlowSampler, index: int):
    (rollout,) = sampler.sample(draw_groups(1), [FlowPlan((index,), shared_noise=True)])
    assert rollout.forwards == (index + 1) + SIZE * (6 - index - 1)
    assert len(rollout.replay.x) == 1
    assert rollout.replay.node.tolist() == [0] * SIZE
    assert len(np.unique(rollout.replay.x_next.reshape(SIZE, -1), axis=0)) == SIZE


def test_independent_members_have_their_own_nodes(sampler: FlowSampler):
    (rollout,) = sampler.sample(draw_groups(1), [FlowPlan((2,))])
    assert rollout.forwards == SIZE * 6
    assert rollout.replay.node.tolist() == [0, 1, 2, 3]


def test_ode_plan_is_a_plain_euler_loop(sampler: FlowSampler, base_policy: WanPolicy):
    (group,) = draw_groups(1)
    (rollout,) = sampler.sample([group], [FlowPlan()])
    x = torch.stack([group.draw(j).noise("initial", (1, 1, 8, 8)) for j in range(SIZE)])
    condition = base_policy.encode([group.prompt] * SIZE)
    sigmas = torch.tensor(sampler.grid.sigmas)
    with torch.no_grad():
        for a, b in itertools.pairwise(sigmas):
            v = base_policy.velocity(x, a.expand(SIZE), condition)
            x = ode_step(x, v, a.expand(SIZE), b.expand(SIZE))
    np.testing.assert_array_equal(rollout.media, base_policy.decode(x))
    assert len(rollout.replay.x) == 0


def test_antithetic_noise_comes_in_opposite_pairs(sampler: FlowSampler, base_policy: WanPolicy):
    (group,) = draw_groups(1)
    plan = FlowPlan((1,), shared_noise=True, antithetic=True)
    (rollout,) = sampler.sample([group], [plan])
    t = rollout.replay
    x, sigma = torch.from_numpy(t.x), torch.from_numpy(t.sigma)
    with torch.no_grad():
        v = base_policy.velocity(x, sigma, base_policy.encode([group.prompt]))
    mean, _ = sde_step(x, v, sigma, torch.from_numpy(t.sigma_next), torch.from_numpy(t.g))
    deviation = t.x_next - mean.numpy()
    np.testing.assert_allclose(deviation[0::2], -deviation[1::2], atol=1e-5)
    assert np.abs(deviation[0] - deviation[2]).max() > 0.1


def test_naive_plans_inject_at_each_member_s_own_index(sampler: FlowSampler):
    (rollout,) = sampler.sample(draw_groups(1), [FlowPlan(member_indices=(0, 3, 1, 2))])
    assert rollout.replay.index.tolist() == [0, 3, 1, 2]
    assert rollout.replay.member.tolist() == [0, 1, 2, 3]


def test_full_trajectory_chains(sampler: FlowSampler):
    (rollout,) = sampler.sample(draw_groups(1), [FlowPlan(tuple(range(5)), shared_noise=True)])
    t = rollout.replay
    assert len(t.x) == 1 + 4 * SIZE
    np.testing.assert_array_equal(t.x[1 : 1 + SIZE], t.x_next[:SIZE])
    assert t.node[SIZE : 2 * SIZE].tolist() == [1, 2, 3, 4]


def test_a_short_tail_saves_forwards(sampler: FlowSampler):
    tail = TailConfig(steps=2, solver="dpmpp_2m")
    (rollout,) = sampler.sample(draw_groups(1), [FlowPlan((1,), shared_noise=True, tail=tail)])
    assert rollout.forwards == 2 + SIZE * 2


def test_guidance_counts_two_evaluations_and_changes_the_sample(base_policy: WanPolicy):
    groups = draw_groups(1)
    plain = FlowSampler(FlowSamplerConfig(steps=6), base_policy).sample(groups, [FlowPlan()])[0]
    config = FlowSamplerConfig(steps=6, guidance_scale=2.0)
    guided = FlowSampler(config, base_policy).sample(groups, [FlowPlan()])[0]
    assert guided.forwards == 2 * plain.forwards
    assert (guided.media != plain.media).any()


def test_second_order_solver_converges_with_order_two_on_a_gaussian():
    """Against the closed form of the probability-flow ODE, which scales x by the std."""

    def solve(steps: int, second: bool) -> float:
        sigmas = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64)
        x, previous = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        old = torch.full((1,), float("nan"), dtype=torch.float64)
        for a, b in zip(sigmas[:-1, None], sigmas[1:, None], strict=True):
            total = (1 - a) ** 2 * 0.25 + a**2
            v = (a - (1 - a) * 0.25) / total * x
            if second:
                denoised = x - a * v
                x, previous, old = dpmpp_2m_step(x, denoised, previous, old, a, b), denoised, a
            else:
                x = ode_step(x, v, a, b)
        first, last = (
            (((1 - s) ** 2 * 0.25 + s**2) ** 0.5).item() for s in (sigmas[0], sigmas[-1])
        )
        return abs(x.item() - last / first)

    assert solve(200, False) / solve(400, False) == pytest.approx(2, abs=0.2)
    assert solve(200, True) / solve(400, True) == pytest.approx(4, abs=0.5)
    assert solve(400, True) < solve(400, False) / 10


@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_replay_is_exact_whatever_the_micro_batch(lora_policy: WanPolicy, size: int, shared: bool):
    config = FlashGRPOConfig(initial_noise="shared" if shared else "independent")
    sampler = FlowSampler(FlowSamplerConfig(steps=6, guidance_scale=2.0), lora_policy)
    algorithm = FlashGRPO(config, sampler.grid, 2.0, 3)
    groups = draw_groups(4)
    rollouts = sampler.sample(groups, algorithm.plans(0, groups))
    ones = np.ones(SIZE)
    items = [
        Item(r.replay, len(r.replay.x), r.group.prompt, ones, ones, 0 * ones, 0) for r in rollouts
    ]
    count = -(-sum(i.evaluations for i in items) // size)
    ratios = [
        algorithm.loss(lora_policy, batch)[1]["ratio"]
        for batch in micro_batches(lora_policy, items, lambda t: t, size, count)
    ]
    ratio = torch.cat(ratios)
    assert len(ratio) == 4 * SIZE
    assert bool((ratio == 1.0).all())
