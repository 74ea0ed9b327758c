"""Supervised fine-tuning on given answers, with LLaDA's loss (arXiv 2502.09992, section 2.3).

    x = the answer, its end of turn, and EOS up to the window of G tokens
    t ~ U(0, 1), stratified over a completion's draws;  each token of x masked with probability t
    loss = -mean_draws (1/t) sum_{masked} log p / G;  a mean over completions

Nothing is decoded for training: a group's completions are the text that ``completion`` makes of its
columns. The EOS are trained like every other token, which is how a length is learnt; LLaDA pads to
the longest answer of a batch, here to ``rollout.length``, so that a loss depends on no neighbour. As
in LLaDA's release t is kept off 0 (``1e-3 + (1 - 1e-3) t``), for 1/t has no variance there. An answer
that does not fit is refused, not cut: a cut one would teach to stop anywhere.

With ``minimum_reward`` only completions that score so much are trained on, the others are masked:
rejection sampling fine-tuning on a file of several answers for each prompt.

No weights draw anything, so no rollout is ever older than what trains (``schedule``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from string import Formatter
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from rl.algorithm import AlgorithmSettings, Table
from rl.bounds import Masks, elbo
from rl.items import Item
from rl.text import TextAlgorithm, TextSettings
from rl.text_batches import TextBatch
from rollout.draws import Group, Prompt
from rollout.masked import (
    Completions,
    DecodePlan,
    MaskedRollout,
    MaskedSampler,
    MaskedSamplerConfig,
)
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.tokenizer import EOT

SMALLEST_RATE = 1e-3


class SFTConfig(TextSettings, frozen=True, extra="forbid"):
    """SFT: the likelihood of given answers is raised; rewards only watch, or filter."""

    kind: Literal["sft"] = "sft"
    completion: str = Field(
        default="{answer}",
        description="What is learnt: text with columns of the prompts in braces.",
    )
    draws: int = Field(default=2, ge=1, description="Masks per completion and pass.")
    minimum_reward: float | None = Field(
        default=None,
        description="Leave out completions whose weighted sum of rewards is lower; none: train on all.",
    )
    kl_coefficient: float = Field(default=0.0, ge=0, le=0, description="0: SFT has no KL.")
    dipod: None = Field(default=None, description="null: the loss is a bound already.")

    @field_validator("completion")
    @classmethod
    def _names_columns(cls, completion: str) -> str:
        names = columns_of(completion)
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(
                f"{completion!r} names no column: put one in braces, such as {{answer}} (a brace of "
                "the text itself is written twice)"
            )
        return completion


class SFT(TextAlgorithm):
    """See the module."""

    per_token = False

    def __init__(self, config: SFTConfig, sampler: MaskedSamplerConfig, seed: int) -> None:
        super().__init__(config, sampler, seed)
        self.sft = config
        self.draws = config.draws

    def plans(self, step: int, groups: Sequence[Group]) -> list[DecodePlan]:
        """The completions are there already."""
        return [DecodePlan(given=self.sft.completion)] * len(groups)

    def advantages(
        self, rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]
    ) -> np.ndarray:
        """1 for a completion that trains; NaN, as without a score, for one below the minimum."""
        shape = next(iter(rewards.values())).shape
        if self.sft.minimum_reward is None:
            return np.ones(shape)
        weighted = {name: w for name, w in weights.items() if w and name in rewards}
        total = sum((w * rewards[name] for name, w in weighted.items()), np.zeros(shape))
        return np.where(total >= self.sft.minimum_reward, 1.0, np.nan)

    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """Of the whole window: what pads an answer is a part of it."""
        window = completions.tokens.shape[1]
        return independent_masks(window, len(completions.prompt), self.draws, generator)

    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """Minus the bound, per token."""
        return -elbo(log_probs, batch.scale) / batch.lengths, {}

    def batches(
        self,
        policy: MaskedDiffusionPolicy,
        items: Sequence[Item],
        fetch: Callable[[Any], Completions],
        size: int,
        count: int,
    ) -> Iterator[TextBatch]:
        """As of other algorithms, but a length counts what pads the answer."""
        for batch in super().batches(policy, items, fetch, size, count):
            window = batch.targets.shape[1]
            yield replace(batch, lengths=torch.full_like(batch.lengths, window))


def independent_masks(window: int, prompt: int, draws: int, generator: torch.Generator) -> Masks:
    """Every token masked with probability t, one t a draw, from U(0, 1) by strata; scale 1/t."""
    offset = torch.rand(1, generator=generator)
    rates = (torch.arange(draws) + offset) / draws
    rates = SMALLEST_RATE + (1 - SMALLEST_RATE) * rates
    hidden = torch.rand(draws, window, generator=generator) < rates[:, None]
    return Masks(hidden, hidden, 1 / rates, torch.zeros(draws, prompt, dtype=torch.bool))


def columns_of(completion: str) -> list[str]:
    """Names in the braces of ``SFTConfig.completion``.

    Raises:
        ValueError: a brace is open.
    """
    return [name for _, name, _, _ in Formatter().parse(completion) if name is not None]


def filled(completion: str, columns: Mapping[str, Any]) -> str:
    """The text of a prompt's completion.

    Raises:
        ValueError: a column is not there, or empty in this row.
    """
    for name in columns_of(completion):
        if columns.get(name) in (None, ""):
            raise ValueError(
                f"has no column {name!r}, which rl.completion {completion!r} asks for; it has "
                f"{', '.join(columns) or 'none'}"
            )
    return completion.format_map(columns)


def follows_rewards(config: AlgorithmSettings) -> bool:
    """Whether an algorithm trains by rewards, be it that they only filter."""
    return not isinstance(config, SFTConfig) or config.minimum_reward is not None


def unanswered(prompts: Sequence[Prompt], completion: str) -> str | None:
    """What the first prompt without a completion lacks; None: all have one."""
    for prompt in prompts:
        try:
            filled(completion, prompt.columns)
        except ValueError as error:
            return f"prompt {prompt.id!r} {error}"
    return None


def given(sampler: MaskedSampler, groups: Sequence[Group], completion: str) -> list[MaskedRollout]:
    """Rollouts of texts that are there, as if they had been decoded; no network is evaluated.

    Raises:
        ValueError: a prompt that the policy cannot take, or see ``answer_tokens`` and ``filled``.
    """
    policy, length = sampler.policy, sampler.config.length
    prompts = policy.encode([group.prompt for group in groups])
    answers = [answer_tokens(policy, filled(completion, group.columns), length) for group in groups]
    sizes = torch.tensor([group.size for group in groups])
    tokens = torch.stack(answers).repeat_interleave(sizes, dim=0)
    seeds = [group.draw(j).seed for group in groups for j in range(group.size)]
    forwards = torch.zeros(len(tokens), dtype=torch.int64)
    return sampler.rollouts(groups, prompts, seeds, tokens, torch.zeros_like(tokens), forwards)


def answer_tokens(policy: Any, text: str, length: int) -> Tensor:
    """int64 (length,): an answer, the end of its turn and EOS, as a LLaDA ``policy`` writes it.

    Raises:
        ValueError: it does not fit, or has special tokens in it.
    """
    tokenizer = policy.tokenizer
    ids: list[int] = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    end: int = tokenizer.convert_tokens_to_ids(EOT)
    refused = {end, policy.eos_token_id, policy.mask_token_id, *tokenizer.all_special_ids}
    special = sorted(refused & set(ids))
    if special:
        token = tokenizer.convert_ids_to_tokens(special[0])
        raise ValueError(f"the answer has the special token {token!r} in it; take it out")
    ids = [*ids, end]
    if len(ids) > length:
        raise ValueError(
            f"the answer takes {len(ids)} tokens with its end and rollout.length is {length}: raise "
            "it, or ask for shorter answers"
        )
    return torch.tensor(ids + [policy.eos_token_id] * (length - len(ids)))
