"""Whitening operators W of NoiseTilt: a gradient made into noise a sampler could have drawn.

``W(g)`` keeps as much of the direction of ``g`` as typical white noise can have: squared norm N, normal
values, flat spectrum (spec noise-tilt §3). ``2os`` holds all of it; the others are what it is
compared with and each leave something out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.guidance.domains import (
    COSINE,
    FOURIER,
    VALUE,
    conjugate_pairs,
    tiled,
    transformed_axes,
    untiled,
)
from rollout.guidance.order_statistics import project, project_statistics

# Spectral coefficients that share one threshold in ``wgnc``.
BLOCK = 16
# Values last: the spectrum survives the small change that values still need, not the other way round.
DOMAINS = (FOURIER, COSINE, VALUE)

Operator = Literal["2os", "rescale", "rank", "phase", "wgnc"]


class WhiteningConfig(BaseModel, frozen=True, extra="forbid"):
    """How a gradient becomes noise."""

    operator: Operator = Field(
        default="2os",
        description="2os: two-level order statistics of values and spectra; rescale: the norm alone; "
        "rank: normal values; phase: a spectrum of ones; wgnc: spectral blocks of normal l1 and l2.",
    )
    alpha: float = Field(
        default=1e-4,
        gt=0,
        lt=1,
        description="2os: probability that an entry of true noise is outside its bounds. At the "
        "default little is forbidden to samples of less than a thousand entries.",
    )
    sweeps: int = Field(
        default=2,
        ge=1,
        le=3,
        description="2os: rounds over the domains. One does for gradients with a smooth spectrum; "
        "sparse and very steep ones need two.",
    )


@torch.no_grad()
def whiten(gradient: Tensor, config: WhiteningConfig) -> Tensor:
    """W(gradient), fp32, each row of squared norm N, the entries of a sample.

    Odd in the gradient and blind to its scale; nothing is drawn. Rows that are zero or not finite give zeros.

    Args:
        gradient: (B, C, frames, height, width); also (B, N), or any shape with a batch axis, then
            channels, then axes of space and time.
        config: which operator.

    Raises:
        ValueError: a gradient without a batch axis.
    """
    if gradient.ndim < 2:
        raise ValueError(f"a gradient has a batch axis and others, not {tuple(gradient.shape)}")
    white = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
    peak = gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)
    usable = (peak.isfinite() & (peak > 0)).flatten()
    if usable.any():
        x = normalised((gradient[usable].double() / peak[usable].double()).float())
        sign = first_sign(x)
        white[usable] = normalised(OPERATORS[config.operator](x * sign, config)) * sign
    return white


def normalised(x: Tensor) -> Tensor:
    """Each row with squared norm N."""
    axes = tuple(range(1, x.ndim))
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float64)
    return x * (math.sqrt(x[0].numel()) / norm).float()


def first_sign(x: Tensor) -> Tensor:
    """The sign of each row's first entry that is not zero: with it, ties cannot make W uneven."""
    flat = x.flatten(1)
    first = (flat != 0).byte().argmax(1, keepdim=True)
    return flat.gather(1, first).sign().view(-1, *[1] * (x.ndim - 1))


def two_level(x: Tensor, config: WhiteningConfig) -> Tensor:
    """Values, ring by ring spectra, and means and energies of tiles like those of normals.

    Tiles get their energies before as well as after the projection of their entries: else entries of
    a weak ring stop at the inner bounds of the order statistics, too many near zero.
    """
    for _ in range(config.sweeps):
        for domain in DOMAINS:
            tiles = project_statistics(tiled(domain.forward(x), domain), config.alpha)
            tiles = project_statistics(project(tiles, config.alpha), config.alpha)
            x = normalised(domain.inverse(untiled(tiles, domain, x.shape)))
    return x


def rescale(x: Tensor, config: WhiteningConfig) -> Tensor:
    """The gradient at the norm of noise."""
    return x


def rank(x: Tensor, config: WhiteningConfig) -> Tensor:
    """Every value replaced by the normal quantile at its rank (i - 1/2) / N."""
    flat = tiled(x, VALUE).flatten(1)
    n = flat.shape[1]
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).to(flat)
    ranked = torch.empty_like(flat)
    ranked.scatter_(1, flat.argsort(dim=1, stable=True), quantiles.expand_as(flat))
    return untiled(ranked, VALUE, x.shape)


def phase(x: Tensor, config: WhiteningConfig) -> Tensor:
    """Every coefficient of the spectrum at magnitude one, its phase kept."""
    axes = transformed_axes(x.shape)
    spectrum = torch.fft.fftn(x, dim=axes, norm="ortho")
    return torch.fft.ifftn(spectrum.sgn(), dim=axes, norm="ortho").real


def wgnc(x: Tensor, config: WhiteningConfig) -> Tensor:
    """Soft thresholds that give blocks of the spectrum, in radial order, the norms of normals.

    All channels of a frequency lie together; the last block may be short.
    """
    axes = transformed_axes(x.shape)
    spectrum = torch.fft.fftn(x, dim=axes, norm="ortho").flatten(1)
    one, other = conjugate_pairs(x.shape[1:], x.device)
    blocks = spectrum[:, one].abs().split(len(one) // BLOCK * BLOCK or BLOCK, 1)
    shrunk = [
        shrink_blocks(b.unflatten(1, (-1, min(BLOCK, b.shape[1])))).flatten(1) for b in blocks
    ]
    wanted = torch.empty_like(x).flatten(1)
    wanted[:, one] = wanted[:, other] = torch.cat(shrunk, 1)
    return torch.fft.ifftn((spectrum.sgn() * wanted).view(x.shape), dim=axes, norm="ortho").real


def shrink_blocks(magnitude: Tensor) -> Tensor:
    """``(y - l)+`` scaled, with squared l2 norm B and l1 norm ``B sqrt(pi) / 2`` (Rayleigh's mean).

    l solves ``|(y - l)+|_1^2 = B pi / 4 |(y - l)+|_2^2``: in closed form for each number of entries
    kept, of which the largest that keeps what it says is right. More than B pi / 4 must be kept; a
    block whose so many largest are equal cannot have these norms and is left flat.

    Args:
        magnitude: (..., B) magnitudes y >= 0 of complex coefficients.
    """
    size = magnitude.shape[-1]
    target = size * math.pi / 4
    ordered = magnitude.double().sort(-1, descending=True).values
    kept = torch.arange(1, size + 1, device=magnitude.device, dtype=torch.float64)
    mean = ordered.cumsum(-1) / kept
    variance = (ordered.square().cumsum(-1) / kept - mean.square()).clamp_min(0)
    few = slice(math.ceil(target) - 1, None)
    spread, kept = variance[..., few], kept[few]
    threshold = mean[..., few] - (target * spread / (kept - target)).sqrt()
    last = (kept * (threshold < ordered[..., few])).argmax(-1, keepdim=True)
    shrunk = (magnitude.double() - threshold.gather(-1, last)).clamp_min(0)
    scaled = shrunk * (size / shrunk.square().sum(-1, keepdim=True)).sqrt()
    flat = spread[..., :1] <= 1e-12 * ordered[..., :1].square()
    return torch.where(flat, 1.0, scaled).to(magnitude)


OPERATORS: dict[Operator, Callable[[Tensor, WhiteningConfig], Tensor]] = {
    "2os": two_level,
    "rescale": rescale,
    "rank": rank,
    "phase": phase,
    "wgnc": wgnc,
}
