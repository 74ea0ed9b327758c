"""Samples as files: PNG of an image, MP4 or GIF of a video, JSON lines of texts.

The same samples give the same bytes with the same library versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.plots import contact_sheet, sample_grid

VideoFormat = Literal["gif", "mp4"]

FRAMES_PER_SECOND = 16  # Wan's
SHORTEST = 0.5  # seconds that a clip lasts at least, or nobody would see what happens in it
SIDE = 128  # pixels that the shorter side of a video has at least: players show it
# Constant, for the bytes depend on it; x264's own choice is that of the machine.
THREADS = 4
# Quality that the eye takes for lossless. With x264's macroblock tree the same frames would give
# other bytes each time.
ENCODING = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"}
RECORDED = 8  # videos of an evaluation that are kept


def write_media(
    directory: Path, media: np.ndarray, prompts: Sequence[str], video: VideoFormat
) -> list[str]:
    """Write a file for each of uint8 media (n, F, H, W, C), and ``grid.png`` of all.

    Returns:
        Their names, of number and prompt, without the grid's.
    """
    kind = "png" if media.shape[1] == 1 else video
    files = [f"{name}.{kind}" for name in names(prompts)]
    write = write_mp4 if kind == "mp4" else write_pictures
    for file, frames in zip(files, media, strict=True):
        write(directory / file, frames)
    (directory / "grid.png").write_bytes(sample_grid(media))
    return files


def write_evaluated(directory: Path, media: np.ndarray, prompts: Sequence[str]) -> None:
    """Write ``grid.png`` of uint8 media (n, F, H, W, C); of videos the first few with their sheets.

    A report shows them: NUMBER_PROMPT.mp4 is sample NUMBER of the evaluation, the .jpg beside it its
    contact sheet.
    """
    (directory / "grid.png").write_bytes(sample_grid(media))
    if media.shape[1] == 1:
        return
    for name, frames in zip(names(prompts[:RECORDED]), media[:RECORDED], strict=True):
        write_mp4(directory / f"{name}.mp4", frames)
        (directory / f"{name}.jpg").write_bytes(contact_sheet(frames))


def write_texts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON line for each row."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_pictures(path: Path, frames: np.ndarray) -> None:
    """Frames uint8 (F, H, W, C) as they are: a PNG of one, or a GIF that repeats."""
    from PIL import Image

    first, *rest = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames]
    if not rest:
        first.save(path)
        return
    milliseconds = round(1000 / frame_rate(len(frames)))
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Frames uint8 (F, H, W, C) as H.264, 4:2:0 in BT.709, which every player takes.

    Small ones are enlarged by repeating pixels; an odd side gets its last row or column again.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    shown = _even(_enlarged(frames))
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(path, "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", frame_rate(len(frames)), ENCODING)
        stream.height, stream.width = shown.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = THREADS
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in shown:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def frame_rate(count: int) -> int:
    """Frames per second of a clip of so many."""
    return min(FRAMES_PER_SECOND, round(count / SHORTEST))


def names(prompts: Sequence[str]) -> list[str]:
    """The name of each sample's file, without its ending."""
    return [f"{number:03d}_{_slug(prompt)}" for number, prompt in enumerate(prompts)]


def _slug(prompt: str) -> str:
    """Words of a prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "sample"


def _enlarged(frames: np.ndarray) -> np.ndarray:
    """RGB (F, H, W, 3) of gray or RGB frames, by the smallest factor that makes ``SIDE``."""
    factor = -(-SIDE // min(frames.shape[1:3]))
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.broadcast_to(large, (*large.shape[:3], 3))


def _even(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
