"""Files of samples: what a player reads back is what was drawn, and the bytes do not change."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cluster.media import (
    frame_rate,
    names,
    write_evaluated,
    write_media,
    write_mp4,
    write_pictures,
    write_texts,
)
from cluster.plots import FRAMES, SHEET, WIDEST, contact_sheet, sample_grid


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def scene(frames: int, height: int, width: int) -> np.ndarray:
    """A coloured wave that moves to the left, a little every frame."""
    y, x, t = np.mgrid[0:height, 0:width, 0:frames]
    channels = [np.sin((x + 3 * t) / 15 + c) * np.cos(y / 20 + c) for c in range(3)]
    return (127 + 100 * np.stack(channels, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


def played(path: Path) -> tuple[Any, np.ndarray]:
    """The stream, and frames RGB (F, H, W, 3), of a video file."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream, np.stack(frames)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_video_is_h264_that_every_player_takes(tmp_path: Path):
    frames = scene(17, 144, 256)
    write_mp4(tmp_path / "a.mp4", frames)
    stream, shown = played(tmp_path / "a.mp4")
    context = stream.codec_context
    assert (context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
    assert (context.colorspace, context.color_range, context.color_primaries) == (1, 1, 1)
    assert stream.duration * stream.time_base == pytest.approx(17 / 16, rel=1e-3)
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() < 3
    # The index comes before the frames, so that a page can play while it loads.
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_small_frames_are_enlarged_pixel_by_pixel(tmp_path: Path):
    frames = noise(4, 8, 8, 1)
    write_mp4(tmp_path / "a.mp4", frames)
    stream, shown = played(tmp_path / "a.mp4")
    assert shown.shape == (4, 128, 128, 3) and stream.average_rate == 8
    blocks = shown.reshape(4, 8, 16, 8, 16, 3).astype(int)
    assert np.abs(blocks.mean((2, 4)) - frames).max() < 2
    assert np.abs(blocks - frames.reshape(4, 8, 1, 8, 1, 1)).max() < 40


@pytest.mark.parametrize("side", [(131, 150), (150, 131), (129, 131)])
def test_an_odd_side_gets_its_last_line_again(tmp_path: Path, side: tuple[int, int]):
    frames = scene(3, *side)
    write_mp4(tmp_path / "a.mp4", frames)
    _, shown = played(tmp_path / "a.mp4")
    height, width = side
    assert shown.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(shown[:, :height, :width].astype(int) - frames).mean() < 3
    last = shown[:, height - 1 : height + 1].astype(int)
    assert np.abs(last[:, 0] - last[:, -1]).mean() < 3


def test_colours_come_back_as_they_were(tmp_path: Path):
    colours = [(200, 30, 90), (20, 220, 40), (10, 60, 250), (255, 255, 255), (0, 0, 0)]
    frames = np.zeros((5, 128, 128, 3), np.uint8) + np.array(colours, np.uint8)[:, None, None]
    write_mp4(tmp_path / "a.mp4", frames)
    _, shown = played(tmp_path / "a.mp4")
    assert np.abs(shown.astype(int) - frames).max() <= 3


def test_the_same_frames_give_the_same_bytes(tmp_path: Path):
    frames = (scene(41, 240, 416) // 2 + noise(41, 240, 416, 3) // 8).astype(np.uint8)
    contents: set[bytes] = set()
    for number in range(4):
        write_mp4(tmp_path / f"{number}.mp4", frames)
        contents.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(contents) == 1


def test_short_clips_are_slowed_down_to_half_a_second():
    assert [frame_rate(count) for count in (2, 4, 5, 8, 9, 81)] == [4, 8, 10, 16, 16, 16]


def test_a_gif_holds_every_frame_and_its_time(tmp_path: Path):
    frames = noise(4, 8, 9, 1)
    write_pictures(tmp_path / "a.gif", frames)
    clip: Any = Image.open(tmp_path / "a.gif")
    assert (clip.n_frames, clip.info["duration"], clip.info["loop"]) == (4, 120, 0)
    for number in range(4):
        clip.seek(number)
        assert np.array_equal(np.asarray(clip.convert("L")), frames[number, ..., 0])


def test_images_are_exact_and_named_by_number_and_prompt(tmp_path: Path):
    media = noise(3, 1, 6, 5, 3)
    prompts = ["A red/fox: 狐", "../..", "x" * 99]
    files = write_media(tmp_path, media, prompts, "mp4")
    assert files == ["000_a-red-fox-狐.png", "001_sample.png", f"002_{'x' * 40}.png"]
    for file, frames in zip(files, media, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / file)), frames[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "grid.png"])


@pytest.mark.parametrize("video", ["mp4", "gif"])
def test_videos_become_what_is_asked_for(tmp_path: Path, video: Any):
    files = write_media(tmp_path, noise(2, 3, 8, 8, 1), ["a", "b"], video)
    assert files == [f"000_a.{video}", f"001_b.{video}"]
    assert all((tmp_path / file).stat().st_size > 100 for file in files)


def test_an_evaluation_keeps_its_first_videos_with_their_sheets(tmp_path: Path):
    prompts = [f"p{number}" for number in range(10)]
    write_evaluated(tmp_path, noise(10, 4, 8, 8, 1), prompts)
    kept = names(prompts[:8])
    wanted = ["grid.png", *[f"{name}.{kind}" for name in kept for kind in ("jpg", "mp4")]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(wanted)


def test_an_evaluation_of_images_keeps_the_grid_alone(tmp_path: Path):
    write_evaluated(tmp_path, noise(10, 1, 8, 8, 1), ["p"] * 10)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_texts_are_a_json_line_each(tmp_path: Path):
    rows = [{"prompt": "a\nb", "completion": "ü</script>"}, {"prompt": "", "completion": "\u2028"}]
    write_texts(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows and lines[-1] == ""


def test_a_sheet_shows_evenly_spaced_frames_from_the_first_to_the_last():
    video = np.repeat(np.arange(81, dtype=np.uint8) * 3, 96 * 160 * 3).reshape(81, 96, 160, 3)
    sheet = opened(contact_sheet(video))
    assert sheet.size == (SHEET, round(96 * 128 / 160))
    greys = np.asarray(sheet)[40, 64::128, 0].tolist()
    assert greys == pytest.approx([3 * i for i in (0, 11, 23, 34, 46, 57, 69, 80)], abs=2)


def test_a_sheet_of_small_frames_is_enlarged_by_a_whole_factor():
    video = noise(4, 8, 8, 1)
    sheet = np.asarray(opened(contact_sheet(video)))
    assert sheet.shape == (256, 1024)
    blocks = sheet.reshape(8, 32, 4, 8, 32).mean((1, 4)).transpose(1, 0, 2)
    assert np.abs(blocks - video[..., 0]).max() < 6


def test_a_grid_of_large_media_stays_of_a_sane_size():
    images = opened(sample_grid(noise(3, 1, 1024, 1536, 3).repeat(4, axis=0)))
    assert images.width == 10 * (WIDEST // 10) + 11
    assert images.height == 2 * (round(1024 * 204 / 1536) + 1) + 1
    videos = opened(sample_grid(scene(33, 240, 416)[None].repeat(3, axis=0)))
    cell = WIDEST // (2 * FRAMES)
    assert videos.size == (2 * (FRAMES * cell + 1) + 1, 2 * (round(240 * cell / 416) + 1) + 1)


def test_a_grid_of_small_media_holds_their_pixels():
    media = noise(12, 1, 8, 8, 1)
    grid = np.asarray(opened(sample_grid(media, scale=1)))
    assert grid.shape == (19, 91)
    assert np.array_equal(grid[10:18, 10:18], media[11, 0, ..., 0])
    assert np.array_equal(np.asarray(opened(sample_grid(media)))[2::5, 2::5], grid)
