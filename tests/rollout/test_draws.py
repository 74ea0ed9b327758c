"""Draws are pure functions of their key: the same everywhere, apart where they must be."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from rollout.draws import (
    EVALUATION_STEP,
    Group,
    Prompt,
    groups_for,
    keyed_generator,
    keyed_seed,
    keyed_uniform,
)

PROMPTS = [Prompt(f"p{i}", f"prompt {i}", {"digit": i}) for i in range(7)]


def ids(step: int, count: int, seed: int = 0) -> list[str]:
    return [g.prompt_id for g in groups_for(PROMPTS, seed=seed, step=step, count=count, size=2)]


def test_seeds_are_pinned_so_that_a_run_can_be_repeated_by_another_release():
    """The numbers are those of ``b2sum -l 64`` on the parts joined by \\x1f, halved."""
    assert keyed_seed(0) == 4246866556266386882
    assert keyed_seed(3, "group", 1, 0, "p2") == 8228809455471676239


def test_seeds_do_not_depend_on_the_process():
    """Python's own hash of strings does."""
    code = "from rollout.draws import keyed_seed; import sys; sys.stdout.write(str(keyed_seed(1, 'a')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == keyed_seed(1, "a")


def test_the_parts_of_a_key_do_not_run_together():
    assert keyed_seed("ab", "c") != keyed_seed("a", "bc") != keyed_seed("abc")
    assert keyed_seed(1, 23) != keyed_seed(12, 3)


def test_seeds_fit_a_signed_64_bit_integer_and_fill_it():
    seeds = [keyed_seed("range", i) for i in range(2000)]
    assert min(seeds) >= 0 and max(seeds) < 2**63
    assert max(seeds) > 0.99 * 2**63
    assert len(set(seeds)) == 2000


def test_keyed_uniform_is_uniform():
    numbers = np.array([keyed_uniform("u", i) for i in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, 10, (0, 1))
    # Chi-squared with 9 degrees of freedom: 27.9 is its 99.9th percentile.
    assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_noise_is_standard_normal_and_the_same_whatever_was_drawn_before():
    draw = groups_for(PROMPTS, seed=0, step=0, count=1, size=2)[0].draw(0)
    noise = draw.noise("initial", (100, 100))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    state = torch.random.get_rng_state()
    draw.noise("other", (5,))
    assert torch.equal(draw.noise("initial", (100, 100)), noise)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_streams_members_and_the_shared_draw_have_unrelated_noise():
    group = groups_for(PROMPTS, seed=0, step=0, count=1, size=4)[0]
    draws = [*(group.draw(j) for j in range(4)), group.shared]
    noise = [d.noise(s, (4000,)) for d in draws for s in ("initial", "inject 3", "inject 4")]
    correlation = torch.corrcoef(torch.stack(noise)) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.08


def test_a_member_keeps_its_noise_when_the_group_grows():
    small, large = (groups_for(PROMPTS, seed=0, step=5, count=3, size=size)[1] for size in (2, 16))
    assert small.draw(1) == large.draw(1)
    assert small.shared == large.shared


def test_a_draw_says_where_it_belongs():
    group = groups_for(PROMPTS, seed=0, step=5, count=3, size=2)[2]
    draw = group.draw(1)
    assert (draw.step, draw.group, draw.prompt_id, draw.index) == (5, 2, group.prompt_id, 1)
    prompt = next(p for p in PROMPTS if p.id == group.prompt_id)
    assert (group.prompt, group.columns, group.size) == (prompt.text, prompt.columns, 2)


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_every_prompt_is_used_once_an_epoch_across_steps(count: int):
    used = [i for step in range(7) for i in ids(step, count)]
    for epoch in range(len(used) // 7):
        assert sorted(used[7 * epoch : 7 * epoch + 7]) == sorted(p.id for p in PROMPTS)
    assert set(Counter(used).values()) == {count}


def test_epochs_and_seeds_have_orders_of_their_own():
    assert len({tuple(ids(step, 7)) for step in range(5)}) == 5
    assert ids(0, 7, seed=0) != ids(0, 7, seed=1)


def test_groups_are_a_function_of_seed_and_step():
    first = groups_for(PROMPTS, seed=1, step=4, count=5, size=2)
    groups_for(PROMPTS, seed=1, step=9, count=5, size=2)
    keyed_generator("something else")
    assert groups_for(PROMPTS, seed=1, step=4, count=5, size=2) == first


def test_no_two_groups_of_a_run_share_a_seed_not_even_of_one_prompt():
    groups: list[Group] = []
    for step in (*range(20), EVALUATION_STEP):
        groups += groups_for(PROMPTS, seed=0, step=step, count=10, size=2)
    assert len({group.seed for group in groups}) == len(groups)
    within = groups_for(PROMPTS[:2], seed=0, step=0, count=4, size=2)
    assert Counter(group.prompt_id for group in within) == {"p0": 2, "p1": 2}


def test_evaluation_takes_the_prompts_in_order_and_starts_again():
    assert ids(EVALUATION_STEP, 9) == [f"p{i}" for i in (0, 1, 2, 3, 4, 5, 6, 0, 1)]
