"""ITG and TGR: properties and golden numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.flash_grpo import (
    FlashGRPO,
    FlashGRPOConfig,
    rectification_weights,
    stratified_indices,
)
from rl.flow_grpo import FlowGRPO, FlowGRPOConfig
from rl.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastConfig
from rollout.draws import Prompt, groups_for
from rollout.flow import DiffusionConfig, FlowGrid, shifted_sigmas

GRID = FlowGrid(shifted_sigmas(20, 3.0), DiffusionConfig())
PROMPTS = [Prompt(str(i), f"a handwritten {i}", {}) for i in range(10)]


def groups(step: int, count: int = 24, size: int = 8):
    return groups_for(PROMPTS, seed=5, step=step, count=count, size=size)


def test_one_index_for_a_whole_group_and_several_in_a_step():
    plans = FlashGRPO(FlashGRPOConfig(), GRID, 1.0, 5).plans(3, groups(3))
    assert all(len(plan.sde_indices) == 1 and not plan.member_indices for plan in plans)
    assert len({plan.sde_indices for plan in plans}) == 10


def test_indices_are_uniform_over_the_pool_and_even_within_a_step():
    pool = range(10)
    counts = np.zeros(10)
    for step in range(200):
        indices = stratified_indices(pool, 5, step, 24)
        within = np.bincount(indices, minlength=10)
        assert within.max() - within.min() <= 1
        counts += within
    assert counts / counts.sum() == pytest.approx(np.full(10, 0.1), abs=0.004)


def test_each_place_of_a_step_sees_every_index():
    seen = {stratified_indices(range(4), 1, step, 3)[0] for step in range(40)}
    assert seen == {0, 1, 2, 3}


def test_indices_depend_on_seed_and_step_only():
    first = stratified_indices(range(10), 5, 7, 24)
    torch.manual_seed(123)
    assert stratified_indices(range(10), 5, 7, 24) == first
    assert stratified_indices(range(10), 5, 8, 24) != first
    assert stratified_indices(range(10), 6, 7, 24) != first


def test_rectification_has_mean_one_over_the_pool():
    weights = rectification_weights(GRID, range(10))
    assert weights[:10].mean().item() == pytest.approx(1.0)
    assert weights[0].item() == pytest.approx(7.476982 / 5.587689, abs=1e-5)
    assert weights[10:].isnan().all()


def test_without_iso_temporal_members_differ():
    config = FlashGRPOConfig(iso_temporal=False)
    plan = FlashGRPO(config, GRID, 1.0, 5).plans(0, groups(0))[0]
    assert len(plan.member_indices) == 8
    assert len(set(plan.member_indices)) > 1


def test_flow_grpo_injects_everywhere_but_at_the_end():
    (plan, *_) = FlowGRPO(FlowGRPOConfig(), GRID, 1.0, 5).plans(0, groups(0))
    assert plan.sde_indices == tuple(range(19))


def test_windows_are_consecutive_and_inside_the_first_half():
    algorithm = FlowGRPOFast(FlowGRPOFastConfig(window=3), GRID, 1.0, 5)
    for step in range(20):
        for plan in algorithm.plans(step, groups(step)):
            assert len(plan.sde_indices) == 3
            assert np.diff(plan.sde_indices).tolist() == [1, 1]
            assert max(plan.sde_indices) < 10
