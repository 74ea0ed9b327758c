"""The surrogate, its batches and what the driver makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rewards.calling import Scores
from rl.contracts import Sampled, Scored
from rl.flash_grpo import FlashGRPO, FlashGRPOConfig
from rl.flow_batches import micro_batches
from rl.flow_grpo import FlowGRPO, FlowGRPOConfig
from rl.items import Item, micro_steps, share
from rl.metrics import DriftError, check_drift, flow_metrics
from rl.rollout_set import optimiser_steps
from rollout.draws import groups_for
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DigitPrompts

GROUPS = groups_for(DigitPrompts().load(), seed=0, step=0, count=4, size=4)


def rollouts(policy: WanPolicy, algorithm_class=FlashGRPO, **config):
    sampler = FlowSampler(FlowSamplerConfig(steps=8), policy)
    made = {FlashGRPO: FlashGRPOConfig, FlowGRPO: FlowGRPOConfig}[algorithm_class](**config)
    algorithm = algorithm_class(made, sampler.grid, 1.0, 0)
    return algorithm, sampler.sample(GROUPS, algorithm.plans(0, GROUPS))


def scored(made, values: np.ndarray) -> list[Scored]:
    return [
        Scored(
            Sampled(r.group, 0, r.replay, r.media, r.summary, {}, r.forwards, 0.0, 0),
            {"r": Scores(row, (), 0)},
        )
        for r, row in zip(made, values, strict=True)
    ]  # fmt: skip


def gradient(policy: WanPolicy, algorithm, items: list[Item], size: int):
    policy.module.zero_grad()
    total = 0.0
    for batch in micro_batches(policy, items, lambda t: t, size, micro_steps([items], size)):
        loss, _ = algorithm.loss(policy, batch)
        loss.backward()
        total += float(loss)
    return total, torch.cat([p.grad.flatten() for p in policy.trainable().values()]).clone()


SCORES = np.random.default_rng(0).normal(size=(4, 4))


def test_unit_advantages_give_minus_one(lora_policy: WanPolicy):
    """A = 1 with indices uniform on the pool: the mean loss is -1, whatever TGR weighs."""
    algorithm, made = rollouts(lora_policy)
    ones = np.ones(4)
    items = [Item(r.replay, 4, r.group.prompt, ones, ones / 16, 0 * ones, 0) for r in made]
    loss, _ = gradient(lora_policy, algorithm, items, 16)
    assert loss == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("kind", [FlashGRPO, FlowGRPO])
@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(lora_policy, kind, noise):
    algorithm, made = rollouts(lora_policy, kind, initial_noise=noise)
    (items,), _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, algorithm, 0)
    loss, grad = gradient(lora_policy, algorithm, items, 128)
    assert grad.abs().max() > 0
    for size in (3, 5):
        other, other_grad = gradient(lora_policy, algorithm, items, size)
        assert other == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=2e-6)


def test_shared_noise_trains_one_evaluation_per_group(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy, initial_noise="shared")
    (items,), _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, algorithm, 0)
    assert [item.evaluations for item in items] == [1, 1, 1, 1]


def test_ranks_together_are_one_rank(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy)
    (items,), _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, algorithm, 0)
    _, whole = gradient(lora_policy, algorithm, items, 8)
    parts = [gradient(lora_policy, algorithm, part, 8)[1] for part in share(items, 2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=2e-6)


def test_a_rank_without_work_adds_nothing(lora_policy: WanPolicy):
    algorithm, _ = rollouts(lora_policy)
    (batch,) = micro_batches(lora_policy, [], lambda t: t, 4, 1)
    loss, table = algorithm.loss(lora_policy, batch)
    loss.backward()
    assert float(loss) == 0
    assert all(len(column) == 0 for column in table.values())
    assert all((p.grad == 0).all() for p in lora_policy.trainable().values() if p.grad is not None)


def test_constant_groups_are_dropped_without_changing_the_gradient(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy)
    scores = SCORES.copy()
    scores[1] = 0.25
    (items,), metrics = optimiser_steps(scored(made, scores), {"r": 1.0}, algorithm, 0)
    assert len(items) == 3
    assert metrics["zero_std_ratio"] == 0.25
    silent = Item(
        made[1].replay, 4, made[1].group.prompt, np.zeros(4), np.ones(4) / 16, np.zeros(4), 0
    )
    kept = gradient(lora_policy, algorithm, items, 8)[1]
    torch.testing.assert_close(kept, gradient(lora_policy, algorithm, [*items, silent], 8)[1])
    assert items[0].weights.tolist() == [1 / 16] * 4


def test_unscored_samples_are_masked(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy)
    scores = SCORES.copy()
    scores[0, 2] = np.nan
    (items,), _ = optimiser_steps(scored(made, scores), {"r": 1.0}, algorithm, 0)
    assert items[0].weights.tolist() == [1 / 15, 1 / 15, 0, 1 / 15]


def test_minibatches_and_epochs_make_optimiser_steps(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy, minibatches=2, epochs=3)
    steps, _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, algorithm, 0)
    assert len(steps) == 6
    assert all(len(items) == 2 for items in steps)
    assert not algorithm.config.on_policy


def test_clipping_stops_the_gradient_beyond_the_range(lora_policy: WanPolicy):
    """Positive advantages stop at 1 + c, negative ones at 1 - c; the other side still pulls."""
    algorithm, made = rollouts(lora_policy, epochs=2)
    gradients = {}
    for sign in (1.0, -1.0):
        for shift in (-0.01, 0.01):
            t = made[0].replay
            moved = replace(t, log_prob=t.log_prob - np.float32(shift))
            item = Item(
                moved, 4, made[0].group.prompt, np.full(4, sign), np.ones(4) / 4, np.zeros(4), 0
            )
            gradients[sign, shift] = gradient(lora_policy, algorithm, [item], 4)[1].abs().max()
    assert gradients[1.0, 0.01] == 0 and gradients[-1.0, -0.01] == 0
    assert gradients[1.0, -0.01] > 0 and gradients[-1.0, 0.01] > 0


def test_on_policy_gradient_is_the_stored_ratio_s(lora_policy: WanPolicy):
    fast, made = rollouts(lora_policy)
    stored, _ = rollouts(lora_policy, epochs=2)
    (items,), _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, fast, 0)
    left, right = (gradient(lora_policy, a, items, 8)[1] for a in (fast, stored))
    assert torch.equal(left, right)


def test_kl_is_zero_at_the_start_and_positive_after(base_policy, lora_policy):
    algorithm, made = rollouts(lora_policy, kl_coefficient=0.5)
    (items,), _ = optimiser_steps(scored(made, SCORES * 0), {"r": 1.0}, algorithm, 0)
    assert len(items) == 4
    (batch,) = micro_batches(lora_policy, items, lambda t: t, 16, 1)
    assert algorithm.loss(lora_policy, batch)[1]["kl"].min() > 1e-6
    with torch.no_grad():
        for name, parameter in lora_policy.trainable().items():
            if "lora_B" in name:
                parameter.zero_()
    assert algorithm.loss(lora_policy, batch)[1]["kl"].max() < 1e-10


def test_gradient_share_sums_to_one_over_timesteps(lora_policy: WanPolicy):
    algorithm, made = rollouts(lora_policy)
    (items,), _ = optimiser_steps(scored(made, SCORES), {"r": 1.0}, algorithm, 0)
    (batch,) = micro_batches(lora_policy, items, lambda t: t, 16, 1)
    table = {k: v.detach().numpy() for k, v in algorithm.loss(lora_policy, batch)[1].items()}
    metrics = flow_metrics(table)
    shares = [v for k, v in metrics.items() if k.endswith("gradient_share")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    assert metrics["ratio/mean"] == 1.0
    assert metrics["clip_fraction"] == 0.0


def test_drift_is_refused_with_its_cause():
    table = {"ratio": 1 + np.array([0.0, 3e-4, -3e-4])}
    assert check_drift({"ratio": np.ones(3)}, 1e-3, "float32")["drift/exact"] == 1.0
    with pytest.raises(DriftError, match="different shape"):
        check_drift(table, 1e-3, "float32")
    with pytest.raises(DriftError, match="bfloat16"):
        check_drift(table, 1e-3, "bfloat16")
    with pytest.raises(DriftError, match="not the learner's"):
        check_drift({"ratio": np.full(3, 2.0)}, 1e-3, "float32")
    check_drift(table, 1e-2, "float32")
