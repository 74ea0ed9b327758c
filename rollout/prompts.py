"""Prompt sets: where the prompts of a recipe come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from rollout.countdown import CountdownPrompts
from rollout.draws import Prompt
from rollout.math_prompts import MathPrompts
from rollout.rows import SUFFIXES, SURROGATE, Row, RowSource, file_rows, numbered_lines
from rollout.sudoku import SudokuPrompts

DIRECTIONS = ("left", "right", "up", "down")
REWARD_ARGUMENTS = frozenset({"prompts", "completions"})


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
    """Prompts from a file: a line each of ``.txt``, or rows with ``prompt`` and optional ``id``."""

    kind: Literal["file"] = "file"
    path: Path = Field(
        description="A .txt, .jsonl, .json or .parquet file; further keys become reward columns."
    )

    def load(self) -> list[Prompt]:
        """The prompts in file order; an id is the row's own or else the number of its line or row.

        Raises:
            ValueError: the file is missing, empty, of another type, or a row is not readable.
        """
        if self.path.suffix not in (".txt", *SUFFIXES):
            raise ValueError(
                f"{self.path}: prompts are read from .txt, {', '.join(SUFFIXES)} files; a directory "
                "or a dataset of the hub is kind: dataset with the field 'source'"
            )
        if not self.path.is_file():
            found = "is a directory" if self.path.is_dir() else "no such file"
            raise ValueError(f"{self.path}: cannot be read: {found} (seen from {Path.cwd()})")
        return _prompts(str(self.path), self._rows(), "prompt")

    def _rows(self) -> Iterator[Row]:
        if self.path.suffix != ".txt":
            return file_rows(self.path)
        return (
            Row(f"{self.path}:{number}", number, {"prompt": line.strip()})
            for number, line in numbered_lines(self.path)
        )


class PackagedPrompts(BaseModel, frozen=True, extra="forbid"):
    """Prompts that come with the package: enough to start with, few to train long on."""

    kind: Literal["packaged"] = "packaged"
    name: Literal["scenes", "signs"] = Field(
        description="scenes: 48 things that happen; signs: 64 texts to be written, in double quotes."
    )

    def load(self) -> list[Prompt]:
        """The prompts in file order."""
        path = resources.files("rollout") / "prompt_sets" / f"{self.name}.txt"
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Prompt(f"{self.name}-{number}", line, {}) for number, line in enumerate(lines, 1)]


class DatasetPrompts(RowSource, frozen=True, extra="forbid"):
    """Prompts of a dataset as TRL takes it: text or a conversation, an optional ``id``, columns."""

    kind: Literal["dataset"] = "dataset"
    prompt_column: str = Field(
        default="prompt",
        description="Where a row has its prompt: text, or a conversation of one user turn. Further "
        "columns go to rewards.",
    )

    def load(self) -> list[Prompt]:
        """The prompts in the order of the rows; an id is the row's own or else its number from 1.

        Raises:
            ValueError: the source is missing, unreachable, empty or of another type, a package is
                not installed, or a row has no prompt that a policy takes.
        """
        rows = enumerate(islice(self.rows(), self.limit), 1)
        # The files of a directory each begin to count anew.
        numbered = (row._replace(number=number) for number, row in rows)
        return _prompts(self.source, numbered, self.prompt_column)


def _prompts(source: str, rows: Iterable[Row], column: str) -> list[Prompt]:
    prompts = [_prompt(row, column) for row in rows]
    if not prompts:
        raise ValueError(f"{source}: holds no prompt")
    seen: dict[str, int] = {}
    for position, prompt in enumerate(prompts, 1):
        if prompt.id in seen:
            raise ValueError(
                f"{source}: prompts {seen[prompt.id]} and {position} share the id {prompt.id!r}"
            )
        seen[prompt.id] = position
    return prompts


def _prompt(row: Row, column: str) -> Prompt:
    own = sorted(REWARD_ARGUMENTS & row.cells.keys() - {column})
    if own:
        raise ValueError(
            f"{row.place}: a reward gets its samples under the name {own[0]!r}: give the key "
            "another name"
        )
    text = row.cells.get(column)
    if isinstance(text, list):
        text = _user_turn(row, column, text)
    if not isinstance(text, str) or SURROGATE.search(text):
        raise ValueError(
            f"{row.place}: key {column!r} is missing or holds no valid text (keys here: "
            f"{', '.join(row.cells) or 'none'}): it has text, or a conversation of one turn as "
            '[{"role": "user", "content": "..."}]'
        )
    columns = {key: value for key, value in row.cells.items() if key not in (column, "id")}
    identity = row.cells.get("id")
    return Prompt(str(row.number if identity is None else identity), text, columns)


def _user_turn(row: Row, column: str, conversation: list[Any]) -> Any:
    """The content of a conversation's only turn."""
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in conversation]
    if roles != ["user"]:
        raise ValueError(
            f"{row.place}: key {column!r} is a conversation of the turns "
            f"{', '.join(map(str, roles)) or 'none'}: a policy takes one user turn; put what the "
            "others say into it"
        )
    return conversation[0].get("content")


PromptsConfig = Annotated[
    DigitPrompts
    | FilePrompts
    | PackagedPrompts
    | DatasetPrompts
    | SudokuPrompts
    | CountdownPrompts
    | MathPrompts,
    Field(discriminator="kind"),
]
