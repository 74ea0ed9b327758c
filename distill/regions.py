"""ARIA: where distillation spends its updates, region by region of the conditioning space.

The pool of conditions is cut into K regions (of conditions, not of pictures). For each region k we
know its base mass π_k and track the discrepancy d̂_k between teacher and student. More draws go
where it persists, and weights take back what this does to the objective:

    q_k = (1 − ε) π_k d̂_k^γ / Σ_j π_j d̂_j^γ + ε / K        w = (π_k / q_k)^b

γ = 0 with ε = 0 is plain random conditioning (RC), and so is K = 1, draw by draw. b = 1 keeps RC's
objective, b = 0 focuses. ARIA (arXiv:2606.23898) is public as an abstract only: it names regions,
an online discrepancy, more updates where it persists and an objective that is preserved. The
algorithm in this file is ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

T_BINS = 10
# Multiples of this are summed without rounding (up to 2^23), in whatever order ranks add them up.
GRID = 2.0**-30
SUM_TOLERANCE = 1e-9


class RegionsConfig(BaseModel, frozen=True, extra="forbid"):
    """How conditions are grouped, watched and drawn."""

    kind: Literal["label", "kmeans"] = Field(
        default="label", description="A region for each label, or k-means on embeddings."
    )
    count: int | None = Field(default=None, ge=1, description="Regions of k-means (K).")
    minimum: int = Field(
        default=1,
        ge=1,
        description="k-means regions with fewer conditions are merged into the nearest one.",
    )
    decay: float = Field(
        default=0.1, gt=0, le=1, description="Weight of the newest batch in the running means."
    )
    gamma: float = Field(
        default=1.0, ge=0, description="Power of the discrepancy (allocation: power); 0 is RC."
    )
    epsilon: float = Field(
        default=0.1, ge=0, le=1, description="Share of the draws spread evenly over all regions."
    )
    allocation: Literal["power", "softmax"] = Field(
        default="power", description="q ~ pi d^gamma, or q ~ pi exp(d / temperature)."
    )
    temperature: float = Field(default=1.0, gt=0, description="Of allocation: softmax.")
    correction: float = Field(
        default=1.0, ge=0, le=1, description="b of the weights (pi/q)^b of paired draws."
    )
    correction_switched: float = Field(
        default=0.0, ge=0, le=1, description="b of the weights of switched conditions; 0 focuses."
    )
    clip: float = Field(default=5.0, ge=1, description="Largest weight of a sample.")

    @model_validator(mode="after")
    def _options_belong_to_kind(self) -> Self:
        if self.kind == "kmeans" and self.count is None:
            raise ValueError("regions of kind kmeans need a count")
        if self.kind == "label" and (self.count is not None or self.minimum > 1):
            raise ValueError(
                "count and minimum belong to kind kmeans; labels are taken as they are"
            )
        return self


@dataclass(frozen=True, eq=False)
class Regions:
    """A partition of a pool of conditions; a condition's id is its position in the pool.

    Raises:
        ValueError: a region that has no name, or masses that are no distribution.
    """

    index: np.ndarray  # (n,) int64: the region of each condition
    masses: np.ndarray  # (n,) fp64: the base probability of each condition
    names: tuple[str, ...]  # (K,)

    def __post_init__(self) -> None:
        if self.index.shape != self.masses.shape or self.index.ndim != 1:
            raise ValueError(
                f"{self.index.shape} conditions have {self.masses.shape} masses; one each is needed"
            )
        check_known(self.index, len(self.names), "region")
        _check_distribution(self.masses, "masses of the conditions")

    @cached_property
    def pi(self) -> np.ndarray:
        """Base masses (K,) fp64; 0 for a region without conditions."""
        return np.bincount(self.index, self.masses, minlength=len(self.names))

    @classmethod
    def by_label(
        cls, labels: Sequence[int] | Sequence[str] | np.ndarray, masses: np.ndarray | None = None
    ) -> Regions:
        """One region per label, in the order of the sorted labels; even masses if none are given."""
        names, index = np.unique(np.asarray(labels), return_inverse=True)
        return cls(index.astype(np.int64), _masses(len(index), masses), tuple(map(str, names)))

    @classmethod
    def by_kmeans(
        cls,
        embeddings: np.ndarray,
        count: int,
        seed: int,
        minimum: int = 1,
        masses: np.ndarray | None = None,
    ) -> Regions:
        """Mini-batch k-means on embeddings (n, d); regions are numbered by their first condition.

        Regions with fewer than ``minimum`` conditions join the one with the nearest centre, the
        smallest first; hence there can be fewer than ``count``.

        Raises:
            ValueError: fewer conditions than ``count`` or ``minimum``, or not finite.
        """
        from sklearn.cluster import MiniBatchKMeans

        if len(embeddings) < max(count, minimum):
            raise ValueError(
                f"{len(embeddings)} conditions do not make {count} regions of at least {minimum}"
            )
        points = np.asarray(embeddings, np.float64)
        model = MiniBatchKMeans(n_clusters=count, random_state=seed)
        index = _merged(points, model.fit_predict(points), minimum)
        _, first, index = np.unique(index, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        names = tuple(f"cluster {k}" for k in range(len(first)))
        return cls(rank[index].astype(np.int64), _masses(len(points), masses), names)

    def take(self, conditions: np.ndarray) -> Regions:
        """The same regions over other items, given the condition id (m,) of each: evenly weighted.

        For pairs (picture, condition): regions without pairs keep their place, with mass 0.

        Raises:
            ValueError: an unknown condition, or none at all.
        """
        check_known(conditions, len(self.index), "condition")
        return Regions(self.index[conditions], _masses(len(conditions), None), self.names)

    def to_json(self) -> str:
        """Everything, exactly: saved with a run."""
        arrays = {"index": self.index.tolist(), "masses": self.masses.tolist()}
        return json.dumps({**arrays, "names": self.names})

    @classmethod
    def from_json(cls, text: str) -> Regions:
        """What ``to_json`` wrote.

        Raises:
            ValueError: it is not that.
        """
        read = json.loads(text)
        if not isinstance(read, dict) or set(read) != {"index", "masses", "names"}:
            raise ValueError("saved regions are an object with index, masses and names")
        index = np.array(read["index"], np.int64)
        return cls(index, np.array(read["masses"], np.float64), tuple(read["names"]))


def _merged(points: np.ndarray, index: np.ndarray, minimum: int) -> np.ndarray:
    """Regions (n,) with the smallest joined to its nearest until all have ``minimum`` members."""
    index = index.copy()
    while True:
        kept, sizes = np.unique(index, return_counts=True)
        if sizes.min() >= minimum or len(kept) == 1:
            return index
        centres = np.stack([points[index == k].mean(0) for k in kept])
        smallest = int(sizes.argmin())
        distances = ((centres - centres[smallest]) ** 2).sum(1)
        distances[smallest] = np.inf
        index[index == kept[smallest]] = kept[distances.argmin()]


def _masses(count: int, given: np.ndarray | None) -> np.ndarray:
    return np.full(count, 1 / max(count, 1)) if given is None else np.asarray(given, np.float64)


def _check_distribution(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{what} must be finite and not negative")
    if abs(values.sum() - 1) > SUM_TOLERANCE:
        raise ValueError(f"{what} sum to {values.sum():.9g}, not to 1")


def check_known(ids: np.ndarray, count: int, what: str) -> None:
    """Raise a ValueError that names the first id that is not one of ``count``."""
    unknown = (ids < 0) | (ids >= count)
    if unknown.any():
        raise ValueError(f"unknown {what} {ids[unknown][0]}: there are {count}")


def table(losses: np.ndarray, t: np.ndarray, regions: np.ndarray, count: int) -> np.ndarray:
    """What the tracker wants to know of some samples: add these tables up over ranks.

    Losses are put on a grid of 2^-30 (about 1e-9), on which fp64 sums are exact: the total does not
    depend on how samples were split.

    Args:
        losses: per-sample distillation losses (B,).
        t: noise fractions (B,) in [0, 1].
        regions: region of the condition both networks saw (B,); leave null conditions out.
        count: number of regions K.

    Returns:
        fp64 (3, K, 10): sums, sums of squares and counts per region and t-bin.

    Raises:
        ValueError: an unknown region, or t outside [0, 1].
    """
    check_known(regions, count, "region")
    cells = regions * T_BINS + _bins(t)
    values = losses.astype(np.float64)
    rounded = [np.round(part / GRID) * GRID for part in (values, values**2)]
    parts = [np.bincount(cells, part, count * T_BINS) for part in (*rounded, np.ones(len(cells)))]
    return np.stack(parts).reshape(3, count, T_BINS)


def _bins(t: np.ndarray) -> np.ndarray:
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("t outside [0, 1]")
    return np.minimum((t * T_BINS).astype(np.int64), T_BINS - 1)


@dataclass(frozen=True, eq=False)
class Tracker:
    """Running discrepancy of K regions. Never changed: ``observe`` returns the next one.

    All means are exponential with bias correction: d̂ ← d̂ + (η/z)(ℓ̄ − d̂), z ← (1 − η)z + η from
    z = 0, so that the first observation is taken as it is. Only regions that were seen move. Under a
    drift of δ per step d̂ lags δ(1/(ηq) − 1) behind, q the probability to be seen in a step.
    """

    decay: float
    mean: np.ndarray  # (K,) d̂: running mean of the normalised loss
    second: np.ndarray  # (K,) running mean of its square
    weight: np.ndarray  # (K,) z, 0 for regions never seen
    count: np.ndarray  # (K,) samples seen
    level: np.ndarray  # (10,) running mean of the loss itself per t-bin
    level_weight: np.ndarray  # (10,)

    @classmethod
    def start(cls, count: int, decay: float) -> Tracker:
        """Before the first batch, for ``count`` regions."""
        regions, bins = np.zeros(count), np.zeros(T_BINS)
        return cls(decay, regions, regions, regions, regions, bins, bins)

    def observe(self, sums: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> Tracker:
        """The tracker after a *global* batch: ``table`` of every rank, added up, fp64 (K, 10) each.

        The levels of the t-bins take in the batch first and then divide it, so that the first batch
        too is normalised. In a bin whose losses are all 0 every sample counts as average.

        Raises:
            ValueError: another number of regions, or losses that are not finite.
        """
        if sums.shape != (len(self.mean), T_BINS):
            raise ValueError(f"a table of {sums.shape} for {len(self.mean)} regions")
        if not (np.isfinite(sums).all() and np.isfinite(squares).all()):
            raise ValueError("a distillation loss is not finite: the discrepancy would be lost")
        in_bin, in_region = counts.sum(0), counts.sum(1)
        level_weight = _next_weight(self.level_weight, in_bin, self.decay)
        level = _moved(self.level, sums.sum(0), in_bin, self.decay, level_weight)
        dead = level == 0
        scale = np.where(dead, 1.0, level)
        normalised = np.where(dead, counts, sums / scale).sum(1)
        normalised_squares = np.where(dead, counts, squares / scale**2).sum(1)
        weight = _next_weight(self.weight, in_region, self.decay)
        return replace(
            self,
            mean=_moved(self.mean, normalised, in_region, self.decay, weight),
            second=_moved(self.second, normalised_squares, in_region, self.decay, weight),
            weight=weight,
            count=self.count + in_region,
            level=level,
            level_weight=level_weight,
        )

    def normalised(self, losses: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Losses (B,) over the level of their t-bin: 1 is an average one at this noise.

        Raises:
            ValueError: t outside [0, 1], or in a bin of which no loss was seen.
        """
        bins = _bins(t)
        if (self.level_weight[bins] == 0).any():
            raise ValueError("no loss was seen yet in a t-bin: observe the batch first")
        level = self.level[bins]
        return np.where(level == 0, 1.0, losses / np.where(level == 0, 1.0, level))

    def discrepancy(self, pi: np.ndarray) -> np.ndarray:
        """d̂ (K,); a region never seen has the mean of the others under π, or 1 before any batch."""
        seen = self.weight > 0
        if not pi[seen].any():
            return np.where(seen, self.mean, 1.0)
        return np.where(seen, self.mean, self.mean[seen] @ pi[seen] / pi[seen].sum())

    def state(self) -> dict[str, Any]:
        """Plain numbers and lists for a checkpoint."""
        arrays = {f.name: getattr(self, f.name).tolist() for f in fields(self)[1:]}
        return {"decay": self.decay, **arrays}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tracker:
        """What ``state`` gave.

        Raises:
            ValueError: entries are missing or unknown.
        """
        wrong = {f.name for f in fields(cls)} ^ set(state)
        if wrong:
            raise ValueError(f"tracker state does not fit in {sorted(wrong)}")
        arrays = {name: np.array(state[name], np.float64) for name in state if name != "decay"}
        return cls(decay=state["decay"], **arrays)


def _next_weight(weight: np.ndarray, counts: np.ndarray, decay: float) -> np.ndarray:
    return np.where(counts > 0, (1 - decay) * weight + decay, weight)


def _moved(
    mean: np.ndarray, sums: np.ndarray, counts: np.ndarray, decay: float, weight: np.ndarray
) -> np.ndarray:
    seen = counts > 0
    rate = decay / np.where(seen, weight, 1.0)
    return np.where(seen, mean + rate * (sums / np.maximum(counts, 1) - mean), mean)


def allocate(pi: np.ndarray, d: np.ndarray, config: RegionsConfig) -> np.ndarray:
    """Probabilities q (K,) with which regions are drawn, from masses π and discrepancies d (K,).

    Regions without mass have nothing to draw: they get 0 and do not count in ε/K.

    Raises:
        ValueError: π is no distribution; d does not fit it, is negative or 0 everywhere.
    """
    _check_distribution(pi, "base masses")
    live = pi > 0
    if d.shape != pi.shape or not np.isfinite(d).all() or (d < 0).any():
        raise ValueError(f"discrepancies must be {len(pi)} numbers of at least 0, not {d}")
    largest = d[live].max()
    if config.allocation == "softmax":
        tilt = np.where(live, np.exp(np.minimum(d - largest, 0) / config.temperature), 0)
    elif config.gamma == 0:
        tilt = np.ones(len(pi))
    elif largest == 0:
        raise ValueError("every discrepancy is 0: there is nothing to allocate by")
    else:
        tilt = np.where(live, (d / largest) ** config.gamma, 0)
    # Without a tilt the bracket is exactly 1, and q is π bit for bit.
    share = pi * (tilt / ((pi @ tilt) / (pi @ np.ones(len(pi)))))
    return np.where(live, (1 - config.epsilon) * share + config.epsilon / live.sum(), 0)


def ratios(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """target/source (K,) of two distributions, 0 where the target is; exactly 1 if they are equal.

    Raises:
        ValueError: one is no distribution, or their lengths differ.
    """
    if target.shape != source.shape:
        raise ValueError(f"base masses and probabilities differ: {target.shape}, {source.shape}")
    _check_distribution(target, "probabilities")
    _check_distribution(source, "probabilities")
    total, other = target.sum(), source.sum()
    positive = source > 0
    quotient = (target / total) / np.where(positive, source / other, 1.0)
    return np.where(positive, quotient, np.where(target > 0, np.inf, 0.0))


def effective_sample_size(w: np.ndarray) -> float:
    """(Σw)²/Σw²: how many equal weights would be as good."""
    return float(w.sum() ** 2 / (w**2).sum())


def estimator_variance(
    pi: np.ndarray, q: np.ndarray, mean: np.ndarray, second: np.ndarray
) -> float:
    """Variance of (π/q)ℓ for one draw from q: Σ π² E[ℓ²]/q − (Σ π E[ℓ])²; q must cover π.

    With E[ℓ²] ∝ E[ℓ]² it is least at q ∝ π E[ℓ], that is γ = 1 without a floor.

    Args:
        pi: base masses (K,).
        q: probabilities of the draws (K,).
        mean: E[ℓ] per region (K,).
        second: E[ℓ²] per region (K,).
    """
    return float(pi * ratios(pi, q) @ second - (pi @ mean) ** 2)
