"""A smaller student by random conditioning (RC), with its updates allocated by region (ARIA).

The student keeps every so-maniest block of the teacher. Pairs (x0, c) exist for some conditions only, a
pool of conditions for all; where ``distill/random_conditioning.py`` switches the condition, teacher and
student meet a condition that the picture does not belong to, and so the student learns conditions of
which it never sees a picture. ``distill/regions.py`` says which conditions get the draws: without
``regions`` by their masses (RC), else by the discrepancy that is tracked while training (ARIA; the
paper is public as an abstract only, the algorithm is ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from distill.contracts import Network, Table
from distill.networks import VelocityModule
from distill.noise import gaussians
from distill.random_conditioning import (
    Choice,
    RandomConditioningConfig,
    Sources,
    choose,
    losses,
    sample_weights,
)
from distill.real_data import RealSamples
from distill.regions import Regions, RegionsConfig, Tracker, effective_sample_size, table
from distill.teacher import Spent
from distill.two_step import renoised_at
from rl.contracts import Metrics
from rollout.draws import Prompt, keyed_seed
from rollout.flow import FlowPlan
from rollout.policies.base import FlowPolicy


class PairsConfig(BaseModel, frozen=True, extra="forbid"):
    """Which conditions come with pictures, and how often all of them are asked for."""

    count: int = Field(default=512, ge=1, description="Pictures in all.")
    imbalance: float = Field(
        default=1.0,
        ge=1,
        description="Mass of the first condition over that of the last; between them geometric.",
    )
    held_out: tuple[str, ...] = Field(
        default=(), description="Ids of prompts of which there is no picture."
    )


class CompressionConfig(BaseModel, frozen=True, extra="forbid"):
    """A student of fewer layers."""

    kind: Literal["random_conditioning"] = "random_conditioning"
    layers: int = Field(ge=1, description="Blocks of the student, evenly out of the teacher's.")
    pairs: PairsConfig = Field(default=PairsConfig(), description="The pictures.")
    conditioning: RandomConditioningConfig | None = Field(
        default=RandomConditioningConfig(),
        description="How conditions are switched; null: never (pairs only).",
    )
    regions: RegionsConfig | None = Field(
        default=None, description="ARIA's allocation; null: by the masses."
    )

    def evaluation_plan(self, steps: int | None = None, orders: int = 0) -> FlowPlan:
        """The student is sampled as its teacher is."""
        return FlowPlan(steps=steps)


@dataclass(frozen=True)
class ConditionedItem:
    """One sample of a step.

    Attributes:
        replay: unused. evaluations: 1.
        seed: keys its noise; ``picture``: seed of its pair's picture, of the prompt with ``columns``.
        prompt: the condition that both networks see, None: dropped.
        t: noise fraction. paired: the condition is the picture's own.
        weight: share in the loss, corrected. slot: its place in the step.
    """

    replay: None
    evaluations: int
    seed: int
    picture: int
    columns: Mapping[str, object]
    prompt: str | None
    t: float
    paired: bool
    weight: float
    slot: int


@dataclass(frozen=True)
class ConditionedBatch:
    """A micro-batch, padded with rows of weight 0.

    Attributes:
        condition: (n, tokens, width); ``x0``, ``noise``: (n, C, F, H, W); ``t``, ``weights``: (n,).
        paired: bool (n,). slots: int64 (n,), -1 at padding.
    """

    condition: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    paired: Tensor
    weights: Tensor
    slots: Tensor


class Conditions:
    """The draws of every step, and what they are allocated by. Lives in the driver, so that all ranks
    have one tracker.

    Attributes:
        tracker: follows the discrepancy of each region.
    """

    def __init__(
        self,
        config: CompressionConfig,
        prompts: Sequence[Prompt],
        seed: int,
        batch: int,
        embeddings: Callable[[Sequence[str]], np.ndarray],
    ) -> None:
        """``embeddings``: (n, d) of prompts, asked for only by k-means.

        Raises ValueError: a held-out prompt that does not exist, or no prompt is left."""
        unknown = set(config.pairs.held_out) - {prompt.id for prompt in prompts}
        if unknown:
            raise ValueError(f"held out but not among the prompts: {', '.join(sorted(unknown))}")
        self.config, self.prompts, self.seed, self.batch = config, prompts, seed, batch
        ranks = np.arange(len(prompts)) / max(1, len(prompts) - 1)
        masses = config.pairs.imbalance**-ranks
        masses = masses / masses.sum()
        self.held_out = np.array([p.id in config.pairs.held_out for p in prompts])
        if self.held_out.all():
            raise ValueError("every prompt is held out: there is no pair to learn from")
        self.pool = regions_of(config.regions, prompts, masses, seed, embeddings)
        self.owned = _spread(np.where(self.held_out, 0, masses), config.pairs.count)
        self.tracker = Tracker.start(
            len(self.pool.names), (config.regions or RegionsConfig()).decay
        )
        self._choice: Choice | None = None
        self._weights = np.ones(batch)

    @property
    def sources(self) -> Sources:
        """What the next step draws from."""
        regions = self.config.regions
        if regions is None:
            return Sources.plain(self.pool, self.owned)
        discrepancy = self.tracker.discrepancy(self.pool.pi)
        return Sources.allocated(self.pool, self.owned, discrepancy, regions)

    def take(self, step: int) -> tuple[list[ConditionedItem], Spent]:
        """The items of ``step``."""
        config, sources = self.config, self.sources
        conditioning = config.conditioning or RandomConditioningConfig()
        choice = choose(sources, conditioning, seed=self.seed, step=step, slots=range(self.batch))
        if config.conditioning is None:
            kept = np.zeros(self.batch, bool)
            own = self.owned[choice.pair]
            choice = Choice(choice.t, choice.pair, own, kept, choice.null)
        weights = np.ones(self.batch)
        if config.regions is not None:
            weights = sample_weights(sources, choice, config.regions)
        self._choice, self._weights = choice, weights
        return [self._item(step, slot, choice, weights) for slot in range(self.batch)], (0, 0.0)

    def observe(self, columns: Mapping[str, np.ndarray]) -> Metrics:
        """Track a step's losses; what regions look like now."""
        choice = self._choice
        assert choice is not None
        slots, found = columns["slot"], columns["distillation"]
        order = np.argsort(slots)
        slots, found = slots[order], found[order]
        known = ~choice.null[slots]
        count = len(self.pool.names)
        index = self.pool.index[choice.condition[slots]]
        total = table(found[known], choice.t[slots][known], index[known], count)
        self.tracker = self.tracker.observe(*total)
        return self._metrics()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"tracker": self.tracker.state(), "regions": self.pool.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.tracker = Tracker.from_state(state["tracker"])
        self.pool = Regions.from_json(state["regions"])

    def _item(self, step: int, slot: int, choice: Choice, weights: np.ndarray) -> ConditionedItem:
        pair = int(choice.pair[slot])
        asked = self.prompts[int(choice.condition[slot])].text
        return ConditionedItem(
            replay=None,
            evaluations=1,
            seed=keyed_seed(self.seed, "conditioned", step, slot),
            picture=keyed_seed(self.seed, "picture", pair),
            columns=self.prompts[int(self.owned[pair])].columns,
            prompt=None if choice.null[slot] else asked,
            t=float(choice.t[slot]),
            paired=not choice.switched[slot],
            weight=float(weights[slot]) / self.batch,
            slot=slot,
        )

    def _metrics(self) -> Metrics:
        discrepancy, q = self.tracker.discrepancy(self.pool.pi), self.sources.q
        metrics: Metrics = {}
        for k, name in enumerate(self.pool.names):
            metrics[f"region/{name}/discrepancy"] = float(discrepancy[k])
            metrics[f"region/{name}/q"] = float(q[k])
        regions = range(len(self.pool.names))
        unseen = np.array([self.held_out[self.pool.index == k].all() for k in regions])
        for name, part in (("seen", ~unseen), ("unseen", unseen)):
            if part.any():
                metrics[f"regions/{name}"] = float(discrepancy[part].mean())
        ess = effective_sample_size(self._weights) / len(self._weights)
        return metrics | {
            "regions/effective_sample_share": ess,
            "regions/largest_weight": float(self._weights.max()),
        }


def regions_of(
    config: RegionsConfig | None,
    prompts: Sequence[Prompt],
    masses: np.ndarray,
    seed: int,
    embeddings: Callable[[Sequence[str]], np.ndarray],
) -> Regions:
    """A region for each prompt, or k-means over their embeddings."""
    if config is None or config.kind == "label":
        return Regions.by_label([prompt.id for prompt in prompts], masses)
    assert config.count is not None
    points = embeddings([prompt.text for prompt in prompts])
    return Regions.by_kmeans(points, config.count, seed, config.minimum, masses)


def _spread(masses: np.ndarray, count: int) -> np.ndarray:
    """The condition of each of ``count`` pictures: counts by largest remainder, one at least."""
    share = masses / masses.sum() * count
    counts = np.where(masses > 0, np.maximum(1, np.floor(share)), 0).astype(np.int64)
    for k in np.argsort(counts - share)[: max(0, count - int(counts.sum()))]:
        counts[k] += 1
    return np.repeat(np.arange(len(masses)), counts)


def prune(policy: FlowPolicy, layers: int) -> FlowPolicy:
    """``policy`` with ``layers`` of its blocks, evenly spread, the first among them."""
    blocks = policy.module.blocks
    chosen = [round(i * (len(blocks) - 1) / max(1, layers - 1)) for i in range(layers)]
    policy.module.blocks = nn.ModuleList([blocks[i] for i in chosen])
    policy.module.register_to_config(num_layers=layers)
    policy.blocks = layers
    return policy


def conditioned_batches(
    policy: FlowPolicy,
    items: Sequence[ConditionedItem],
    size: int,
    count: int,
    real: RealSamples,
) -> Iterator[ConditionedBatch]:
    """Exactly ``count`` micro-batches of ``size`` samples over ``items``."""
    null = policy.encode_null(1)[0].cpu()
    for start in range(0, size * count, size):
        part = items[start : start + size]
        padding = size - len(part)
        shape = policy.latent_shape
        empty = [torch.zeros(shape)] * padding
        conditions = [
            null if item.prompt is None else policy.encode([item.prompt])[0].cpu() for item in part
        ]
        x0 = [real(item.columns, item.picture) for item in part]
        noise = [gaussians([item.seed], shape, "noise")[0] for item in part]
        device = policy.device
        yield ConditionedBatch(
            condition=torch.stack([*conditions, *[null] * padding]).to(device),
            x0=torch.stack([*x0, *empty]).to(device),
            noise=torch.stack([*noise, *empty]).to(device),
            t=torch.tensor([*[i.t for i in part], *[0.5] * padding], device=device),
            paired=torch.tensor([*[i.paired for i in part], *[False] * padding], device=device),
            weights=torch.tensor([*[i.weight for i in part], *[0.0] * padding], device=device),
            slots=torch.tensor([*[i.slot for i in part], *[-1] * padding]),
        )


class Compression:
    """The method on one rank."""

    def __init__(self, config: CompressionConfig, teacher: FlowPolicy, real: RealSamples) -> None:
        self.config, self.teacher, self.real = config, teacher, real

    def batches(
        self,
        items: Sequence[ConditionedItem],
        fetch: Callable[[Any], Any],
        size: int,
        count: int,
    ) -> Iterator[ConditionedBatch]:
        """Exactly ``count`` micro-batches."""
        return conditioned_batches(self.teacher, items, size, count, self.real)

    def modules(
        self, student: FlowPolicy, copy_of_teacher: Callable[[], FlowPolicy]
    ) -> dict[str, nn.Module]:
        """The student alone."""
        return {"student": VelocityModule(student)}

    def evaluations(self, step: int) -> tuple[int, int]:
        """Teacher and student forward, student backward."""
        return 2, 1

    def empty_loss(
        self, networks: Mapping[str, Network], name: str, batch: ConditionedBatch
    ) -> Tensor:
        """A loss of 0 in which every parameter takes part."""
        return 0 * networks[name](batch.x0, batch.t, batch.condition).sum()

    def update(
        self, networks: Mapping[str, Network], batches: Sequence[ConditionedBatch], step: int
    ) -> tuple[list[Table], dict[str, float]]:
        """One step of the student."""
        config = self.config.conditioning or RandomConditioningConfig()
        tables: list[Table] = []
        for i, batch in enumerate(batches):
            x = renoised_at(batch.x0, batch.t, batch.noise)
            with torch.no_grad():
                teacher = self.teacher.velocity(x, batch.t, batch.condition)
            student = networks["student"](x, batch.t, batch.condition)
            loss, columns = losses(student, teacher, batch.noise - batch.x0, batch.paired, config)
            networks["student"].backward((batch.weights * loss).sum(), last=i == len(batches) - 1)
            kept = batch.slots >= 0
            columns |= {"loss/student": loss.detach(), "slot": batch.slots}
            tables.append({name: column.cpu()[kept] for name, column in columns.items()})
        return tables, {"student": networks["student"].step()}
