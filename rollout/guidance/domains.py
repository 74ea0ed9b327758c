"""The domains in which whiteness is looked for: isometries of a latent, and its cut into tiles.

A sample is (C, ...): the first axis holds channels, the others are space and time; a flat sample has
one axis and no channels. Isometries act on all axes but the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rollout.draws import keyed_generator


def same(x: Tensor) -> Tensor:
    """The value domain."""
    return x


def hartley(x: Tensor) -> Tensor:
    """Orthonormal real FFT: real minus imaginary part of the transform; its own inverse.

    A conjugate pair of the FFT becomes two real coefficients, a self-conjugate bin one, so that norms
    are kept exactly and no bin is special.
    """
    spectrum = torch.fft.fftn(x, dim=transformed_axes(x.shape), norm="ortho")
    return spectrum.real - spectrum.imag


def cosine(x: Tensor) -> Tensor:
    """Orthonormal DCT-II along every transformed axis (Makhoul 1980: by an FFT of equal length)."""
    for axis in transformed_axes(x.shape):
        lines = x.movedim(axis, -1)
        n = lines.shape[-1]
        folded = torch.cat([lines[..., ::2], lines[..., 1::2].flip(-1)], -1)
        turned = torch.fft.rfft(folded) * twiddle(n, x.device)
        head, tail = turned.real, -turned.imag[..., 1 : (n + 1) // 2].flip(-1)
        x = torch.cat([head, tail], -1).movedim(-1, axis)
    return x


def inverse_cosine(x: Tensor) -> Tensor:
    """The inverse of ``cosine``."""
    for axis in transformed_axes(x.shape):
        lines = x.movedim(axis, -1)
        n = lines.shape[-1]
        half = n // 2 + 1
        mirrored = torch.cat([torch.zeros_like(lines[..., :1]), lines.flip(-1)], -1)[..., :half]
        turned = torch.complex(lines[..., :half], -mirrored) / twiddle(n, x.device)
        folded = torch.fft.irfft(turned, n)
        lines = torch.empty_like(folded)
        lines[..., ::2], lines[..., 1::2] = (
            folded[..., : (n + 1) // 2],
            folded[..., (n + 1) // 2 :].flip(-1),
        )
        x = lines.movedim(-1, axis)
    return x


@lru_cache(maxsize=32)
def twiddle(n: int, device: torch.device) -> Tensor:
    """complex64 (n // 2 + 1,): rotation and scale from the FFT of folded lines to their DCT-II."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    scale = torch.full_like(k, math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return torch.polar(scale, -math.pi * k / (2 * n)).to(device, torch.complex64)


def transformed_axes(shape: torch.Size) -> tuple[int, ...]:
    """Axes of space and time in a batch of samples."""
    return tuple(range(min(2, len(shape) - 1), len(shape)))


def transformed_sizes(shape: torch.Size) -> torch.Size:
    """Sizes of space and time in one sample."""
    return shape[min(1, len(shape) - 1) :]


def absolute_frequency(n: int) -> Tensor:
    """fp64 (n,): cycles per entry of the coefficients of an FFT."""
    return torch.fft.fftfreq(n, dtype=torch.float64).abs()


def cosine_frequency(n: int) -> Tensor:
    """fp64 (n,): cycles per entry of the coefficients of a DCT-II."""
    return torch.arange(n, dtype=torch.float64) / (2 * n)


@dataclass(frozen=True)
class Domain:
    """An isometry and its inverse; ``step`` gives the frequencies along an axis, if they are any."""

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    step: Callable[[int], Tensor] | None = None


VALUE = Domain("value", same, same)
FOURIER = Domain("fourier", hartley, hartley, absolute_frequency)
COSINE = Domain("cosine", cosine, inverse_cosine, cosine_frequency)


def tile_shape(entries: int) -> tuple[int, int]:
    """(M, D), M tiles of D entries: of all divisors D is the one nearest to ``2 sqrt(entries)``.

    Nearest as a ratio, the larger of two. Long tiles hold the energy of a band tightly, many tiles
    tell bands apart; twice the root left the least correlation.
    """
    divisors = [d for d in range(1, math.isqrt(entries) + 1) if entries % d == 0]
    divisors += [entries // d for d in divisors]
    wanted = math.log(4 * entries) / 2
    size = min(divisors, key=lambda d: (round(abs(math.log(d) - wanted), 9), -d))
    return entries // size, size


def radial_order(frequencies: Sequence[Tensor], channels: int) -> Tensor:
    """int64 (channels * grid,): places of a flat (channels, grid) spectrum by rising frequency.

    The grid is that of the ``frequencies`` along its axes. All channels of a frequency lie together.
    """
    radius = torch.stack(torch.meshgrid(*frequencies, indexing="ij")).square().sum(0).flatten()
    places = torch.arange(channels * len(radius)).view(channels, -1)
    return places[:, radius.argsort(stable=True)].T.flatten()


@lru_cache(maxsize=8)
def conjugate_pairs(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two int64 (pairs,): places of coefficients in the flat ``fftn`` of a sample, in radial order,
    and of their conjugates; every coefficient is in one of them, a self-conjugate one in both.
    """
    sizes = transformed_sizes(shape)
    axes = tuple(range(1, 1 + len(sizes)))
    places = torch.arange(shape.numel()).view(-1, *sizes)
    mirror = places.flip(axes).roll([1] * len(axes), axes).flatten()
    order = radial_order([absolute_frequency(n) for n in sizes], len(places))
    one = order[order <= mirror[order]]
    return one.to(device), mirror[one].to(device)


@lru_cache(maxsize=16)
def tile_order(domain: Domain, shape: torch.Size, device: torch.device) -> Tensor:
    """int64 (M * D,): which entry of a flat sample of ``shape`` each place of the tiles holds.

    Values are cut as they lie, channel by channel. Coefficients are cut in radial order of frequency,
    all channels of a frequency together: a tile is a ring of the spectrum. Within a tile, and among
    tiles, places are shuffled once and for all: sorting then breaks ties (zeros of a sparse gradient)
    without a pattern, and nothing else depends on it.
    """
    entries, sizes = shape.numel(), transformed_sizes(shape)
    order = torch.arange(entries)
    if domain.step is not None:
        order = radial_order([domain.step(n) for n in sizes], entries // math.prod(sizes))
    tiles = order.reshape(tile_shape(entries))
    generator = keyed_generator("tile order", domain.name, *shape)
    places = torch.rand(tiles.shape, generator=generator).argsort(1)
    rows = torch.randperm(len(tiles), generator=generator)
    return tiles.gather(1, places)[rows].flatten().to(device)


def tiled(x: Tensor, domain: Domain) -> Tensor:
    """(B, M, D) tiles of a batch of coefficients."""
    order = tile_order(domain, x.shape[1:], x.device)
    return x.flatten(1)[:, order].unflatten(1, tile_shape(order.numel()))


def untiled(tiles: Tensor, domain: Domain, shape: torch.Size) -> Tensor:
    """The batch of coefficients, of ``shape``, that has these tiles."""
    flat = tiles.flatten(1)
    laid = torch.empty_like(flat)
    laid[:, tile_order(domain, shape[1:], tiles.device)] = flat
    return laid.view(shape)
