"""Semi-autoregressive decoding of masked-diffusion language models (LLaDA, arXiv 2502.09992, App. B).

A completion of ``length`` tokens starts as masks and is filled block by block. A step looks at the
whole sequence and commits some of the block's masked places; what is committed stays:

    x0 = argmax(l + temperature Gumbel);  confidence = softmax(l)[x0], or uniform (random remasking)
    fixed schedule:  the n_i most confident,  n_i = floor(m / s) + [i < m mod s]   of m masks in s steps
    threshold:       all with confidence >= threshold, at least one

Caches (Fast-dLLM, arXiv 2505.22618) reuse keys and values computed at the block's first step: of what
stands before the block (``prefix``), or of the later blocks too (``dual``). Caches and threshold
change the law of the samples. So does low-confidence remasking, which sharpens; the law of the model
is random remasking, one token a step, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.draws import Group, keyed_seed
from rollout.policies.base import MaskedDiffusionPolicy, forwards_per_sample

NEVER = -1


class MaskedSamplerConfig(BaseModel, frozen=True, extra="forbid"):
    """How a masked-diffusion policy is decoded."""

    kind: Literal["masked"] = "masked"
    length: int = Field(default=24, ge=1, le=8192, description="Tokens of a completion, at most.")
    block_length: int = Field(default=8, ge=1, description="Tokens of a block; divides length.")
    steps: int = Field(
        default=24, ge=1, description="Steps over all blocks; a multiple of the blocks."
    )
    temperature: float = Field(
        default=1.0, ge=0, description="Of training rollouts; evaluation decodes at 0."
    )
    remasking: Literal["low_confidence", "random"] = Field(
        default="low_confidence",
        description="Which tokens a step commits; random at one token a step is the model's law.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0,
        description="Classifier-free guidance against a masked prompt; 1: none (LLaDA's cfg + 1).",
    )
    cache: Literal["none", "prefix", "dual"] = Field(
        default="none", description="Reuse keys and values within a block: faster, another law."
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Commit everything this confident, at least one; then steps is not used.",
    )
    batch_size: int = Field(
        default=96,
        gt=0,
        description="Samples that a worker draws together; a job holds whole groups.",
    )

    def build(self, policy: MaskedDiffusionPolicy) -> MaskedSampler:
        """The sampler of a policy."""
        return MaskedSampler(self, policy)

    @property
    def blocks(self) -> int:
        """Blocks of a completion."""
        return self.length // self.block_length


@dataclass(frozen=True)
class DecodePlan:
    """How one group is decoded: what differs from the recipe.

    Attributes:
        steps, temperature: None: the recipe's.
        exact: without cache or threshold, whatever the recipe says.
        orders: estimate the variational gap of the samples from so many orders (0: don't).
        given: decode nothing: the text to take instead, columns in braces (``rl/sft.py``).
        passes: score the samples for so many passes over them (``rl/old_scores.py``; 0: don't).
    """

    steps: int | None = None
    temperature: float | None = None
    exact: bool = False
    orders: int = 0
    given: str | None = None
    passes: int = 0


@dataclass(frozen=True)
class Completions:
    """A group's samples, as what an objective replays. All arrays are numpy.

    Attributes:
        prompt: int64 (P,) token ids.
        tokens: int64 (size, length); EOS after the first EOS.
        lengths: int64 (size,), through the first EOS; the whole length where there is none.
        decode_step: int16 (size, length), the step that committed a token; -1 after the first EOS.
        seeds: int64 (size,), the draws' own: masks are keyed by them.
        old: fp32 (passes, size, draws, length), scores by the weights that sampled, if planned.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    decode_step: np.ndarray
    seeds: np.ndarray
    old: np.ndarray | None = None


@dataclass(frozen=True)
class TextSummary:
    """What the driver knows of a group: lengths, and how many samples ended with an EOS."""

    lengths: tuple[int, ...]
    ended: int


@dataclass(frozen=True)
class MaskedRollout:
    """One group of completions; ``media`` are their texts, ``forwards`` network evaluations."""

    group: Group
    replay: Completions
    media: list[str]
    forwards: int
    summary: TextSummary


@dataclass
class Rows:
    """Rows on their way from masks to text.

    Attributes:
        rows: int64 (n,), CPU: their places among all rows of the decoding.
        tokens: int64 (n, P + length), the prompt padded on the left; blocks write into it.
        attention_mask: (n, P + length), 0 at padding; None: no padding.
        cache: keys and values, within a block.
    """

    rows: Tensor
    tokens: Tensor
    attention_mask: Tensor | None
    cache: Any = None

    def keep(self, chosen: Tensor) -> Rows:
        """A copy of the rows where ``chosen`` (n,), on the CPU, is true."""
        mask = None if self.attention_mask is None else self.attention_mask[chosen]
        return Rows(self.rows[chosen], self.tokens[chosen], mask)


class MaskedSampler:
    """Decodes groups. Every number depends on the groups of one call only."""

    def __init__(self, config: MaskedSamplerConfig, policy: MaskedDiffusionPolicy) -> None:
        self.config = config
        self.policy = policy

    @torch.no_grad()
    def sample(self, groups: Sequence[Group], plans: Sequence[DecodePlan]) -> list[MaskedRollout]:
        """Completions of ``groups``, all by the same plan, in order.

        Raises:
            ValueError: plans differ, or a prompt that the policy cannot take.
        """
        if len({replace(plan, orders=0) for plan in plans}) > 1:
            raise ValueError("groups that are decoded together have the same plan")
        prompts = self.policy.encode([group.prompt for group in groups])
        owners = [prompt for prompt, g in zip(prompts, groups, strict=True) for _ in range(g.size)]
        seeds = [group.draw(j).seed for group in groups for j in range(group.size)]
        decoding, rows = self.start(owners, seeds, plans[0])
        completions, decode_step, forwards = decoding.run(rows)
        return self.rollouts(groups, prompts, seeds, completions, decode_step, forwards)

    def start(
        self, prompts: Sequence[Tensor], seeds: Sequence[int], plan: DecodePlan
    ) -> tuple[BlockDecoding, Rows]:
        """A decoding at its beginning, all masks: one row for each prompt, with its own seed."""
        width = max(len(prompt) for prompt in prompts)
        tokens, mask = pad_left(prompts, width, self.policy.eos_token_id)
        blank = torch.full((len(prompts), self.config.length), self.policy.mask_token_id)
        tokens = torch.cat([tokens, blank], dim=1).to(self.policy.device)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(blank)], dim=1).to(self.policy.device)
        config = self.config
        if plan.exact:
            config = config.model_copy(update={"cache": "none", "threshold": None})
        decoding = BlockDecoding(config, self.policy, plan, seeds, width)
        return decoding, Rows(torch.arange(len(tokens)), tokens, mask)

    def rollouts(
        self,
        groups: Sequence[Group],
        prompts: Sequence[Tensor],
        seeds: Sequence[int],
        tokens: Tensor,
        decode_step: Tensor,
        forwards: Tensor,
    ) -> list[MaskedRollout]:
        """Groups with their share of the rows, in order: tokens and steps (B, length), forwards."""
        tokens, lengths, ended = end_at_eos(tokens, self.policy.eos_token_id)
        after = torch.arange(tokens.shape[1]) >= lengths[:, None]
        decode_step = decode_step.masked_fill(after, NEVER)
        texts = self.policy.decode(tokens)
        rollouts: list[MaskedRollout] = []
        start = 0
        for group, prompt in zip(groups, prompts, strict=True):
            span = slice(start, start + group.size)
            start += group.size
            replay = Completions(
                prompt=prompt.numpy(),
                tokens=tokens[span].numpy(),
                lengths=lengths[span].numpy(),
                decode_step=decode_step[span].numpy().astype(np.int16),
                seeds=np.array(seeds[span], np.int64),
            )
            summary = TextSummary(tuple(lengths[span].tolist()), int(ended[span].sum()))
            spent = int(forwards[span].sum())
            rollouts.append(MaskedRollout(group, replay, texts[span], spent, summary))
        return rollouts


class BlockDecoding:
    """One batch on its way from masks to text.

    Attributes:
        decode_step: int64 (B, length), CPU: the step that committed a token; -1: none yet.
        forwards: int64 (B,), CPU: network evaluations so far.
    """

    def __init__(
        self,
        config: MaskedSamplerConfig,
        policy: MaskedDiffusionPolicy,
        plan: DecodePlan,
        seeds: Sequence[int],
        prompt_width: int,
    ) -> None:
        self.config, self.policy = config, policy
        steps = config.steps if plan.steps is None else plan.steps
        per_block = max(steps // config.blocks, 1)
        self.schedule = transfer_counts(config.block_length, per_block)
        self.temperature = config.temperature if plan.temperature is None else plan.temperature
        self.prompt_width = prompt_width
        device = policy.device
        self.generators = [
            torch.Generator(device).manual_seed(keyed_seed(seed, "decode")) for seed in seeds
        ]
        self.decode_step = torch.full((len(seeds), config.length), NEVER)
        self.forwards = torch.zeros(len(seeds), dtype=torch.int64)

    def run(self, state: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Completions and decode steps (B, length), forwards (B,), on the CPU.

        A row whose finished blocks hold an EOS is complete: what follows cannot be part of its
        answer, so it is filled with EOS and costs nothing more.
        """
        width, size = self.prompt_width, self.config.block_length
        final = torch.full_like(state.tokens[:, width:], self.policy.eos_token_id)
        step = 0
        for start in range(width, state.tokens.shape[1], size):
            step = self.block(state, start, step)
            final[state.rows, : start + size - width] = state.tokens[:, width : start + size]
            open_rows = (state.tokens[:, width : start + size] != self.policy.eos_token_id).all(1)
            if not open_rows.any():
                break
            if not open_rows.all():
                state = state.keep(open_rows.cpu())
        return final.cpu(), self.decode_step, self.forwards

    def block(self, state: Rows, start: int, step: int) -> int:
        """Fill the block that begins at ``start`` of all rows; returns the number of the next step."""
        stop = start + self.config.block_length
        threshold = self.config.threshold
        limit = len(self.schedule) if threshold is None else self.config.block_length
        for i in range(limit):
            masked = state.tokens[:, start:stop] == self.policy.mask_token_id
            if not masked.any():
                break
            logits = self._logits(state, start, stop, masked, first=i == 0)
            proposed, confidence = self._propose(state, logits, masked)
            if threshold is None:
                places = confidence.topk(min(self.schedule[i], masked.shape[1]), dim=1).indices
                commit = torch.zeros_like(masked).scatter_(1, places, value=True) & masked
            else:
                best = confidence.argmax(dim=1, keepdim=True)
                commit = (confidence >= threshold).scatter_(1, best, value=True) & masked
            state.tokens[:, start:stop] = torch.where(commit, proposed, state.tokens[:, start:stop])
            rows, places = commit.cpu().nonzero(as_tuple=True)
            self.decode_step[state.rows[rows], places + start - self.prompt_width] = step
            step += 1
        state.cache = None
        return step

    def fill(self, state: Rows, start: int) -> Tensor:
        """What the model would say at once: tokens (n, length), the argmax at masks from ``start``.

        One more evaluation of every row; the rows stay as they are.
        """
        tokens = state.tokens.clone()
        masked = tokens[:, start:] == self.policy.mask_token_id
        logits = self._logits(state, start, tokens.shape[1], masked, first=True)
        state.cache = None
        tokens[:, start:][masked] = logits.argmax(dim=1)
        return tokens[:, self.prompt_width :]

    def _logits(self, state: Rows, start: int, stop: int, masked: Tensor, first: bool) -> Tensor:
        """fp32 (n, vocabulary) at the n masked places of the block, guidance applied."""
        first_token, last = 0, state.tokens.shape[1]
        if self.config.cache != "none" and not first:
            first_token = start
            last = stop if self.config.cache == "dual" else last
        if self.config.cache != "none" and first:
            state.cache = self.policy.new_cache()
        tokens = state.tokens[:, first_token:last]
        where = torch.zeros_like(tokens, dtype=torch.bool)
        where[:, start - first_token : stop - first_token] = masked
        mask = state.attention_mask
        scale = self.config.guidance_scale
        self.forwards[state.rows] += forwards_per_sample(scale)
        if scale == 1.0:
            return self.policy.logits(tokens, mask, where, state.cache, first_token)
        null = tokens.clone()
        null[:, : max(self.prompt_width - first_token, 0)] = self.policy.mask_token_id
        both = self.policy.logits(
            torch.cat([tokens, null]),
            None if mask is None else torch.cat([mask, mask]),
            torch.cat([where, where]),
            state.cache,
            first_token,
        )
        conditional, unconditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        # What neither branch can say (the mask) stays impossible: inf - inf is not a number.
        return guided.masked_fill(unconditional == -torch.inf, -torch.inf)

    def _propose(self, state: Rows, logits: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed tokens and their confidence (B, block); -inf where nothing is masked."""
        counts = masked.sum(dim=1).tolist()
        noised = logits
        if self.temperature > 0:
            noised = logits - self.temperature * self._exponentials(state, counts, logits).log()
        chosen = noised.argmax(dim=1)
        if self.config.remasking == "random":
            confidence = torch.cat(
                [
                    torch.rand(n, generator=self.generators[row], device=logits.device)
                    for row, n in zip(state.rows.tolist(), counts, strict=True)
                ]
            )
        else:
            confidence = logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0].exp()
        proposed = torch.zeros_like(masked, dtype=chosen.dtype)
        proposed[masked] = chosen
        certain = torch.full(masked.shape, -torch.inf, device=logits.device)
        certain[masked] = confidence
        return proposed, certain

    def _exponentials(self, state: Rows, counts: Sequence[int], logits: Tensor) -> Tensor:
        """fp32 exponential noise, each row's from its own generator; -log of it is Gumbel."""
        noise = torch.empty_like(logits)
        start = 0
        for row, count in zip(state.rows.tolist(), counts, strict=True):
            noise[start : start + count].exponential_(generator=self.generators[row])
            start += count
        return noise


def transfer_counts(masked: int, steps: int) -> list[int]:
    """Tokens that each step commits: ``floor(m / s) + [i < m mod s]``."""
    base, extra = divmod(masked, steps)
    return [base + (i < extra) for i in range(steps)]


def pad_left(rows: Sequence[Tensor], width: int, fill: int) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, width) and their key-padding mask (B, width), None where nothing is padded."""
    tokens = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return tokens, None if bool(mask.all()) else mask


def end_at_eos(tokens: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L) with EOS after the first one, lengths (B,) with it, and whether there is one."""
    is_eos = tokens == eos_token_id
    ended = is_eos.any(dim=1)
    lengths = torch.where(ended, is_eos.int().argmax(dim=1) + 1, tokens.shape[1])
    after = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    return tokens.masked_fill(after, eos_token_id), lengths, ended
