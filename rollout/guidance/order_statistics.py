"""Two-level order statistics (2OS): bounds that i.i.d. normals keep, and the projection onto them.

A table of M rows of D i.i.d. standard normals is sorted along its rows, then along its columns. Entry
(r, j) is then the r-th smallest of M draws of the j-th smallest of D normals, whose law is known:
a Beta quantile of a Beta quantile (spec noise-tilt §3). ``project`` clips a table between the alpha/2
quantiles of these laws and puts every entry back.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# A projection may undo a little of its own sorting; it is repeated until no entry leaves its bounds
# by more than TOLERANCE.
TOLERANCE = 1e-6
PASSES = 20
# In the normal score of a row's Beta quantile the bounds are so smooth that a polynomial through this
# many Chebyshev points gives every row to 1e-9: M * D Beta quantiles would take minutes.
NODES = 40


@lru_cache(maxsize=16)
def bounds(rows: int, columns: int, alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds, each fp32 (rows, columns), of a table sorted both ways.

    Args:
        rows: M.
        columns: D.
        alpha: probability that an entry of an i.i.d. normal table is outside its bounds.
        device: where the bounds are wanted.
    """
    lower = torch.from_numpy(lower_bounds(rows, columns, alpha)).to(device, torch.float32)
    return lower, -lower.flip(0, 1)


def lower_bounds(rows: int, columns: int, alpha: float) -> Any:
    """fp64 (rows, columns): the normal quantile at ``B^-1_{j,D-j+1}(B^-1_{r,M-r+1}(alpha/2))``.

    The upper bounds are minus these, turned by 180 degrees: ``U_{r,j} = -L_{M+1-r,D+1-j}``.
    """
    import numpy as np
    from scipy.special import betaincinv, ndtr, ndtri

    row, column = np.arange(1, rows + 1), np.arange(1, columns + 1)
    outer = betaincinv(row, rows - row + 1, alpha / 2)
    exact = rows <= NODES
    level = outer if exact else ndtr(chebyshev_points(ndtri(outer[0]), ndtri(outer[-1])))
    lower = ndtri(betaincinv(column, columns - column + 1, level[:, None]))
    return lower if exact else chebyshev_matrix(ndtri(outer)) @ lower


def chebyshev_points(low: float, high: float) -> Any:
    """fp64 (NODES,): Chebyshev points of the second kind of the interval, descending."""
    import numpy as np

    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * np.arange(NODES) / (NODES - 1))


def chebyshev_matrix(points: Any) -> Any:
    """fp64 (n, NODES): from values at the Chebyshev points to those at ``points`` (barycentric).

    The interval goes from the first to the last of the increasing ``points``.
    """
    import numpy as np

    nodes = chebyshev_points(points[0], points[-1])
    weight = (-1.0) ** np.arange(NODES)
    weight[[0, -1]] /= 2
    gap = points[:, None] - nodes
    on_node = np.abs(gap) < 1e-14
    share = weight / np.where(on_node, 1.0, gap)
    share = np.where(on_node.any(1, keepdims=True), on_node, share)
    return share / share.sum(1, keepdims=True)


@lru_cache(maxsize=16)
def energy_bounds(
    tiles: int, size: int, alpha: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bounds fp32 (tiles,) of the sorted energies of ``tiles`` times ``size`` i.i.d. normals.

    The energies' chi-square quantiles as normal scores, within the bounds of one row of ``tiles``.
    """
    import numpy as np
    from scipy.special import gammainccinv, gammaincinv, ndtr

    tail = ndtr(lower_bounds(1, tiles, alpha)[0])
    both = 2 * gammaincinv(size / 2, tail), 2 * gammainccinv(size / 2, tail[::-1])
    lower, upper = (torch.from_numpy(np.ascontiguousarray(b)).to(device).float() for b in both)
    return lower, upper


def project(tables: Tensor, alpha: float) -> Tensor:
    """fp32 (B, M, D) tables moved to where the two-level order statistics keep their bounds.

    Sort rows, sort columns of that, clip, undo both sorts; again while an entry was outside by more
    than ``TOLERANCE``, at most ``PASSES`` times. Tables of a batch do not see one another.
    """
    lower, upper = bounds(*tables.shape[1:], alpha, tables.device)
    projected = tables.clone()
    open_rows = torch.arange(len(tables), device=tables.device)
    for _ in range(PASSES):
        sorted_rows, row_places = projected[open_rows].sort(dim=2, stable=True)
        ordered, column_places = sorted_rows.sort(dim=1, stable=True)
        clipped = ordered.clamp(lower, upper)
        outside = (clipped - ordered).abs().amax((1, 2)) > TOLERANCE
        sorted_rows.scatter_(1, column_places, clipped)
        projected[open_rows] = ordered.scatter_(2, row_places, sorted_rows)
        open_rows = open_rows[outside]
        if not len(open_rows):
            break
    return projected


def project_statistics(tables: Tensor, alpha: float) -> Tensor:
    """fp32 (B, M, D) with the means, then the energies, of the M tiles within their own bounds.

    Scaled means ``sqrt(D) mean`` are standard normals and energies chi-squares of D degrees; each are
    projected as one row of M, then the tiles are shifted and scaled to them. A tile of zeros stays.
    """
    tiles, size = tables.shape[1:]
    lower, upper = bounds(1, tiles, alpha, tables.device)
    score = tables.sum(2) / size**0.5
    shift = (clip_sorted(score, lower[0], upper[0]) - score) / size**0.5
    tables = tables + shift[:, :, None]
    energy = tables.square().sum(2)
    wanted = clip_sorted(energy, *energy_bounds(tiles, size, alpha, tables.device))
    scale = (wanted / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()
    return tables * torch.where(energy > 0, scale, 1.0)[:, :, None]


def clip_sorted(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(B, M) values whose i-th smallest is clipped to the i-th bounds (M,)."""
    ordered, places = values.sort(dim=1, stable=True)
    return torch.empty_like(values).scatter_(1, places, ordered.clamp(lower, upper))
