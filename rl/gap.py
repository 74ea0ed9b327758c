"""The variational gap of a policy's own samples, and what the bound's gradient is worth (DiPOD's track).

    log pi(x) = log mean over orders sigma of prod_s p(x_sigma(s) | what came before)
    ELBO(x)   = mean over orders of the sum of the same terms' logs
    D^L       = log pi(x) - ELBO(x) >= 0
    cosine    = cos(grad ELBO, grad log pi): both gradients, from the same forwards

Up to ``EXACT`` tokens all 2^L contexts are computed and everything is exact. Beyond, R sampled orders
stand for all: log mean exp of R chains is too low by Jensen, so the gap is too small; compare it over
time at the same R, not with other lengths. The cosine is per sample, averaged by the caller.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from rollout.draws import keyed_generator
from rollout.masked import Completions
from rollout.policies.base import MaskedDiffusionPolicy

EXACT = 6
# Contexts of a forward with gradient.
CHUNK = 128

Gradients = tuple[Tensor, ...]


def variational_gap(
    policy: MaskedDiffusionPolicy, completions: Completions, orders: int
) -> dict[str, tuple[float, ...]]:
    """``log_prob``, ``elbo``, ``gap`` (nats) and ``cosine`` of every sample of a group.

    Args:
        policy: evaluated at ``L`` inputs per order and sample, with gradient.
        completions: the group.
        orders: R, keyed by the sample's seed: the same in every evaluation.
    """
    rows = [_one(policy, completions, j, orders) for j in range(len(completions.tokens))]
    return {name: tuple(row[name] for row in rows) for name in rows[0]}


def _one(
    policy: MaskedDiffusionPolicy, completions: Completions, member: int, orders: int
) -> dict[str, float]:
    length = int(completions.lengths[member])
    prompt = torch.from_numpy(completions.prompt)
    answer = torch.from_numpy(completions.tokens[member])
    parameters = list(policy.trainable().values())
    if length <= EXACT:
        with torch.enable_grad():
            log_prob, bound = exact(policy, prompt, answer, length)
            true = torch.autograd.grad(log_prob, parameters, retain_graph=True)
            proxy = torch.autograd.grad(bound, parameters)
    else:
        generator = keyed_generator(int(completions.seeds[member]), "orders")
        drawn = [torch.randperm(length, generator=generator) for _ in range(orders)]
        log_prob, bound, true, proxy = _sampled(policy, prompt, answer, torch.stack(drawn))
    return {
        "log_prob": log_prob.item(),
        "elbo": bound.item(),
        "gap": (log_prob - bound).item(),
        "cosine": _cosine(true, proxy),
    }


def exact(
    policy: MaskedDiffusionPolicy, prompt: Tensor, answer: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """log pi and ELBO of the first ``length`` tokens of ``answer``, from all 2^L - 1 contexts.

    With f(S) the probability of the rest given that S is revealed, averaged over orders:
    f(all) = 1, f(S) = mean over i not in S of p_i(S) f(S + i).
    """
    contexts = [
        frozenset(c) for n in range(length) for c in itertools.combinations(range(length), n)
    ]
    hidden = torch.ones(len(contexts), len(answer), dtype=torch.bool)
    for row, context in enumerate(contexts):
        hidden[row, list(context)] = False
    log_probs = _log_probs(policy, prompt, answer, hidden, length)
    place = {context: row for row, context in enumerate(contexts)}
    log_f: dict[frozenset[int], Tensor] = {frozenset(range(length)): torch.zeros(())}
    bound_f: dict[frozenset[int], Tensor] = dict(log_f)
    for context in reversed(contexts):
        rest = [i for i in range(length) if i not in context]
        terms = [log_probs[place[context], i] for i in rest]
        after = [context | {i} for i in rest]
        mean = torch.tensor(float(len(rest))).log()
        log_f[context] = (
            torch.stack([t + log_f[a].to(t) for t, a in zip(terms, after, strict=True)]).logsumexp(
                0
            )
            - mean
        )
        bound_f[context] = torch.stack(
            [t + bound_f[a].to(t) for t, a in zip(terms, after, strict=True)]
        ).mean()
    return log_f[frozenset()], bound_f[frozenset()]


def _sampled(
    policy: MaskedDiffusionPolicy, prompt: Tensor, answer: Tensor, orders: Tensor
) -> tuple[Tensor, Tensor, Gradients, Gradients]:
    """log pi and ELBO of the sample from ``orders`` (R, L), and their gradients.

    Both gradients are sums over contexts, with the chains' softmax and 1/R as weights; they are
    gathered over ``CHUNK`` contexts at a time, so that memory does not grow with R and L.
    """
    count, length = orders.shape
    hidden = torch.ones(count, length, len(answer), dtype=torch.bool)
    hidden[:, :, :length] = orders.argsort(1)[:, None] >= torch.arange(length)[:, None]
    contexts, chosen = hidden.flatten(0, 1), orders.flatten()

    def terms(rows: slice) -> Tensor:
        log_probs = _log_probs(policy, prompt, answer, contexts[rows], length)
        return log_probs.gather(1, chosen[rows, None].to(log_probs.device))[:, 0]

    spans = [slice(start, start + CHUNK) for start in range(0, len(contexts), CHUNK)]
    with torch.no_grad():
        chains = torch.cat([terms(rows) for rows in spans]).reshape(count, length).sum(1)
    shares = chains.softmax(0).repeat_interleave(length)
    parameters = list(policy.trainable().values())
    true = proxy = tuple(torch.zeros_like(p) for p in parameters)
    for rows in spans:
        with torch.enable_grad():
            part = terms(rows)
            weighted = torch.autograd.grad(
                (shares[rows] * part).sum(), parameters, retain_graph=True
            )
            mean = torch.autograd.grad(part.sum() / count, parameters)
        true = tuple(a + b for a, b in zip(true, weighted, strict=True))
        proxy = tuple(a + b for a, b in zip(proxy, mean, strict=True))
    log_prob = chains.logsumexp(0) - torch.tensor(float(count)).log()
    return log_prob, chains.mean(), true, proxy


def _log_probs(
    policy: MaskedDiffusionPolicy, prompt: Tensor, answer: Tensor, hidden: Tensor, length: int
) -> Tensor:
    """log p (rows, length) of the hidden tokens at each row's context, 0 at the others."""
    masked = answer.expand(len(hidden), -1).masked_fill(hidden, policy.mask_token_id)
    tokens = torch.cat([prompt.expand(len(hidden), -1), masked], dim=1).to(policy.device)
    scored = hidden[:, :length].to(policy.device)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, len(prompt) : len(prompt) + length] = scored
    logits = policy.logits(tokens, None, where)
    targets = answer[:length].to(policy.device).expand(len(hidden), -1)[scored]
    chosen = -functional.cross_entropy(logits, targets, reduction="none")
    return torch.zeros_like(scored, dtype=chosen.dtype).masked_scatter(scored, chosen)


def _cosine(first: Gradients, second: Gradients) -> float:
    dot = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    norms = [sum(float(a.square().sum()) for a in part) ** 0.5 for part in (first, second)]
    return dot / max(norms[0] * norms[1], 1e-30)
