"""Masks of a completion, and the bounds of its log-likelihood that they estimate.

x has length L (through its first EOS), M is a set of masked positions, p_i(M) = p(x_i | prompt, x with M
masked). Everything after the EOS is masked in every input, and never scored.

    ELBO    = E_{k ~ U{1..L}, |M| = k}[(L/k) sum_{i in M} log p_i(M)]                  <= log pi
    EUBO_b  = (1/b) sum_i log E[(L/k) 1(i in M) p_i(M)^b]                              >= ELBO

k = L is drawn, k = 0 never: a prompt alone must be able to produce the text. EUBO_b bounds log pi from
above only for b >= L; at the b in use it is a *surrogate* for an upper bound. A token masked in a
single draw has plain grad log p in it, so b matters only with several draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """d draws for one completion of a prompt of P tokens, in a window of G.

    Attributes:
        hidden: bool (d, G), places whose input is the mask; scored: bool (d, G), of these, the ones
            in the loss.
        scale: fp32 (d,); ``mean_d scale_d sum_{scored} log p`` estimates the ELBO (in nats).
        prompt: bool (d, P), prompt tokens that are hidden.
    """

    hidden: Tensor
    scored: Tensor
    scale: Tensor
    prompt: Tensor


def exact_k_masks(
    length: int, window: int, prompt: int, draws: int, generator: torch.Generator
) -> Masks:
    """k ~ U{1..L} of the completion's tokens, stratified over the draws.

    Independent masking with probability t and weight 1/t has the same mean, and a second moment that
    diverges.
    """
    counts = 1 + _stratified(length, draws, generator)
    return _masks(_subsets(length, counts, generator), length / counts, length, window, prompt)


def coupled_masks(
    length: int, window: int, prompt: int, draws: int, generator: torch.Generator
) -> Masks:
    """Pairs of a mask and its complement (ESPO, arXiv 2512.03759): every token is scored once a pair.

    k ~ U{0..L}, stratified over the pairs, weights (L+1)/k and (L+1)/(L-k); an empty mask scores
    nothing. ``draws`` is even.
    """
    counts = _stratified(length + 1, draws // 2, generator)
    first = _subsets(length, counts, generator)
    subsets = torch.stack([first, ~first], dim=1).flatten(0, 1)
    sizes = torch.stack([counts, length - counts], dim=1).flatten()
    return _masks(subsets, (length + 1) / sizes.clamp(min=1), length, window, prompt)


def block_masks(
    length: int,
    window: int,
    prompt: int,
    draws: int,
    generator: torch.Generator,
    block: int,
    context_dropout: float,
) -> Masks:
    """What decoding by blocks sees (SPG): some of one block masked, and all that follows it.

    A block that holds a token of the completion is chosen, 1 <= k of its tokens masked, every later
    token too; of the prompt and the earlier tokens ``context_dropout`` are hidden. All hidden tokens
    of the completion are scored, with weight L / (their number): a per-token mean times L.
    """
    hidden = torch.zeros(draws, length, dtype=torch.bool)
    blocks = -(-length // block)
    for row in range(draws):
        start = block * int(torch.randint(blocks, (1,), generator=generator))
        stop = min(start + block, length)
        count = 1 + int(torch.randint(stop - start, (1,), generator=generator))
        places = torch.randperm(stop - start, generator=generator)[:count]
        hidden[row, :start] = torch.rand(start, generator=generator) < context_dropout
        hidden[row, start + places] = True
        hidden[row, stop:] = True
    masks = _masks(hidden, length / hidden.sum(1), length, window, prompt)
    dropped = torch.rand(draws, prompt, generator=generator) < context_dropout
    return Masks(masks.hidden, masks.scored, masks.scale, dropped)


def full_masks(
    length: int,
    window: int,
    prompt: int,
    draws: int,
    generator: torch.Generator,
    prompt_dropout: float,
) -> Masks:
    """The whole completion masked, and ``prompt_dropout`` of the prompt (diffu-GRPO's one forward).

    The sum of log p is the k = L term alone, hence no ELBO: ``scale`` is 1.
    """
    hidden = torch.ones(draws, length, dtype=torch.bool)
    masks = _masks(hidden, torch.ones(draws), length, window, prompt)
    dropped = torch.rand(draws, prompt, generator=generator) < prompt_dropout
    return Masks(masks.hidden, masks.scored, masks.scale, dropped)


def joined(first: Masks, second: Masks) -> Masks:
    """The draws of both."""
    return Masks(
        torch.cat([first.hidden, second.hidden]),
        torch.cat([first.scored, second.scored]),
        torch.cat([first.scale, second.scale]),
        torch.cat([first.prompt, second.prompt]),
    )


def elbo(log_probs: Tensor, scale: Tensor) -> Tensor:
    """ELBO (n,) in nats of ``log_probs`` (n, d, G), 0 where not scored; ``scale`` (n, d)."""
    return (scale * log_probs.sum(-1)).mean(1)


def eubo(log_probs: Tensor, scored: Tensor, scale: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """EUBO_b (n,) in nats, in log space, and how many tokens it covers (n,).

    A token that no draw masked has no estimate and is left out of both.
    """
    covered = scored.any(1)
    terms = (b * log_probs + scale.log()[..., None]).masked_fill(~scored, -torch.inf)
    # Where every draw is -inf the gradient would be NaN: such tokens get a constant instead.
    terms = terms.masked_fill(~covered[:, None], 0.0)
    averaged = terms.logsumexp(1) - torch.tensor(log_probs.shape[1]).log()
    return (averaged * covered).sum(-1) / b, covered.sum(-1)


def _stratified(options: int, draws: int, generator: torch.Generator) -> Tensor:
    """``draws`` numbers of 0 ... options - 1, ascending and spread out; their mixture is uniform."""
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    strata = (torch.arange(draws) + offset) / draws
    return (strata * options).long().clamp(max=options - 1)


def _subsets(length: int, counts: Tensor, generator: torch.Generator) -> Tensor:
    """bool (d, length): a uniform subset of each size."""
    ranks = torch.rand(len(counts), length, generator=generator).argsort(1).argsort(1)
    return ranks < counts[:, None]


def _masks(subsets: Tensor, scale: Tensor, length: int, window: int, prompt: int) -> Masks:
    draws = len(subsets)
    after = torch.ones(draws, window - length, dtype=torch.bool)
    return Masks(
        hidden=torch.cat([subsets, after], dim=1),
        scored=torch.cat([subsets, ~after], dim=1),
        scale=scale.float(),
        prompt=torch.zeros(draws, prompt, dtype=torch.bool),
    )
