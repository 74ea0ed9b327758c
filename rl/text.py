"""What the algorithms on masked-diffusion language models have in common.

An algorithm adds its *masks* (which inputs a completion is scored at) and its *objective* (what is made
of the log-probabilities there). DiPOD's term comes on top of any: from the same masks and forward
where these estimate the ELBO, else from a few draws of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rl.advantages import AdvantageConfig
from rl.algorithm import Algorithm, AlgorithmSettings, Table
from rl.bounds import Masks, elbo, exact_k_masks, joined
from rl.contracts import Metrics, Sampled
from rl.items import Item
from rl.metrics import check_drift, text_metrics
from rl.text_batches import TextBatch, text_batches, token_log_probs
from rollout.draws import Group
from rollout.masked import Completions, DecodePlan, MaskedSamplerConfig, TextSummary
from rollout.policies.base import MaskedDiffusionPolicy


class TextSettings(AlgorithmSettings, frozen=True, extra="forbid"):
    """Options of every algorithm on text."""

    advantages: AdvantageConfig = Field(
        default=AdvantageConfig(std="none"), description="Rewards to advantages."
    )


class TextAlgorithm(Algorithm[TextSettings]):
    """An algorithm on completions.

    Attributes:
        draws: masked inputs per completion that the objective scores.
        bounded: whether these estimate the ELBO.
        per_token: a completion weighs in the loss by its length (L_j / sum L), else all weigh 1/N.
        clip_range: c of the ratio, where there is one.
    """

    draws: int
    clip_range: float
    bounded = True
    per_token = True

    def __init__(self, config: TextSettings, sampler: MaskedSamplerConfig, seed: int) -> None:
        self.config = config
        self.sampler = sampler
        self.seed = seed

    @abstractmethod
    def masks(self, completions: Completions, member: int, generator: torch.Generator) -> Masks:
        """``draws`` draws for one completion."""

    @abstractmethod
    def objective(
        self, log_probs: Tensor, old: Tensor, reference: Tensor | None, batch: TextBatch
    ) -> tuple[Tensor, Table]:
        """The loss of each completion (n,), and columns of the table.

        Args:
            log_probs: (n, draws, G), 0 where not scored; ``old``: at the start of the update, or
                when sampled; ``reference``: before any training, where there is a KL.
            batch: scored places, scales, lengths and advantages, (n, draws, ...).
        """

    def plans(self, step: int, groups: Sequence[Group]) -> list[DecodePlan]:
        """All alike: the recipe's decoding; and scores of its weights, if these are compared with."""
        dipod = self.config.dipod
        compares = self.records_old and (dipod is None or not dipod.distils(step))
        return [DecodePlan(passes=self.config.epochs if compares else 0)] * len(groups)

    def evaluation_plan(self, steps: int | None, orders: int = 0) -> DecodePlan:
        """Temperature 0, without cache or threshold."""
        return DecodePlan(steps=steps, temperature=0.0, exact=True, orders=orders)

    def loss(self, policy: MaskedDiffusionPolicy, batch: TextBatch) -> tuple[Tensor, Table]:
        """The objective and DiPOD's term, each summed with its own weights."""
        log_probs = token_log_probs(policy, batch)
        own, bound_at = self._own(batch), self._bounded_part(batch)
        present = log_probs[:, : self.draws]
        old = present.detach() if batch.old is None else batch.old
        reference = None
        if self.config.kl_coefficient:
            with torch.no_grad(), policy.reference():
                reference = token_log_probs(policy, own)
        losses, table = self.objective(present, old, reference, own)
        bound = elbo(log_probs[:, bound_at], batch.scale[:, bound_at]) / batch.lengths
        loss = (batch.weights * losses).sum() - (batch.distillation * bound).sum()
        table = {name: column.detach() for name, column in table.items()} | {
            "elbo": bound.detach(),
            "advantage": batch.advantages,
            "loss": (batch.weights * losses - batch.distillation * bound).detach(),
        }
        # A padding batch has a row and no completion; a completion may come without a mask.
        scored = batch.scored.flatten(1).any(1) | (batch.advantages != 0)
        return loss, {name: column[scored] for name, column in table.items()}

    def scores(self, policy: MaskedDiffusionPolicy, batch: TextBatch) -> Tensor:
        """Log-probabilities (n, draws, G) under the policy's weights."""
        return token_log_probs(policy, self._own(batch))

    def shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """By length, or equal."""
        if self.per_token:
            return self.distillation_shares(samples, valid)
        return valid / max(float(valid.sum()), 1.0)

    def distillation_shares(self, samples: Sequence[Sampled], valid: np.ndarray) -> np.ndarray:
        """L_j / sum L over all scored completions."""
        lengths = np.array([self._lengths(sample) for sample in samples], np.float64)
        return valid * lengths / max(float((valid * lengths).sum()), 1.0)

    def evaluations(self, sample: Sampled) -> int:
        """A forward for each draw of each completion."""
        return sample.group.size * self.forwards_per_completion

    @property
    def forwards_per_completion(self) -> int:
        """Inputs that one pass over a completion takes."""
        return self.draws + self._extra

    def batches(
        self,
        policy: MaskedDiffusionPolicy,
        items: Sequence[Item],
        fetch: Callable[[Any], Completions],
        size: int,
        count: int,
    ) -> Iterator[TextBatch]:
        """See ``rl/text_batches.py``."""
        draws = self.forwards_per_completion
        return text_batches(policy, items, fetch, size // draws, count, self._all_masks, draws)

    def metrics(self, table: Mapping[str, np.ndarray]) -> Metrics:
        """See ``rl/metrics.py``."""
        return text_metrics(table)

    def check_drift(self, table: Mapping[str, np.ndarray], dtype: str) -> Metrics:
        """The first ratio is 1, where the objective has one."""
        if "ratio" not in table:
            return {}
        # A rank's own old scores are its present ones to the bit; a worker's differ by rounding.
        return check_drift(table, self.clip_range if self.stale else 0.01, dtype)

    def _all_masks(
        self, completions: Completions, member: int, generator: torch.Generator
    ) -> Masks:
        masks = self.masks(completions, member, generator)
        if not self._extra:
            return masks
        length, window = int(completions.lengths[member]), completions.tokens.shape[1]
        prompt = len(completions.prompt)
        return joined(masks, exact_k_masks(length, window, prompt, self._extra, generator))

    @property
    def _extra(self) -> int:
        """Draws for DiPOD beyond the objective's own."""
        dipod = self.config.dipod
        return dipod.draws if dipod is not None and not self.bounded else 0

    def _own(self, batch: TextBatch) -> TextBatch:
        if not self._extra:
            return batch
        span = slice(0, self.draws)
        return TextBatch(
            tokens=batch.tokens[:, span],
            attention_mask=batch.attention_mask,
            scored=batch.scored[:, span],
            scale=batch.scale[:, span],
            targets=batch.targets,
            lengths=batch.lengths,
            advantages=batch.advantages,
            weights=batch.weights,
            distillation=batch.distillation,
        )

    def _bounded_part(self, batch: TextBatch) -> slice:
        """The draws that the bound is taken from."""
        return slice(self.draws, None) if self._extra else slice(0, self.draws)

    @staticmethod
    def _lengths(sample: Sampled) -> tuple[int, ...]:
        assert isinstance(sample.summary, TextSummary)
        return sample.summary.lengths


def clipped(
    log_ratio: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``max(-A rho, -A clip(rho, 1 +- c))``, rho, and where the clip is active; shapes broadcast."""
    # Where exp overflows, 0 * inf would make even a sample of weight 0 NaN.
    ratio = log_ratio.clamp(max=80).exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * bounded)
    outside = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return losses, ratio, outside & (advantages != 0)


def per_token_mean(values: Tensor, scored: Tensor) -> Tensor:
    """Means (n,) of (n, d, G) over scored places."""
    return (values * scored).flatten(1).sum(1) / scored.flatten(1).sum(1).clamp(min=1)
