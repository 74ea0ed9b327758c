"""From completions to the micro-batches of a learner rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rl.bounds import Masks
from rl.items import Item
from rollout.draws import keyed_generator
from rollout.masked import Completions, pad_left
from rollout.policies.base import MaskedDiffusionPolicy

# One completion of a group and the generator of its masks, to its draws.
Masking = Callable[[Completions, int, torch.Generator], Masks]


@dataclass(frozen=True)
class TextBatch:
    """n completions with d masked inputs each, on the policy's device.

    Shapes: ``tokens`` (n, d, P + G) with masks, left-padded; ``attention_mask`` (n, P + G) or None;
    ``scored`` (n, d, G); ``scale`` (n, d), see ``rl/bounds.py``; ``targets`` (n, G); ``lengths``,
    ``advantages``, ``weights``, ``distillation`` (n,); ``old`` (n, d, G), log-probabilities under the
    weights at the start of the update or those that sampled, where the objective compares with them.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    scored: Tensor
    scale: Tensor
    targets: Tensor
    lengths: Tensor
    advantages: Tensor
    weights: Tensor
    distillation: Tensor
    old: Tensor | None = None


def text_batches(
    policy: MaskedDiffusionPolicy,
    items: Sequence[Item],
    fetch: Callable[[Any], Completions],
    size: int,
    count: int,
    masking: Masking,
    draws: int,
) -> Iterator[TextBatch]:
    """Exactly ``count`` micro-batches of ``size`` completions of ``draws`` masks, the rest empty.

    Masks are keyed by (the completion's own seed, the pass): a function of (seed, step, pass, sample)
    on any rank, in any micro-batch.
    """
    fetched = [(item, fetch(item.replay)) for item in items]
    samples = [(item, c, j) for item, c in fetched for j in range(len(c.tokens))]
    width = max((len(c.prompt) for _, c in fetched), default=1)
    for start in range(0, count * size, size):
        part = samples[start : start + size]
        yield _batch(policy, part, width, masking) if part else _padding(policy, draws)


def token_log_probs(policy: MaskedDiffusionPolicy, batch: TextBatch) -> Tensor:
    """log p of the scored tokens (n, d, G) in fp32, 0 elsewhere."""
    draws, window = batch.tokens.shape[1], batch.targets.shape[1]
    where = torch.zeros_like(batch.tokens, dtype=torch.bool)
    where[..., -window:] = batch.scored
    mask = batch.attention_mask
    logits = policy.logits(
        batch.tokens.flatten(0, 1),
        None if mask is None else mask.repeat_interleave(draws, dim=0),
        where.flatten(0, 1),
    )
    targets = batch.targets[:, None].expand_as(batch.scored)[batch.scored]
    chosen = -functional.cross_entropy(logits, targets, reduction="none")
    return torch.zeros_like(batch.scored, dtype=chosen.dtype).masked_scatter(batch.scored, chosen)


def _batch(
    policy: MaskedDiffusionPolicy,
    part: Sequence[tuple[Item, Completions, int]],
    width: int,
    masking: Masking,
) -> TextBatch:
    rows: list[Tensor] = []
    masks: list[Masks] = []
    for item, completions, j in part:
        generator = keyed_generator(int(completions.seeds[j]), "masks", item.epoch)
        drawn = masking(completions, j, generator)
        prompt = torch.from_numpy(completions.prompt)
        answer = torch.from_numpy(completions.tokens[j])
        hidden = torch.cat([drawn.prompt, drawn.hidden], dim=1)
        noised = torch.cat([prompt, answer]).masked_fill(hidden, policy.mask_token_id)
        rows.extend(noised)
        masks.append(drawn)
    draws, window = masks[0].hidden.shape
    tokens, attention_mask = pad_left(rows, width + window, policy.eos_token_id)
    if attention_mask is not None:
        attention_mask = attention_mask[::draws].to(policy.device)
    numbers = {
        name: torch.tensor([float(getattr(i, name)[j]) for i, _, j in part])
        for name in ("advantages", "weights", "distillation")
    }
    tensors = {
        "tokens": tokens.unflatten(0, (len(part), draws)),
        "scored": torch.stack([m.scored for m in masks]),
        "scale": torch.stack([m.scale for m in masks]),
        "targets": torch.stack([torch.from_numpy(c.tokens[j]) for _, c, j in part]),
        "lengths": torch.tensor([float(c.lengths[j]) for _, c, j in part]),
        **numbers,
    }
    # Groups of one rollout set have one plan: all come with scores, or none does.
    if old := [c.old[item.epoch, j] for item, c, j in part if c.old is not None]:
        tensors["old"] = torch.from_numpy(np.stack(old))
    placed = {name: tensor.to(policy.device) for name, tensor in tensors.items()}
    return TextBatch(attention_mask=attention_mask, **placed)


def _padding(policy: MaskedDiffusionPolicy, draws: int) -> TextBatch:
    """Inputs with nothing to score: the network runs, the loss is 0."""
    device = policy.device
    tokens = torch.full((1, draws, 2), policy.eos_token_id, device=device)
    none = torch.zeros(1, device=device)
    return TextBatch(
        tokens=tokens,
        attention_mask=None,
        scored=torch.zeros(1, draws, 1, dtype=torch.bool, device=device),
        scale=torch.ones(1, draws, device=device),
        targets=tokens[:, 0, :1],
        lengths=none + 1,
        advantages=none,
        weights=none,
        distillation=none,
    )
