"""Likelihoods along decoding orders: the variational gap, its golden drift, the traces of TraceRL."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import (
    OUTCOMES,
    WINDOW,
    TablePolicy,
    batch_of,
    build,
    completions,
    item_of,
    random_llada,
    random_policy,
    sampler_of,
    toy_batch,
    toy_policy,
)

from rl import gap
from rl.dipod import DipodConfig
from rl.spg import SPGConfig
from rl.text_batches import TextBatch, token_log_probs
from rl.trace_rl import TraceRLConfig
from rollout.draws import Prompt, groups_for
from rollout.masked import Completions, DecodePlan, MaskedSampler
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.policy import LladaPolicy

PROMPT = torch.tensor([3, 4])


@pytest.fixture(scope="module")
def llada() -> LladaPolicy:
    return random_llada()


def chains(policy: MaskedDiffusionPolicy, answer: Tensor, length: int) -> Tensor:
    """The log-probability of an answer along each of its ``length``! orders, a token at a time."""
    orders: list[Tensor] = []
    for order in itertools.permutations(range(length)):
        tokens = torch.cat([PROMPT, torch.full((len(answer),), policy.mask_token_id)])
        total = torch.zeros((), dtype=torch.float64)
        for i in order:
            where = torch.zeros(1, len(tokens), dtype=torch.bool)
            where[0, len(PROMPT) + i] = True
            logits = policy.logits(tokens[None].clone(), None, where)[0]
            total = total + logits.log_softmax(0)[answer[i]]
            tokens[len(PROMPT) + i] = answer[i]
        orders.append(total)
    return torch.stack(orders)


def gradients(policy: MaskedDiffusionPolicy, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, list(policy.trainable().values()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def group_of(rows: list[list[int]], lengths: list[int] | None = None) -> Completions:
    return replace(completions(np.array(rows), lengths), prompt=PROMPT.numpy())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_exact_gap_is_the_enumeration_of_all_orders(length: int):
    """On a random table; what stands after the end changes nothing."""
    policy = random_policy(window=4, vocabulary=3)
    for row in itertools.product(range(3), repeat=length):
        answer = torch.tensor([*row, *[2] * (4 - length)])
        along = chains(policy, answer, length)
        log_prob, bound = gap.exact(policy, PROMPT, answer, length)
        wanted = along.logsumexp(0) - math.log(len(along))
        assert log_prob.item() == pytest.approx(wanted.item(), abs=1e-7)
        assert bound.item() == pytest.approx(along.mean().item(), abs=1e-7)
        other = torch.tensor([*row, *[0] * (4 - length)])
        assert gap.exact(policy, PROMPT, other, length)[0].item() == log_prob.item()


def test_the_exact_likelihood_sums_to_one():
    policy = random_policy(window=3, vocabulary=3)
    answers = [torch.tensor(row) for row in itertools.product(range(3), repeat=3)]
    likelihoods = [gap.exact(policy, PROMPT, a, 3)[0].exp().item() for a in answers]
    assert sum(likelihoods) == pytest.approx(1.0, abs=1e-6)
    bounds = [gap.exact(policy, PROMPT, a, 3)[1].exp().item() for a in answers]
    assert sum(bounds) < 0.95


def test_the_exact_gap_of_a_network_is_the_enumeration_too(llada: LladaPolicy):
    tokens = torch.tensor([40, 50, llada.eos_token_id, *[llada.eos_token_id] * 3])
    along = chains(llada, tokens, 3)
    got = gap.variational_gap(llada, group_of([tokens.tolist()], [3]), 1)
    log_prob = along.logsumexp(0) - math.log(6)
    assert got["log_prob"][0] == pytest.approx(log_prob.item(), abs=1e-4)
    assert got["elbo"][0] == pytest.approx(along.mean().item(), abs=1e-4)
    assert got["gap"][0] == pytest.approx((log_prob - along.mean()).item(), abs=1e-4)
    true, proxy = gradients(llada, log_prob), gradients(llada, along.mean())
    cosine = torch.nn.functional.cosine_similarity(true, proxy, dim=0).item()
    assert got["cosine"][0] == pytest.approx(cosine, abs=1e-4)
    assert 0 < cosine < 0.999


def test_a_group_s_facts_are_its_samples_and_leave_no_trace():
    """Under no_grad, as workers call it: no gradient stays, all contexts in one forward each."""
    policy = random_policy(window=4, vocabulary=3)
    group = group_of([[0, 1, 1, 0], [1, 2, 2, 2], [0, 0, 2, 2]], [4, 2, 3])
    state = torch.random.get_rng_state()
    with torch.no_grad():
        got = gap.variational_gap(policy, group, orders=5)
    assert policy.calls == [15, 3, 7]
    assert policy.theta.grad is None
    assert torch.equal(state, torch.random.get_rng_state())
    for j, length in enumerate((4, 2, 3)):
        answer = torch.from_numpy(group.tokens[j])
        log_prob, bound = gap.exact(policy, PROMPT, answer, length)
        true, proxy = gradients(policy, log_prob), gradients(policy, bound)
        cosine = torch.nn.functional.cosine_similarity(true, proxy, dim=0).item()
        wanted = (log_prob.item(), bound.item(), (log_prob - bound).item(), cosine)
        names = ("log_prob", "elbo", "gap", "cosine")
        assert [got[name][j] for name in names] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_the_gap_is_never_negative(exact: bool, monkeypatch: pytest.MonkeyPatch):
    if not exact:
        monkeypatch.setattr(gap, "EXACT", 0)
    for seed in range(5):
        policy = random_policy(window=3, vocabulary=3, seed=seed)
        rows = [list(row) for row in itertools.product(range(3), repeat=3)]
        got = gap.variational_gap(policy, group_of(rows), orders=3)
        assert min(got["gap"]) >= -1e-7
        assert np.mean(got["gap"]) > 0.05
        assert got["gap"] == pytest.approx(np.subtract(got["log_prob"], got["elbo"]))


@pytest.mark.parametrize("exact", [True, False])
def test_without_dependence_on_context_the_bound_is_tight(
    exact: bool, monkeypatch: pytest.MonkeyPatch
):
    if not exact:
        monkeypatch.setattr(gap, "EXACT", 0)
    policy = random_policy(window=3, vocabulary=3, context=False)
    got = gap.variational_gap(policy, group_of([[0, 1, 1], [1, 0, 1]]), orders=7)
    plain = policy.theta[0].log_softmax(1).detach()
    for j, row in enumerate([[0, 1, 1], [1, 0, 1]]):
        wanted = float(plain[torch.arange(3), torch.tensor(row)].sum())
        assert got["log_prob"][j] == pytest.approx(wanted, abs=1e-6)
    assert got["gap"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert got["cosine"] == pytest.approx([1.0, 1.0], abs=1e-9)
    drifting = gap.variational_gap(random_policy(3, 3), group_of([[0, 1, 1]]), orders=7)
    assert drifting["cosine"][0] < 0.99


def sampled(policy: TablePolicy, orders: int, seed: int) -> dict[str, float]:
    group = replace(group_of([[0, 2, 1]]), seeds=np.array([seed]))
    return {k: v[0] for k, v in gap.variational_gap(policy, group, orders).items()}


def test_many_orders_approach_the_exact_gap(monkeypatch: pytest.MonkeyPatch):
    """4000 of them, within 4 standard errors; they are the sample's own, equal every time."""
    policy = random_policy(window=3, vocabulary=3, seed=2)
    exact = sampled(policy, 4000, 0)
    assert policy.calls == [7]
    along = chains(policy, torch.tensor([0, 2, 1]), 3).detach()
    monkeypatch.setattr(gap, "EXACT", 2)
    policy.calls.clear()
    estimate = sampled(policy, 4000, 0)
    assert sum(policy.calls) == 2 * 12000  # for the chains, then for their gradients
    error = along.std(correction=0).item() / 4000**0.5
    assert estimate["elbo"] == pytest.approx(exact["elbo"], abs=4 * error)
    likelihoods = along.exp()
    error = float(likelihoods.std(correction=0) / likelihoods.mean()) / 4000**0.5
    assert estimate["log_prob"] == pytest.approx(exact["log_prob"], abs=4 * error)
    assert estimate["cosine"] == pytest.approx(exact["cosine"], abs=0.02)
    assert sampled(policy, 5, 0) == sampled(policy, 5, 0)
    assert sampled(policy, 5, 0) != sampled(policy, 5, 1)


def test_few_orders_estimate_too_small_a_gap(monkeypatch: pytest.MonkeyPatch):
    policy = random_policy(window=3, vocabulary=3, seed=2)
    exact = sampled(policy, 1, 0)["gap"]
    monkeypatch.setattr(gap, "EXACT", 0)
    means = [np.mean([sampled(policy, r, seed)["gap"] for seed in range(60)]) for r in (1, 2, 8)]
    assert means[0] == pytest.approx(0, abs=1e-7)
    assert means[0] < means[1] < means[2] < exact


def test_the_toy_s_gaps_are_the_golden_ones():
    got = gap.variational_gap(toy_policy(), completions(OUTCOMES), 1)
    assert got["gap"][:2] == pytest.approx((-0.889584 + 1.307840, -1.994372 + 2.021554), abs=1e-6)


# The toy, drifting and distilled.

REWARDS = torch.tensor([0.8, 1.0, 0.7, 1.0], dtype=torch.float64)
TIGHT = SPGConfig(negatives="elbo", masking="random", draws=4, dipod=DipodConfig())


def exact(policy: TablePolicy) -> tuple[Tensor, Tensor]:
    """log pi and ELBO of AA, AB, BA, BB."""
    pairs = [gap.exact(policy, torch.zeros(1).long(), row, 2) for row in torch.from_numpy(OUTCOMES)]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def likelihoods(policy: TablePolicy) -> Tensor:
    """pi of the four, by hand and fast: two orders, each a place at (M, M) and one after it."""
    a, b, c, d, e, f = policy.theta.detach().sigmoid()
    both = [(d * a + b * c), (d.neg().add(1) * e + b * (1 - c))]
    both += [d * (1 - a) + (1 - b) * f, (1 - d) * (1 - e) + (1 - b) * (1 - f)]
    return torch.stack(both) / 2


def weighted(batch: TextBatch, law: Tensor, advantages: Tensor, beta: float) -> TextBatch:
    """The expectation under ``law`` as weights; lengths of 2 turn per-token bounds into nats."""
    return replace(batch, weights=2 * law, advantages=advantages, distillation=2 * beta * law)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize(
    ("baseline", "beta", "golden_v", "golden_gap", "golden_cosine"),
    [(True, 0.0, 0.973308, 0.029100, 0.8420), (True, 0.2, 0.974121, 0.005861, 0.9615),
     (False, 0.0, None, 0.000354, None)],
    ids=["policy gradient", "dipod", "no baseline"],
)  # fmt: skip
def test_double_drift_golden_numbers(
    baseline: bool,
    beta: float,
    golden_v: float | None,
    golden_gap: float,
    golden_cosine: float | None,
):
    """1500 exact steps of 0.1 on the loss; then likelihood, gap and the worth of the proxy."""
    policy, algorithm = toy_policy([0.0] * 6), build(TIGHT, 2, 2)
    batch = toy_batch(policy)
    for _ in range(1500):
        law = likelihoods(policy)
        advantages = REWARDS - baseline * (law @ REWARDS)
        loss, _ = algorithm.loss(policy, weighted(batch, law, advantages, beta))
        (gradient,) = torch.autograd.grad(loss, policy.theta)
        policy.theta.data -= 0.1 * gradient
    log_pi, bound = exact(policy)
    law = log_pi.detach().exp()
    torch.testing.assert_close(law, likelihoods(policy), rtol=1e-6, atol=1e-9)
    value = law @ REWARDS
    assert float(law @ (log_pi - bound).detach()) == pytest.approx(golden_gap, abs=5e-7)
    if golden_v is None:
        return
    assert value.item() == pytest.approx(golden_v, abs=5e-7)
    (true,) = torch.autograd.grad(log_pi.exp() @ REWARDS, policy.theta, retain_graph=True)
    (proxy,) = torch.autograd.grad((law * (REWARDS - value)) @ bound, policy.theta)
    assert cosine(proxy, true) == pytest.approx(golden_cosine, abs=5e-5)


def test_distilling_a_fixed_teacher_closes_the_gap_and_changes_nothing():
    """To the optimum of E_teacher[ELBO], at weights as in a step that only distils."""
    policy, algorithm = toy_policy(), build(TIGHT, 2, 2)
    log_pi, bound = (part.detach() for part in exact(policy))
    teacher = log_pi.exp()
    assert float(teacher @ (log_pi - bound)) > 0.1
    none = torch.zeros(4, dtype=torch.float64)
    batch = replace(weighted(toy_batch(policy), teacher, REWARDS, 1.0), weights=none)
    optimiser = torch.optim.LBFGS(
        [policy.theta],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss, _ = algorithm.loss(policy, batch)
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    after, tight = (part.detach() for part in exact(policy))
    assert float((after.exp() - teacher).abs().max()) < 1e-8
    assert float((after - tight).abs().max()) < 1e-8
    moved = policy.theta.detach() - toy_policy().theta.detach()
    assert float(moved.abs().max()) > 0.3


@pytest.mark.parametrize("segments", [1, 3, 6, 9])
def test_trace_segments_part_the_completion_in_decoding_order(segments: int):
    algorithm = build(TraceRLConfig(segments=segments))
    lengths = (6, 3, 5, 1, 4)
    made = completions(np.zeros((5, WINDOW), np.int64), lengths, prompt=4, seed=3)
    for j, length in enumerate(lengths):
        masks = algorithm.masks(made, j, torch.Generator())
        assert masks.scored.shape == (segments, WINDOW)
        assert masks.scored.sum(0).tolist() == [1] * length + [0] * (WINDOW - length)
        assert masks.hidden[:, length:].all()
        steps = torch.from_numpy(made.decode_step[j].astype(np.int64))
        for hidden, scored in zip(masks.hidden, masks.scored, strict=True):
            if scored.any():
                assert torch.equal(hidden[:length], steps[:length] >= steps[scored].min())
        sizes = masks.scored.sum(1)[masks.scored.any(1)]
        assert len(sizes) == min(segments, length)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("steps", "remasking"), [(12, "random"), (12, "low_confidence"), (6, "low_confidence")]
)
def test_with_a_segment_a_step_traces_have_the_likelihood_they_were_decoded_with(
    llada: LladaPolicy, monkeypatch: pytest.MonkeyPatch, steps: int, remasking: Any
):
    """The log-probabilities of what was committed, in the sampler's own forwards."""
    config = sampler_of(12, 6, steps=steps, remasking=remasking)
    prompts = [Prompt("0", "1 2", {})]
    groups = groups_for(prompts, seed=0, step=-1, count=1, size=1)
    seen: list[tuple[Tensor, Tensor]] = []
    compute = llada.logits

    def logits(tokens: Tensor, *rest: Any) -> Tensor:
        result = compute(tokens, *rest)
        everywhere = torch.full((12, result.shape[1]), torch.nan)
        everywhere[rest[1][0, -12:]] = result.log_softmax(1)
        seen.append((tokens[0, -12:].clone(), everywhere))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(llada, "logits", logits)
        (made,) = MaskedSampler(config, llada).sample(groups, [DecodePlan()])
    assert (made.summary.lengths, made.summary.ended) == ((12,), 0)
    assert len(seen) == steps
    target = torch.from_numpy(made.replay.tokens[0])
    when = made.replay.decode_step[0].tolist()
    wanted = torch.stack([seen[step][1][place, target[place]] for place, step in enumerate(when)])
    algorithm = build(TraceRLConfig(segments=steps), 12, 6)
    batch = batch_of(llada, [item_of(made.replay, [1.0], [1.0])], algorithm.masks)
    got = token_log_probs(llada, batch)[0]
    torch.testing.assert_close(got.sum(0), wanted, rtol=1e-4, atol=1e-5)
    assert got.sum().item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    for step, (answer, _) in enumerate(seen):
        assert torch.equal(batch.tokens[0, step, -12:], answer)
