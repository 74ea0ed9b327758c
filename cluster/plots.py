"""The pictures of a report: curves as SVG, sample grids as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#4b5563")


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``key`` where it has a number."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves(rows: Rows, labels: Mapping[str, str], ylabel: str, png: bool = False) -> bytes:
    """Lines over steps; ``labels`` maps metric keys to legend entries."""
    figure, axes = _figure()
    for color, (key, label) in zip(_cycle(len(labels)), labels.items(), strict=True):
        steps, values = series(rows, key)
        axes.plot(steps, values, label=label, color=color, marker="o" if len(steps) < 30 else None,
                  markersize=3, linewidth=1.6)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _render(figure, png)


def stacked(rows: Rows, labels: Mapping[str, str], ylabel: str) -> bytes:
    """Areas over steps, one on the other."""
    figure, axes = _figure()
    steps = [row["step"] for row in rows]
    values = [[row.get(key) or 0.0 for row in rows] for key in labels]
    axes.stackplot(
        steps, values, labels=list(labels.values()), colors=_cycle(len(labels)), alpha=0.85
    )
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return _render(figure, False)


def timesteps(rows: Rows, quantities: Mapping[str, str]) -> bytes:
    """Means over the run of per-timestep quantities, one small panel each."""
    from matplotlib.figure import Figure

    indices = sorted(
        {int(k.split("/")[1]) for row in rows for k in row if k.startswith("timestep/")}
    )
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for place, (quantity, label) in enumerate(quantities.items(), 1):
        axes = figure.add_subplot(1, len(quantities), place)
        means = [np.mean(series(rows, f"timestep/{i}/{quantity}")[1] or [np.nan]) for i in indices]
        axes.bar([str(i) for i in indices], means, color=COLORS[place % len(COLORS)])
        if quantity == "ratio_mean":
            centre = max(float(np.nanmax(np.abs(np.array(means) - 1))), 1e-6)
            axes.set_ylim(1 - 2 * centre, 1 + 2 * centre)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("timestep index", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _render(figure, False)


def sample_grid(media: np.ndarray, columns: int = 10, scale: int = 5) -> bytes:
    """PNG of uint8 media (n, F, H, W, C); the frames of a video side by side."""
    from PIL import Image

    count, frames, height, width, channels = media.shape
    strips = media.transpose(0, 2, 1, 3, 4).reshape(count, height, frames * width, channels)
    columns = min(columns if frames == 1 else max(columns // 2, 1), count)
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + 1) + 1, columns * (frames * width + 1) + 1, channels), 128, np.uint8
    )
    for i, strip in enumerate(strips):
        y, x = i // columns * (height + 1) + 1, i % columns * (frames * width + 1) + 1
        canvas[y : y + height, x : x + frames * width] = strip
    image = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, min(scale, 1600 // image.width))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _render(figure: Any, png: bool) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png" if png else "svg", dpi=130)
    return buffer.getvalue()
