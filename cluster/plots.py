"""The pictures of a report: curves as SVG, grids of samples as PNG, contact sheets as JPEG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
FRAMES = 8  # that are shown of a video
WIDEST = 2048  # pixels of a grid, without its lines
SHEET = 1024  # pixels of a contact sheet
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
        axes.plot(steps, values, label=literal(label), color=color, marker="o" if len(steps) < 30 else None,
                  markersize=3, linewidth=1.6)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(literal(ylabel))
    if len(labels) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _render(figure, png)


def literal(text: str) -> str:
    """A text as matplotlib draws it letter by letter: no formula between dollars."""
    return text.replace("$", r"\$")


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


def sample_grid(media: np.ndarray, columns: int | None = None, scale: int = 5) -> bytes:
    """PNG of uint8 media (n, F, H, W, C), small ones enlarged up to ``scale`` times.

    Of a video up to 8 evenly spaced frames lie side by side. What would be wider than ``WIDEST``
    pixels is shrunk.

    Args:
        columns: media in a row, of videos half as many; by default 10, or as many videos as fit, from
            2 to 5.
    """
    from PIL import Image

    video, width = media.shape[1] > 1, media.shape[3]
    media = media[:, _spaced(media.shape[1])]
    count, frames = media.shape[:2]
    if columns is None:
        across = min(5, max(2, WIDEST // (frames * width))) if video else 10
    else:
        across = max(columns // 2, 1) if video else columns
    across = min(across, count)
    strips = _strips(media, max(1, WIDEST // (across * frames)))
    height, wide, channels = strips.shape[1:]
    rows = -(-count // across)
    canvas = np.full((rows * (height + 1) + 1, across * (wide + 1) + 1, channels), 128, np.uint8)
    for i, strip in enumerate(strips):
        y, x = i // across * (height + 1) + 1, i % across * (wide + 1) + 1
        canvas[y : y + height, x : x + wide] = strip
    image = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, min(scale, 1600 // image.width))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def contact_sheet(video: np.ndarray) -> bytes:
    """JPEG of up to 8 evenly spaced frames side by side, of uint8 (F, H, W, C), ``SHEET`` wide.

    Small frames are enlarged by a whole factor as far as they fit.
    """
    from PIL import Image

    chosen = video[None, _spaced(len(video))]
    across = chosen.shape[1]
    strip = _strips(chosen, SHEET // across)[0]
    factor = max(1, SHEET // (across * max(video.shape[1:3])))
    strip = strip.repeat(factor, axis=0).repeat(factor, axis=1)
    image = Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _spaced(frames: int) -> list[int]:
    """Up to 8 evenly spaced of so many frames, the first and the last among them."""
    return [int(i) for i in np.linspace(0, frames - 1, min(frames, FRAMES)).round()]


def _strips(media: np.ndarray, widest: int) -> np.ndarray:
    """Media (n, F, H, W, C) with their frames side by side, each at most so many pixels wide."""
    count, frames, height, width, channels = media.shape
    if width > widest:
        flat = media.reshape(-1, height, width, channels)
        height, width = max(1, round(height * widest / width)), widest
        media = np.stack([_shrunk(frame, width, height) for frame in flat])
        media = media.reshape(count, frames, height, width, channels)
    return media.transpose(0, 2, 1, 3, 4).reshape(count, height, frames * width, channels)


def _shrunk(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    gray = frame.shape[-1] == 1
    image = Image.fromarray(frame[..., 0] if gray else frame)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return small[..., None] if gray else small


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
