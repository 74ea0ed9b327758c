"""Laws of the masks, and the bounds they estimate: the specification's golden numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from toy import (
    AA,
    AB,
    CONFIGS,
    OUTCOMES,
    WINDOW,
    batch_of,
    batches,
    build,
    completions,
    every_mask,
    item_of,
    items_of,
    joint,
    random_llada,
    random_policy,
    toy_batch,
    toy_policy,
)

from rl.bounds import (
    Masks,
    block_masks,
    coupled_masks,
    elbo,
    eubo,
    exact_k_masks,
    full_masks,
    joined,
)
from rl.gap import exact
from rl.items import share
from rl.text_batches import TextBatch, token_log_probs
from rollout.policies.llada.policy import LladaPolicy

# Frequencies are compared at 99.9 % (chi-square) or at 4 standard errors, from fixed seeds.
LENGTH, ROOM, PROMPT, DRAWS = 5, 8, 6, 3000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(observed: Counter[Any], options: int) -> None:
    """Every option as often as any other, at 99.9 %."""
    expected = sum(observed.values()) / options
    assert len(observed) == options
    statistic = sum((count - expected) ** 2 / expected for count in observed.values())
    assert statistic < chi2.ppf(0.999, options - 1)


def subset(row: Tensor) -> tuple[int, ...]:
    return tuple(row.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("outcome", "log_pi", "lower", "upper"),
    [
        (AA, -0.889584, -1.307840, (-1.068517, -0.966647, -0.880271)),
        (AB, -1.994372, -2.021554, (-1.773683, -1.669192, -1.581285)),
    ],
    ids=["AA", "AB"],
)
def test_golden_bounds_of_the_toy(
    outcome: int, log_pi: float, lower: float, upper: tuple[float, ...]
):
    policy = toy_policy()
    batch = toy_batch(policy)
    log_probs = token_log_probs(policy, batch)
    assert elbo(log_probs, batch.scale)[outcome].item() == pytest.approx(lower, abs=5e-7)
    for b, golden in zip((1.0, 1.5, 2.0), upper, strict=True):
        value, covered = eubo(log_probs, batch.scored, batch.scale, b)
        assert value[outcome].item() == pytest.approx(golden, abs=5e-7)
        assert covered[outcome] == 2
    true, bound = exact(policy, torch.zeros(1).long(), torch.from_numpy(OUTCOMES[outcome]), 2)
    assert true.item() == pytest.approx(log_pi, abs=5e-7)
    assert bound.item() == pytest.approx(lower, abs=5e-7)


def random_log_probs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of completions of three tokens at every mask: log-probabilities, scored, scale, log pi."""
    policy = random_policy(window=3, vocabulary=3)
    tokens = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(3)])
    item = item_of(completions(tokens), np.zeros(27), np.zeros(27))
    batch = batch_of(policy, [item], lambda c, j, g: every_mask(3))
    pairs = [exact(policy, torch.zeros(1).long(), torch.from_numpy(row), 3) for row in tokens]
    with torch.no_grad():
        log_probs = token_log_probs(policy, batch)
    return log_probs, batch.scored, batch.scale, torch.stack([pair[0] for pair in pairs]).detach()


def test_the_bounds_are_ordered_and_the_upper_one_holds_for_b_of_the_length():
    log_probs, scored, scale, log_pi = random_log_probs()
    lower = elbo(log_probs, scale)
    assert (lower <= log_pi + 1e-9).all()
    previous = lower
    for b in (1.0, 1.25, 1.5, 2.0, 3.0):
        upper, _ = eubo(log_probs, scored, scale, b)
        assert (upper >= previous - 1e-9).all()
        previous = upper
    assert (previous >= log_pi - 1e-9).all()
    surrogate, _ = eubo(log_probs, scored, scale, 1.0)
    assert (surrogate < log_pi - 1e-3).any()


def test_with_one_draw_the_upper_bound_s_gradient_is_that_of_plain_log_p():
    masks = exact_k_masks(LENGTH, ROOM, PROMPT, 1, generator(3))
    log_probs = torch.linspace(-3, -0.1, ROOM).expand(1, 1, ROOM) * masks.scored
    for b in (1.0, 1.5, 5.0):
        leaf = log_probs.clone().requires_grad_()
        value, covered = eubo(leaf, masks.scored[None], masks.scale[None], b)
        value.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, masks.scored[None].float())
        assert covered.item() == masks.scored.sum()
        constant = covered * masks.scale.log() / b
        assert value.item() == pytest.approx((log_probs.sum() + constant).item(), rel=1e-5)


def test_with_several_draws_the_upper_bound_weighs_the_likelier_ones_by_p_to_the_b():
    b, scale = 1.5, torch.tensor([[4.0, 2.0, 1.0]], dtype=torch.float64)
    log_probs = torch.tensor([-2.0, -0.5, -1.0], dtype=torch.float64).reshape(1, 3, 1)
    leaf = log_probs.clone().requires_grad_()
    eubo(leaf, torch.ones(1, 3, 1).bool(), scale, b)[0].sum().backward()
    weights = scale.flatten() * (b * log_probs.flatten()).exp()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.flatten(), weights / weights.sum())


def test_a_token_that_no_draw_masked_is_left_out_and_has_no_gradient():
    scored = torch.tensor([[[True, False, False], [True, True, False]]])
    leaf = torch.tensor([[[-1.0, 0, 0], [-1.0, -2.0, 0]]], requires_grad=True)
    value, covered = eubo(leaf, scored, torch.tensor([[3.0, 1.5]]), 1.0)
    value.sum().backward()
    assert covered.item() == 2
    wanted = math.log((3 + 1.5) / 2) - 1 + math.log(1.5 / 2) - 2
    assert value.item() == pytest.approx(wanted, abs=1e-6)
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[~scored].any()


LAWS: dict[str, Callable[[int], Masks]] = {
    "exact_k": lambda draws: exact_k_masks(LENGTH, ROOM, PROMPT, draws, generator()),
    "coupled": lambda draws: coupled_masks(LENGTH, ROOM, PROMPT, draws, generator()),
    "block": lambda draws: block_masks(LENGTH, ROOM, PROMPT, draws, generator(), 2, 0.15),
    "full": lambda draws: full_masks(LENGTH, ROOM, PROMPT, draws, generator(), 0.15),
}


@pytest.mark.parametrize("law", LAWS)
def test_after_the_end_all_is_hidden_and_nothing_scored_but_the_eos_is(law: str):
    masks = LAWS[law](DRAWS)
    assert masks.hidden.shape == masks.scored.shape == (DRAWS, ROOM)
    assert masks.prompt.shape == (DRAWS, PROMPT)
    assert masks.scale.shape == (DRAWS,)
    assert masks.scale.dtype == torch.float32
    assert masks.hidden[:, LENGTH:].all()
    assert not masks.scored[:, LENGTH:].any()
    assert torch.equal(masks.hidden[:, :LENGTH], masks.scored[:, :LENGTH])
    assert masks.scored[:, LENGTH - 1].float().mean() > 0.4
    if law in ("exact_k", "coupled"):
        assert not masks.prompt.any()


@pytest.mark.parametrize("law", LAWS)
def test_masks_are_their_generator_s(law: str):
    state = torch.random.get_rng_state()
    first, second = LAWS[law](8), LAWS[law](8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.prompt, second.prompt)


def test_exact_k_is_stratified_over_1_to_the_length_and_uniform_over_subsets():
    masks = exact_k_masks(LENGTH, ROOM, PROMPT, LENGTH * 600, generator())
    counts = masks.scored.sum(1)
    assert counts.bincount().tolist() == [0, *[600] * LENGTH]
    torch.testing.assert_close(masks.scale, LENGTH / counts)
    for k in range(1, LENGTH):
        chosen = Counter[Any](subset(row) for row in masks.scored[counts == k])
        assert_uniform(chosen, math.comb(LENGTH, k))


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_few_draws_of_exact_k_are_uniform_too_and_apart(draws: int):
    seen: Counter[int] = Counter()
    for seed in range(1200 // draws):
        counts = exact_k_masks(LENGTH, LENGTH, 0, draws, generator(seed)).scored.sum(1).tolist()
        assert max(counts) - min(counts) >= (draws - 1) * LENGTH // draws
        seen.update(counts)
    assert set(seen) == set(range(1, LENGTH + 1))
    # Draws of one call are apart, so their frequencies vary less than independent ones.
    assert_uniform(seen, LENGTH)


def test_a_completion_of_one_token_is_always_masked():
    masks = exact_k_masks(1, 4, 2, 7, generator())
    assert masks.hidden.all()
    assert masks.scored.tolist() == [[True, False, False, False]] * 7
    assert masks.scale.tolist() == [1.0] * 7


def test_coupled_masks_are_a_mask_and_its_complement_with_all_sizes():
    masks = coupled_masks(LENGTH, ROOM, PROMPT, 2 * 6 * 400, generator())
    first, second = masks.scored[0::2, :LENGTH], masks.scored[1::2, :LENGTH]
    assert torch.equal(first, ~second)
    counts = first.sum(1)
    assert counts.bincount().tolist() == [400] * (LENGTH + 1)
    sizes = masks.scored.sum(1)
    torch.testing.assert_close(masks.scale[sizes > 0], (LENGTH + 1) / sizes[sizes > 0])
    assert torch.isfinite(masks.scale).all()
    for k in range(1, LENGTH):
        chosen = Counter[Any](subset(row) for row in first[counts == k])
        assert_uniform(chosen, math.comb(LENGTH, k))


@pytest.mark.parametrize("law", ["exact_k", "coupled"])
def test_the_estimators_mean_is_the_bound(law: str):
    """20,000 draws on a random table, within 4 standard errors (which strata only make smaller)."""
    policy, draws = random_policy(window=3, vocabulary=3, seed=4), 20_000
    make = {"exact_k": exact_k_masks, "coupled": coupled_masks}[law]
    item = item_of(completions(np.array([[0, 2, 1]])), [0.0], [0.0])
    batch = batch_of(policy, [item], lambda c, j, g: make(3, 3, 1, draws, g))
    with torch.no_grad():
        log_probs = token_log_probs(policy, batch)
    _, bound = exact(policy, torch.zeros(1).long(), torch.tensor([0, 2, 1]), 3)
    terms = batch.scale[0] * log_probs[0].sum(-1)
    estimate = elbo(log_probs, batch.scale).item()
    # A pair is one independent draw of the coupled law.
    error = terms.reshape(-1, 2).mean(1).std().item() / math.sqrt(draws / 2)
    assert error < 0.02
    assert estimate == pytest.approx(bound.item(), abs=4 * error)


def test_coupled_masks_have_exactly_the_bound_as_mean():
    """All sizes and subsets by hand, each with its complement."""
    policy, tokens = random_policy(window=3, vocabulary=3, seed=4), torch.tensor([0, 2, 1])
    subsets = [(k, s) for k in range(4) for s in range(8) if s.bit_count() == k]
    pairs = [(k, s) for k, s in subsets for _ in range(3 // math.comb(3, k))]
    hidden = torch.tensor([[bool(s >> i & 1) for i in range(3)] for _, s in pairs])
    both = torch.stack([hidden, ~hidden], dim=1).flatten(0, 1)
    sizes = both.sum(1)
    by_hand = Masks(both, both, 4 / sizes.clamp(min=1), torch.zeros(len(both), 1).bool())
    drawn = coupled_masks(3, 3, 1, 400, generator())
    by_hand_rows, drawn_rows = (
        torch.cat([masks.scored, masks.scale[:, None]], dim=1).unique(dim=0)
        for masks in (by_hand, drawn)
    )
    assert torch.equal(by_hand_rows, drawn_rows)
    item = item_of(completions(tokens.numpy()[None]), [0.0], [0.0])
    batch = batch_of(policy, [item], lambda c, j, g: by_hand)
    _, bound = exact(policy, torch.zeros(1).long(), tokens, 3)
    estimate = elbo(token_log_probs(policy, batch), batch.scale)
    assert estimate.item() == pytest.approx(bound.item(), abs=1e-6)


BLOCK_LENGTH = 11  # three blocks of 4, 4 and 3


def test_blocks_and_numbers_of_masked_tokens_are_uniform_and_what_follows_is_hidden():
    masks = block_masks(BLOCK_LENGTH, 16, PROMPT, DRAWS, generator(), 4, 0.0)
    assert not masks.prompt.any()
    blocks: Counter[int] = Counter()
    counts: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    singles: Counter[Any] = Counter()
    for row in masks.hidden:
        block = int(row.int().argmax()) // 4
        stop = min(4 * block + 4, BLOCK_LENGTH)
        inside = row[4 * block : stop]
        assert row[stop:].all()
        blocks[block] += 1
        counts[block][int(inside.sum())] += 1
        if block == 0 and inside.sum() == 1:
            singles[subset(inside)] += 1
    assert_uniform(blocks, 3)
    for block, size in ((0, 4), (1, 4), (2, 3)):
        assert set(counts[block]) == set(range(1, size + 1))
        assert_uniform(counts[block], size)
    assert_uniform(singles, 4)
    torch.testing.assert_close(masks.scale, BLOCK_LENGTH / masks.scored.sum(1))


def test_the_dropped_share_of_prompt_and_earlier_tokens():
    masks = block_masks(BLOCK_LENGTH, 16, PROMPT, DRAWS, generator(1), 4, 0.15)
    share = masks.prompt.float().mean().item()
    assert share == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / DRAWS / PROMPT))
    # The first block is chosen once in three: then 2.5 of 4 tokens are masked, else dropped.
    expected = (1 / 3) * 2.5 / 4 + (2 / 3) * 0.15
    first = masks.hidden[:, :4].float().mean(1)
    assert first.mean().item() == pytest.approx(expected, abs=4 * first.std().item() / DRAWS**0.5)
    assert masks.hidden[:, 8:BLOCK_LENGTH].any(1).all()
    torch.testing.assert_close(masks.scale, BLOCK_LENGTH / masks.scored.sum(1))
    assert torch.equal(masks.scored[:, :BLOCK_LENGTH], masks.hidden[:, :BLOCK_LENGTH])


def test_full_masks_hide_all_of_the_answer_and_a_share_of_the_prompt():
    masks = LAWS["full"](DRAWS)
    assert masks.hidden.all()
    assert masks.scored[:, :LENGTH].all()
    assert masks.scale.tolist() == [1.0] * DRAWS
    share = masks.prompt.float().mean().item()
    assert share == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / DRAWS / PROMPT))


def test_joined_masks_keep_the_order_of_draws():
    first, second = LAWS["full"](1), LAWS["exact_k"](3)
    both = joined(first, second)
    for name in ("hidden", "scored", "scale", "prompt"):
        left, right = getattr(first, name), getattr(second, name)
        assert torch.equal(getattr(both, name)[:1], left)
        assert torch.equal(getattr(both, name)[1:], right)


@pytest.fixture(scope="module")
def llada() -> LladaPolicy:
    return random_llada()


def masks_by_sample(parts: Sequence[TextBatch]) -> dict[Any, list[Any]]:
    """What each sample (known by its targets) is scored at, without left padding."""
    found: dict[Any, list[Any]] = {}
    for batch in parts:
        for j in range(len(batch.tokens)):
            tokens = batch.tokens[j]
            if batch.attention_mask is not None:
                tokens = tokens[:, batch.attention_mask[j].bool()]
            key = (*batch.targets[j].tolist(), tokens.shape[1])
            found[key] = [tokens.tolist(), batch.scored[j].tolist(), batch.scale[j].tolist()]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_masks_depend_on_seed_pass_and_sample_only(llada: LladaPolicy, name: str):
    algorithm = build(joint(CONFIGS[name]))
    items = items_of(llada, algorithm)
    whole = masks_by_sample(batches(llada, algorithm, items, 12))
    assert len(whole) == 12
    torch.manual_seed(99)
    assert masks_by_sample(batches(llada, algorithm, items, 1)) == whole
    assert masks_by_sample(batches(llada, algorithm, items[::-1], 5)) == whole
    parts = [masks_by_sample(batches(llada, algorithm, p, 2)) for p in share(items, 2)]
    assert {k: v for part in parts for k, v in part.items()} == whole
    later = [replace(item, epoch=1) for item in items]
    other = masks_by_sample(batches(llada, algorithm, later, 12))
    assert other.keys() == whole.keys()
    assert sum(other[key] != whole[key] for key in whole) > 6
    # Another seed of each group's second member: its masks change and nobody else's.
    reseeded = [
        replace(i, replay=replace(i.replay, seeds=i.replay.seeds + np.array([0, 1, 0])))
        for i in items
    ]
    other = masks_by_sample(batches(llada, algorithm, reseeded, 12))
    changed = {key for key in whole if other[key] != whole[key]}
    second = {(*i.replay.tokens[1].tolist(), len(i.replay.prompt) + WINDOW) for i in items}
    assert changed and changed <= second


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_hide_what_is_scored_and_what_follows_the_end(llada: LladaPolicy, name: str):
    algorithm = build(CONFIGS[name])
    (batch,) = batches(llada, algorithm, items_of(llada, algorithm), 12)
    answers = batch.tokens[..., -WINDOW:]
    after = torch.arange(WINDOW) >= batch.lengths[:, None]
    hidden = answers == llada.mask_token_id
    targets = batch.targets[:, None].expand_as(answers)
    assert hidden[batch.scored].all()
    assert hidden[after[:, None].expand_as(hidden)].all()
    assert not (batch.scored & after[:, None]).any()
    assert torch.equal(answers[~hidden], targets[~hidden])
    ends = torch.arange(WINDOW) == batch.lengths[:, None] - 1
    short = batch.lengths < WINDOW
    assert (batch.targets[ends & short[:, None]] == llada.eos_token_id).all()
    assert (batch.scored & ends[:, None])[short].any()
