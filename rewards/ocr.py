"""Whether the text asked for can be read in a frame: the OCR reward of Flow-GRPO (2505.05470).

Text is read by RapidOCR (PP-OCRv4, its models are inside the wheel), on the CPU.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rewards.contract import RewardFunction
from rewards.frames import FrameScoreSettings

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class Ocr(FrameScoreSettings, frozen=True, extra="forbid"):
    """1 - edit distance / length of the text asked for, at least 0; over frames see ``aggregate``.

    Flow-GRPO's score of a video is the mean over every fourth frame that has any of the text; here
    a frame without it counts as 0.
    """

    kind: Literal["ocr"] = "ocr"
    shortest_side: int = Field(
        default=736,
        ge=32,
        description="Frames are enlarged to at least this many pixels before text is looked for; "
        "less is faster and misses small text.",
    )

    def build(self) -> RewardFunction:
        """With its models, on as many threads as torch has here."""
        return OcrScores(self, self.shortest_side)

    def problem(self) -> str | None:
        """Whether RapidOCR is installed, without importing it."""
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            return "rapidocr-onnxruntime is not installed: pip install 'rectify[ocr]'"
        return None


class OcrScores:
    """Scores by the column ``text``, or by what the prompt has in quotes."""

    def __init__(self, settings: FrameScoreSettings, shortest_side: int) -> None:
        import torch
        from rapidocr_onnxruntime import RapidOCR  # pyright: ignore[reportMissingImports]

        self.settings = settings
        self.reader: Any = RapidOCR(
            intra_op_num_threads=torch.get_num_threads(), det_limit_side_len=shortest_side
        )

    def __call__(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        text: list[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores in [0, 1] of media uint8 (frames, height, width, 1 or 3).

        Raises:
            ValueError: other media, or nothing says which text is asked for.
        """
        import torch

        wanted = asked_texts(prompts, text)
        media = self.settings.chosen_frames(completions)
        return [
            float(
                self.settings.aggregated(
                    torch.tensor([text_score(asked, self.read(frame)) for frame in frames])
                )
            )
            for asked, frames in zip(wanted, media, strict=True)
        ]

    def read(self, frame: np.ndarray) -> str:
        """The text of a frame uint8 RGB (height, width, 3), top to bottom, left to right."""
        blue_first = np.ascontiguousarray(frame[..., ::-1])
        found, _ = self.reader(blue_first, use_cls=False)
        return "".join(text for _, text, _ in found or [])


def asked_texts(prompts: list[str], text: list[str | None] | None) -> list[str]:
    """The text of each sample: the column, or what the prompt first has in double quotes.

    Raises:
        ValueError: neither has any.
    """
    asked: list[str] = []
    for position, prompt in enumerate(prompts):
        given = text[position] if text is not None else None
        if given is None:
            found = QUOTED.search(prompt)
            given = (found[1] or found[2]) if found else ""
        if not _comparable(given):
            raise ValueError(
                f"prompt {prompt!r} has no text in double quotes and column 'text' has none either"
            )
        asked.append(given)
    return asked


def text_score(asked: str, read: str) -> float:
    """1 where ``asked`` is within ``read``, else 1 - distance / length of ``asked``, at least 0.

    Case and white space do not count.
    """
    wanted, seen = _comparable(asked), _comparable(read)
    if wanted in seen:
        return 1.0
    return 1 - min(edit_distance(wanted, seen), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements of characters that make one the other."""
    row = list(range(len(second) + 1))
    for above, left in enumerate(first, 1):
        diagonal, row[0] = row[0], above
        for column, right in enumerate(second, 1):
            cost = min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right))
            diagonal, row[column] = row[column], cost
    return row[-1]


def _comparable(text: str) -> str:
    return "".join(text.split()).lower()
