"""Guidance of masked-diffusion text: choose among completions, or steer them block by block.

Both methods decode candidates with the recipe's sampler at the recipe's temperature (evaluation
decodes at 0, where all candidates would be the same text) and need no gradient:

    best_of_n   N independent completions, the one with the highest reward
    smc         Feynman-Kac steering (arXiv 2501.06848) of N particles: after block k each one's
                remaining masks are filled by the model's own argmax and the text is scored, r_k;
                particles gather weight by a potential, and are resampled within their sample
                (systematically, when ESS < N/2; without that log-weights accumulate)

The potentials of a particle multiply to ``exp(r_K / beta)``, K its last block, so that its law tends to
``p(x) exp(r(x) / beta)``, p being what the sampler draws from, as N grows. (What is not scored counts as
-inf: a particle whose look ahead is not does not survive a resampling.) Noise belongs to slots, not
to particles: copies of a particle go on differently. The first candidate of a sample is the plain
sampler's completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.draws import Group, keyed_generator, keyed_seed, keyed_uniform
from rollout.guidance.contract import Counts, GuidanceError
from rollout.guidance.particles import Potential, effective, normalised, systematic
from rollout.masked import (
    BlockDecoding,
    DecodePlan,
    MaskedRollout,
    MaskedSampler,
    MaskedSamplerConfig,
    Rows,
)
from rollout.policies.base import MaskedDiffusionPolicy, forwards_per_sample

TextScores = Callable[[Sequence[str], Sequence[Group]], np.ndarray]


class TextBestOfN(BaseModel, frozen=True, extra="forbid"):
    """The best of N independent completions."""

    kind: Literal["best_of_n"] = "best_of_n"
    samples: int = Field(default=8, ge=1, description="Completions N behind each one returned.")

    @property
    def candidates(self) -> int:
        """Completions that are decoded for each one returned."""
        return self.samples

    def evaluations(self, config: MaskedSamplerConfig) -> int:
        """Network evaluations of one candidate that never ends early; the most with a threshold."""
        return completion_evaluations(config)

    def at_budget(self, nfe_per_sample: int, steps: int) -> Self:
        """As many samples as fit the budget, at least one.

        Args:
            nfe_per_sample: network evaluations for each completion returned.
            steps: those of one candidate, as ``evaluations`` counts them.
        """
        return self.model_copy(update={"samples": max(nfe_per_sample // steps, 1)})


class TextSMC(BaseModel, frozen=True, extra="forbid"):
    """Feynman-Kac steering of particles over blocks."""

    kind: Literal["smc"] = "smc"
    particles: int = Field(default=8, ge=1, description="Particles N of each completion returned.")
    beta: float = Field(
        default=0.1,
        gt=0,
        description="Temperature of the tilt: the law is p(x) exp(r(x) / beta) for many particles.",
    )
    potential: Potential = Field(
        default="diff",
        description="Weight after block k: exp of 1 / beta times r_k - r_{k-1}, the highest "
        "reward so far, or the sum of them; the last one corrects the product to exp(r / beta).",
    )
    select: Literal["best", "sample"] = Field(
        default="best", description="Return the highest reward, or one drawn by weight."
    )

    @property
    def candidates(self) -> int:
        """Completions that are decoded for each one returned."""
        return self.particles

    def evaluations(self, config: MaskedSamplerConfig) -> int:
        """As ``TextBestOfN.evaluations``, and a look ahead after each block but the last."""
        ahead = forwards_per_sample(config.guidance_scale) * (config.blocks - 1)
        return completion_evaluations(config) + ahead

    def at_budget(self, nfe_per_sample: int, steps: int) -> Self:
        """As many particles as fit the budget, at least one: see ``TextBestOfN.at_budget``."""
        return self.model_copy(update={"particles": max(nfe_per_sample // steps, 1)})


TextMethod = Annotated[TextBestOfN | TextSMC, Field(discriminator="kind")]


@dataclass(frozen=True)
class _Member:
    """A completion to be returned."""

    group: Group
    prompt: Tensor
    seed: int


@dataclass(frozen=True)
class _Outcome:
    """Rows of candidates (n x candidates): tokens, which one of n is returned, scores asked for."""

    tokens: Tensor
    chosen: Tensor
    scored: Tensor


class GuidedText:
    """Decodes groups with guidance. Members are decoded ``batch_size // candidates`` at a time."""

    def __init__(
        self, config: MaskedSamplerConfig, policy: MaskedDiffusionPolicy, scores: TextScores
    ) -> None:
        """``scores``: rewards (n,) of n texts, each with the group it belongs to; NaN is -inf."""
        self.config = config
        self.policy = policy
        self.scores = scores
        self.sampler = MaskedSampler(config, policy)

    @torch.no_grad()
    def sample(
        self, groups: Sequence[Group], method: TextBestOfN | TextSMC
    ) -> tuple[list[MaskedRollout], Counts]:
        """One guided completion for each member of each group, and what each of them cost.

        Rows of the counts are members in order; nothing is rendered, so ``decodes`` is 0.

        Raises:
            GuidanceError: several candidates that could not differ.
            ValueError: a prompt that the policy cannot take, or scores of another shape.
        """
        config, n = self.config, method.candidates
        if n > 1 and config.temperature == 0 and config.remasking == "low_confidence":
            raise GuidanceError(
                f"{method.kind} chooses among {n} candidates, which are one and the same at "
                "temperature 0: set rollout.temperature above 0"
            )
        prompts = self.policy.encode([group.prompt for group in groups])
        members = [
            _Member(group, prompt, group.draw(j).seed)
            for group, prompt in zip(groups, prompts, strict=True)
            for j in range(group.size)
        ]
        together = max(config.batch_size // n, 1)
        parts = [
            self._guided(members[i : i + together], method)
            for i in range(0, len(members), together)
        ]
        tokens, steps, forwards, scored = (torch.cat(column) for column in zip(*parts, strict=True))
        seeds = [member.seed for member in members]
        rollouts = self.sampler.rollouts(groups, prompts, seeds, tokens, steps, forwards)
        return rollouts, Counts(len(members), {"forwards": forwards, "rewards": scored})

    def _guided(
        self, members: Sequence[_Member], method: TextBestOfN | TextSMC
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and steps (n, length), forwards and scores (n,) of n members, on the CPU."""
        n = method.candidates
        owners = [member for member in members for _ in range(n)]
        seeds = [candidate_seed(member.seed, i) for member in members for i in range(n)]
        prompts = [owner.prompt for owner in owners]
        decoding, rows = self.sampler.start(prompts, seeds, DecodePlan())
        if isinstance(method, TextBestOfN):
            outcome = self._best(decoding, rows, owners, method)
        else:
            outcome = self._steered(decoding, rows, owners, method)
        picked = torch.arange(len(members)) * n + outcome.chosen
        spent, scored = (x.reshape(-1, n).sum(1) for x in (decoding.forwards, outcome.scored))
        return outcome.tokens[picked], decoding.decode_step[picked], spent, scored

    def _best(
        self,
        decoding: BlockDecoding,
        rows: Rows,
        owners: Sequence[_Member],
        method: TextBestOfN,
    ) -> _Outcome:
        tokens, _, _ = decoding.run(rows)
        rewards = self._rewards(tokens, owners).reshape(-1, method.samples)
        return _Outcome(tokens, rewards.argmax(1), torch.ones(len(owners), dtype=torch.int64))

    def _steered(
        self, decoding: BlockDecoding, rows: Rows, owners: Sequence[_Member], method: TextSMC
    ) -> _Outcome:
        """A particle whose finished blocks hold an EOS is complete: its reward stays."""
        n, width, end = method.particles, decoding.prompt_width, rows.tokens.shape[1]
        particles = _Particles(method, [owner.seed for owner in owners[::n]])
        rewards = torch.zeros(len(owners), dtype=torch.float64)
        scored = torch.zeros(len(owners), dtype=torch.int64)
        going, step = torch.ones(len(owners), dtype=torch.bool), 0
        for start in range(width, end, self.config.block_length):
            stop = start + self.config.block_length
            part = rows.keep(going)
            step = decoding.block(part, start, step)
            rows.tokens[part.rows] = part.tokens
            going[part.rows] = self._open(part, width, stop) & (stop < end)
            ahead = part.tokens[:, width:].cpu()
            if going.any():
                ahead[going[part.rows]] = decoding.fill(rows.keep(going), stop).cpu()
            mine = [owners[row] for row in part.rows.tolist()]
            rewards[part.rows] = self._rewards(ahead, mine)
            scored[part.rows] += 1
            ancestors = particles.step(rewards.view(-1, n), going.view(-1, n).any(1))
            rows.tokens = rows.tokens[ancestors]
            decoding.decode_step = decoding.decode_step[ancestors]
            rewards, going = rewards[ancestors], going[ancestors]
            if not going.any():
                break
        return _Outcome(rows.tokens[:, width:].cpu(), particles.choose(), scored)

    def _open(self, rows: Rows, width: int, stop: int) -> Tensor:
        """Which rows (n,) have no EOS before ``stop``, on the CPU."""
        return (rows.tokens[:, width:stop] != self.policy.eos_token_id).all(1).cpu()

    def _rewards(self, tokens: Tensor, owners: Sequence[_Member]) -> Tensor:
        """fp64 (n,) of completions (n, length); -inf where the reward is not a number."""
        texts = self.policy.decode(tokens)
        found = np.asarray(self.scores(texts, [owner.group for owner in owners]), np.float64)
        if found.shape != (len(texts),):
            raise ValueError(f"scores of {len(texts)} texts have the shape {found.shape}")
        return torch.from_numpy(np.where(np.isnan(found), -np.inf, found))


class _Particles:
    """Rewards and weights of the particles of several samples: fp64 (samples, N), on the CPU."""

    def __init__(self, method: TextSMC, seeds: Sequence[int]) -> None:
        self.method, self.seeds = method, seeds
        self.history = torch.empty(0, len(seeds), method.particles, dtype=torch.float64)
        self.before = torch.zeros(len(seeds), method.particles, dtype=torch.float64)

    def step(self, rewards: Tensor, going: Tensor) -> Tensor:
        """Weigh by new rewards, resample the samples (samples,) that go on.

        Returns the particle (samples * N,) that each slot goes on from.
        """
        method, n = self.method, self.method.particles
        self.history = torch.cat([self.history, rewards[None]])
        product = log_product(self.history, method.potential, 1 / method.beta)
        ancestors = torch.arange(n).repeat(len(self.seeds), 1)
        for i in going.nonzero()[:, 0].tolist():
            weights = normalised(product[i] - self.before[i])
            if effective(weights) < n / 2:
                offset = keyed_uniform(self.seeds[i], "resampling", len(self.history))
                ancestors[i] = systematic(weights, offset)
                self.before[i] = product[i, ancestors[i]]
        self.history = self.history.gather(2, ancestors.expand_as(self.history))
        return (ancestors + n * torch.arange(len(ancestors))[:, None]).flatten()

    def choose(self) -> Tensor:
        """The particle (samples,) that each sample returns."""
        if self.method.select == "best":
            return self.history[-1].argmax(1)
        logs = self.history[-1] / self.method.beta - self.before
        drawn = [
            torch.multinomial(normalised(row), 1, generator=keyed_generator(seed, "selection"))
            for row, seed in zip(logs, self.seeds, strict=True)
        ]
        return torch.cat(drawn)


def completion_evaluations(config: MaskedSamplerConfig) -> int:
    """Network evaluations of a completion that does not end early; at most, with a threshold."""
    steps = config.block_length
    if config.threshold is None:
        steps = min(max(config.steps // config.blocks, 1), steps)
    return forwards_per_sample(config.guidance_scale) * steps * config.blocks


def candidate_seed(seed: int, index: int) -> int:
    """The seed of a member's candidate; the first one is the plain sampler's."""
    return keyed_seed(seed, "candidate", index) if index else seed


def log_product(history: Tensor, potential: Potential, lam: float) -> Tensor:
    """log of the product (...) of a particle's potentials after rewards (k, ...); DIFF is from 0.

    Without the last block's potential, which makes it ``lam`` times the last reward for all three.
    A product, unlike its factors, is a number after rewards of -inf too.
    """
    if potential == "diff":
        return lam * history[-1]
    if potential == "max":
        return lam * history.cummax(0).values.sum(0)
    return lam * history.cumsum(0).sum(0)
