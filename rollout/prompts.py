"""Prompt sets: where the prompts of a recipe come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from rollout.countdown import CountdownPrompts
from rollout.draws import Prompt
from rollout.math_prompts import MathPrompts
from rollout.sudoku import SudokuPrompts

DIRECTIONS = ("left", "right", "up", "down")


class DigitPrompts(BaseModel, frozen=True, extra="forbid"):
    """The ten handwritten digits, asked for by name; with ``moving`` each in four directions."""

    kind: Literal["digits"] = "digits"
    moving: bool = Field(
        default=False, description="Ask for a direction of motion too (4-frame video)."
    )

    unconditional: bool = Field(
        default=False, description="Ask for no digit in particular: one empty prompt."
    )

    def load(self) -> list[Prompt]:
        """The prompts with the column ``digit`` (and ``direction``); an unconditional one has none."""
        if self.unconditional:
            return [Prompt("any", "", {})]
        if not self.moving:
            return [Prompt(str(d), f"a handwritten {d}", {"digit": d}) for d in range(10)]
        return [
            Prompt(
                f"{d}-{way}",
                f"a handwritten {d} moving {way}",
                {"digit": d, "direction": way},
            )
            for d in range(10)
            for way in DIRECTIONS
        ]


class FilePrompts(BaseModel, frozen=True, extra="forbid"):
    """Prompts from a file: ``.txt`` (one a line) or ``.jsonl`` (``prompt``, optional ``id``)."""

    kind: Literal["file"] = "file"
    path: Path = Field(
        description="A .txt or .jsonl file; further jsonl keys become reward columns."
    )

    def load(self) -> list[Prompt]:
        """The prompts in file order.

        Raises:
            ValueError: the file is missing, empty, of another type, or a line is not readable.
        """
        if self.path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{self.path}: prompts are read from .txt or .jsonl files")
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: cannot be read as prompts: {error}") from error
        prompts = [
            self._parse(number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if not prompts:
            raise ValueError(f"{self.path}: holds no prompt")
        seen: dict[str, int] = {}
        for position, prompt in enumerate(prompts, 1):
            if prompt.id in seen:
                raise ValueError(
                    f"{self.path}: prompts {seen[prompt.id]} and {position} share the "
                    f"id {prompt.id!r}"
                )
            seen[prompt.id] = position
        return prompts

    def _parse(self, number: int, line: str) -> Prompt:
        if self.path.suffix == ".txt":
            return Prompt(str(number), line.strip(), {})
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path}:{number}:{error.colno}: not JSON: {error.msg}"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{self.path}:{number}: each line needs {{"prompt": "..."}}')
        columns = {key: value for key, value in row.items() if key not in ("prompt", "id")}
        return Prompt(str(row.get("id", number)), row["prompt"], columns)


PromptsConfig = Annotated[
    DigitPrompts | FilePrompts | SudokuPrompts | CountdownPrompts | MathPrompts,
    Field(discriminator="kind"),
]
