"""Training on one's own samples: what it converges to, and a monitor for it (arXiv 2606.13796).

A generation learns the mixture of a share alpha of fresh data and 1 - alpha of the last generation's
samples. Even a perfect model stops its reverse diffusion at a time t0 > 0, so that it makes

    p_(i+1) = U_t0 (alpha p_data + (1 - alpha) p_i)
    U_t: x -> e^(-t/2) x + sqrt(1 - e^-t) n,  n ~ N(0, I)     (Ornstein-Uhlenbeck)
    p_inf = alpha sum_k (1 - alpha)^k U_((k+1) t0) p_data

``U_t`` multiplies the Hermite moment E He_n(x) by e^(-n t/2). Hence p_inf keeps of mode n the share
``limit_gain``, less of high modes than of low ones: a low-pass filter. Times count as above; x is in
units of the diffusion's noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import hermite_e

# Standard errors by which a moment of the reference must differ from 0 to be divided by, and by which
# gains must differ from 1 before they are called attenuation.
SIGNIFICANT = 5.0
ATTENUATED = 3.0
# Directions whose variance is below this share of the largest are rounding, not data.
FLAT = 1e-10


def kappa(alpha: float, t0: float) -> float:
    """sqrt(1 - alpha) e^(-t0/2): each generation is closer to p_inf by this factor, in W2.

    Raises:
        ValueError: ``alpha`` outside [0, 1] or ``t0`` below 0.
    """
    _check(alpha, t0)
    return math.sqrt(1 - alpha) * math.exp(-t0 / 2)


def limit_gain(mode: int, alpha: float, t0: float) -> float:
    """Hermite moment of p_inf / that of the data: alpha e^(-n t0/2) / (1 - (1-alpha) e^(-n t0/2)).

    Raises:
        ValueError: ``alpha`` outside [0, 1], ``t0`` below 0, ``mode`` below 1, or both ``alpha`` and
            ``t0`` 0: each generation then copies the last and there is no one limit.
    """
    _check(alpha, t0)
    if mode < 1 or alpha == t0 == 0:
        raise ValueError(f"no limit gain for mode {mode}, alpha {alpha:g}, t0 {t0:g}")
    kept = math.exp(-mode * t0 / 2)
    return alpha * kept / (1 - (1 - alpha) * kept)


def limit_variance(v0: float, alpha: float, t0: float) -> float:
    """Variance of p_inf for centred data of variance ``v0``: 1 + (v0 - 1) times the gain of mode 2.

    Raises:
        ValueError: as ``limit_gain``.
    """
    return 1 + (v0 - 1) * limit_gain(2, alpha, t0)


def annealed(t0: float, beta: float, generations: int) -> list[float]:
    """Stopping times t0 / (1 + i)^beta; with beta > 0 the gains return to 1 in the end."""
    return [t0 / (1 + i) ** beta for i in range(generations)]


def generation_gains(mode: int, alpha: float, times: Sequence[float]) -> list[float]:
    """Gains of generations 0 (the data: 1.0) to ``len(times)``, generation i + 1 stopped at times[i].

    g_(i+1) = e^(-n t_i/2) (alpha + (1 - alpha) g_i)

    Raises:
        ValueError: ``alpha`` outside [0, 1] or a time below 0.
    """
    gains = [1.0]
    for time in times:
        _check(alpha, time)
        gains.append(math.exp(-mode * time / 2) * (alpha + (1 - alpha) * gains[-1]))
    return gains


def generation_variances(
    v0: float, alpha: float, times: Sequence[float], start: float | None = None
) -> list[float]:
    """Variances of the generations for centred data of variance ``v0``; ``start`` is generation 0's.

    v_(i+1) = e^(-t_i) (alpha v0 + (1 - alpha) v_i) + 1 - e^(-t_i)

    Raises:
        ValueError: ``alpha`` outside [0, 1] or a time below 0.
    """
    variances = [v0 if start is None else start]
    for time in times:
        _check(alpha, time)
        mixed = alpha * v0 + (1 - alpha) * variances[-1]
        variances.append(math.exp(-time) * mixed - math.expm1(-time))
    return variances


@dataclass(frozen=True)
class Fit:
    """The recursion that explains gains best: its parameters and the root mean square residual."""

    alpha: float
    t0: float
    residual: float

    @property
    def kappa(self) -> float:
        """See ``kappa``."""
        return kappa(self.alpha, self.t0)


def fit(history: Mapping[float, Mapping[int, float]], alpha: float | None = None) -> Fit | None:
    """Least squares of the gains g_n,i = G_n + (1 - G_n) ((1 - alpha) e^(-n t0/2))^i.

    A single late generation determines alpha and t0 together only weakly (for small t0 its gains
    depend on t0 / alpha alone): give several generations, or ``alpha`` where the run knows it.

    Args:
        history: gains by mode, by generation; generation 0 is the data, ``math.inf`` the limit.
        alpha: the share of fresh data; None fits it too.

    Returns:
        None where fewer gains are given than parameters sought.
    """
    from scipy.optimize import least_squares

    rows = [(i, n, g) for i, gains in history.items() for n, g in gains.items() if i > 0]
    if len(rows) < (2 if alpha is None else 1):
        return None
    generations, modes, gains = (
        np.array(column, dtype=float) for column in zip(*rows, strict=True)
    )

    def residuals(x: np.ndarray) -> np.ndarray:
        fresh = x[1] if alpha is None else alpha
        kept = np.exp(-modes * x[0] / 2)
        stays = (1 - fresh) * kept
        limit = fresh * kept / (1 - stays)
        return limit + (1 - limit) * stays**generations - gains

    count = 2 if alpha is None else 1
    starts = {(t0, a)[:count] for t0 in (0.01, 0.1, 1.0) for a in (0.1, 0.5, 0.9)}
    bounds = ([1e-9, 0.0][:count], [50.0, 1.0][:count])
    tries = [
        least_squares(residuals, start, bounds=bounds, xtol=1e-15, ftol=1e-15, gtol=1e-15)
        for start in sorted(starts)
    ]
    best = min(tries, key=lambda found: found.cost)
    return Fit(
        alpha=float(best.x[1]) if alpha is None else alpha,
        t0=float(best.x[0]),
        residual=float(np.sqrt(np.square(best.fun).mean())),
    )


@dataclass(frozen=True)
class Spectrum:
    """Samples against a reference along the reference's principal directions.

    Attributes:
        variance_ratio: (directions,) samples / reference, largest reference variance first.
        moments: mode to E He_n of the samples (directions,).
        reference: mode to the reference's.
        gains: mode to the ratio of the two over all directions where the reference's moment differs
            from 0 by ``SIGNIFICANT`` standard errors; a mode without such a direction is left out.
        errors: mode to the standard error of its gain.
    """

    variance_ratio: np.ndarray
    moments: Mapping[int, np.ndarray]
    reference: Mapping[int, np.ndarray]
    gains: Mapping[int, float]
    errors: Mapping[int, float]

    def attenuated(self) -> bool:
        """Whether every gain, of two modes or more, is ``ATTENUATED`` standard errors below 1."""
        below = [self.gains[n] + ATTENUATED * self.errors[n] < 1 for n in self.gains]
        return len(below) > 1 and all(below)

    def metrics(self, alpha: float | None = None) -> dict[str, float]:
        """``variance_ratio/<direction>``, ``gain/<mode>``, ``gain_error/<mode>``.

        And ``kappa``, of the recursion with this limit, where ``attenuated``; see ``fit`` on what
        knowing ``alpha`` is worth.
        """
        metrics = {f"variance_ratio/{d}": float(r) for d, r in enumerate(self.variance_ratio)}
        for mode, gain in self.gains.items():
            metrics |= {f"gain/{mode}": gain, f"gain_error/{mode}": self.errors[mode]}
        found = fit({math.inf: self.gains}, alpha) if self.attenuated() else None
        return metrics if found is None else metrics | {"kappa": found.kappa}


def spectrum(
    samples: np.ndarray,
    reference: np.ndarray,
    modes: Sequence[int] = (3, 4),
    directions: int = 8,
    standardise: bool = True,
) -> Spectrum:
    """Hermite moments (probabilists') of features (n, d) and (m, d), and their ratios.

    Args:
        samples: features of what the run makes.
        reference: features of the data.
        modes: orders n, 1 or more. Moments of order n need samples in number far above n!.
        directions: how many principal directions of the reference, at most.
        standardise: centre and scale each direction by the reference's mean and deviation. Its own
            modes 1 and 2 are then 0 and have no gain: ``variance_ratio`` stands for the latter.
            False takes features as they are, which must be in units of the diffusion's noise: then
            modes 1 and 2 count, and all gains follow the recursion's law at any variance.

    Raises:
        ValueError: not such arrays, fewer than two rows, a value that is not finite, a mode below 1,
            or a reference without variance.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
            raise ValueError(f"{name} must be finite features (n > 1, d), not {features.shape}")
    if samples.shape[1] != reference.shape[1] or min(modes, default=1) < 1:
        raise ValueError(
            f"features {samples.shape} and {reference.shape}, modes {tuple(modes)}: widths must be "
            "equal and modes 1 or more"
        )
    values, axes = np.linalg.eigh(np.atleast_2d(np.cov(reference.astype(float), rowvar=False)))
    chosen = np.argsort(values)[::-1][:directions]
    chosen = chosen[values[chosen] > FLAT * values.max()]
    if len(chosen) == 0:
        raise ValueError("the reference's features have no variance")
    theirs, ours = reference @ axes[:, chosen], samples @ axes[:, chosen]
    ratio = ours.var(0, ddof=1) / theirs.var(0, ddof=1)
    if standardise:
        centre, scale = theirs.mean(0), theirs.std(0)
        theirs, ours = (theirs - centre) / scale, (ours - centre) / scale
    tables = {mode: (_moment(ours, mode), _moment(theirs, mode)) for mode in modes}
    known = {mode: found for mode in modes if (found := _gain(*tables[mode])) is not None}
    return Spectrum(
        variance_ratio=ratio,
        moments={mode: table[0][0] for mode, table in tables.items()},
        reference={mode: table[1][0] for mode, table in tables.items()},
        gains={mode: found[0] for mode, found in known.items()},
        errors={mode: found[1] for mode, found in known.items()},
    )


def _moment(x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """E He_n over rows of (n, directions), and its standard error."""
    values = hermite_e.hermeval(x, np.eye(mode + 1)[mode])
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(x))


def _gain(
    ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float] | None:
    """Regression through 0 of the samples' moments on the reference's, with its standard error."""
    rows = np.abs(theirs[0]) > SIGNIFICANT * theirs[1]
    if not rows.any():
        return None
    (a, error_a), (b, error_b) = ((m[rows], e[rows]) for m, e in (ours, theirs))
    total = float((b * b).sum())
    gain = float((a * b).sum()) / total
    error = np.sqrt((b * b * (error_a**2 + (gain * error_b) ** 2)).sum()) / total
    return gain, float(error)


def _check(alpha: float, t0: float) -> None:
    if not (0 <= alpha <= 1 and t0 >= 0):
        raise ValueError(f"alpha must be in [0, 1] and t0 at least 0, not {alpha:g} and {t0:g}")
