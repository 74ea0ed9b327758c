"""GSM8K and MATH as prompt sets: rows of a local file, of a saved dataset or of the hub."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from rollout.draws import Prompt

# The convention of the field (d1, LLaDA RL): tagged reasoning, then a boxed answer in a tag.
TEMPLATE = (
    "Solve the math problem below. First think it through step by step between <reasoning> and "
    "</reasoning>. Then put {form}, and nothing else, into \\boxed{{}} between <answer> and "
    "</answer>. Your reply has this shape:\n"
    "<reasoning>\nyour steps\n</reasoning>\n"
    "<answer>\n\\boxed{{your answer}}\n</answer>\n\n"
    "Problem: {question}"
)
ANSWER_FORM = {
    "gsm8k": "the final number, without unit",
    "math": "the final answer, in LaTeX and simplified",
}

SUFFIXES = (".jsonl", ".json", ".parquet")
# What `datasets` and the hub put beside the rows.
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
# A suffix begins with a letter: the hub has names such as NuminaMath-1.5.
SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# A box that opens, any other command or escaped character, a brace: each character is read once.
LATEX = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
CURRENCY = re.compile(r"\\?[$€£¥]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Row(NamedTuple):
    """One row and where it stands, for messages: ``file:line`` or ``file, row n`` from 1."""

    place: str
    cells: dict[str, Any]


class MathPrompts(BaseModel, frozen=True, extra="forbid"):
    """Math problems with a known final answer, in the layout of GSM8K or of MATH."""

    kind: Literal["math"] = "math"
    dataset: Literal["gsm8k", "math"] = Field(
        description="Layout of the rows and wording: question/answer, or problem/solution."
    )
    source: str = Field(
        min_length=1,
        description="A .jsonl, .json or .parquet file, a directory of them or of save_to_disk, "
        "or a dataset of the hub, e.g. openai/gsm8k.",
    )
    subset: str | None = Field(
        default=None,
        min_length=1,
        description="Configuration on the hub (main for openai/gsm8k), or folder of a directory.",
    )
    split: str = Field(
        default="train",
        pattern=r"^\w+(\.\w+)*$",
        description="Split of the hub or of a directory; a single file is read whole.",
    )
    limit: int | None = Field(default=None, ge=1, description="Only the first so many rows.")

    def load(self) -> list[Prompt]:
        """The prompts in the order of the rows, with the column ``answer`` (text).

        An id is the row's own (``id``, ``unique_id``) or else a hash of the question, with -2, -3
        for its repetitions: the order of the rows does not change it.

        Raises:
            ValueError: the source is missing, unreachable, empty or of another type, a package is
                not installed, or a row lacks a key, an answer or an id of its own.
        """
        read, form = READERS[self.dataset], ANSWER_FORM[self.dataset]
        ids = _Ids()
        prompts: list[Prompt] = []
        for row in islice(self._rows(), self.limit):
            question, answer = read(row)
            text = TEMPLATE.format(form=form, question=question)
            prompts.append(Prompt(ids.take(row, question), text, {"answer": answer}))
        if not prompts:
            raise ValueError(f"{self.source}: holds no row: correct the field 'source' or 'split'")
        return prompts

    @property
    def on_hub(self) -> bool:
        """Whether ``source`` names a dataset of the hub and nothing on this machine."""
        here = os.path.exists(os.path.expanduser(self.source))
        return not here and not SUFFIX.search(self.source) and bool(HUB_ID.fullmatch(self.source))

    def _rows(self) -> Iterator[Row]:
        path = Path(os.path.expanduser(self.source))
        if os.path.exists(path):
            return self._local_rows(path)
        if not self.on_hub:
            raise ValueError(
                f"{self.source}: no such file or directory (seen from {Path.cwd()}): correct the "
                "field 'source', or name a dataset of the hub such as openai/gsm8k"
            )
        return self._hub_rows()

    def _local_rows(self, path: Path) -> Iterator[Row]:
        if self.subset is not None:
            if not (path / self.subset).is_dir():
                raise ValueError(
                    f"{path}: has no folder {self.subset!r}: remove or correct the field 'subset'"
                )
            path = path / self.subset
        if not path.is_dir():
            return _file_rows(path)
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _saved_rows(path, self.split)
        return chain.from_iterable(map(_file_rows, _files_of(path, self.split)))

    def _hub_rows(self) -> Iterator[Row]:
        datasets = _package("datasets", self.source)
        # RuntimeError: a set that needs a script of its own.
        failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        try:
            rows = datasets.load_dataset(self.source, self.subset, split=self.split)
        except failures as error:
            raise ValueError(
                f"{self.source}: is no local path and cannot be read from the Hugging Face hub: "
                "check the fields 'source', 'subset' and 'split'; without network or with "
                "HF_HUB_OFFLINE=1 only a set that was downloaded before can be read, so set "
                "'source' to a local .jsonl, .json or .parquet file of it. "
                f"The reason given: {error}"
            ) from error
        name = "/".join(part for part in (self.source, self.subset, self.split) if part)
        return _numbered(name, rows)


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` with balanced braces holds; None without.

    The last one is the one that opens last, so the inner one of two nested. As in TeX, ``\{`` and
    ``\}`` are characters and not braces, and ``\\`` is a line break. Linear in the text.
    """
    opened: list[int | None] = []  # where the content of a box begins, None for any other brace
    best: tuple[int, int] | None = None
    for token in LATEX.finditer(text):
        if token["box"] is not None:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


class _Ids:
    """Gives every row an id that no other row has."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.copies: Counter[str] = Counter()

    def take(self, row: Row, question: str) -> str:
        """The id of a row.

        Raises:
            ValueError: its own id is neither text nor integer, or another row has it.
        """
        key = next((k for k in ("id", "unique_id") if row.cells.get(k) not in (None, "")), None)
        if key is None:
            digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
            self.copies[digest] += 1
            count = self.copies[digest]
            chosen = digest if count == 1 else f"{digest}-{count}"
        else:
            chosen = _text(row, key)
        if chosen in self.places:
            raise ValueError(
                f"{row.place}: has the id {chosen!r} of {self.places[chosen]}: make the keys 'id' "
                "and 'unique_id' unique, or remove them to have ids from the questions"
            )
        self.places[chosen] = row.place
        return chosen


def _text(row: Row, key: str) -> str:
    """A cell without surrounding space; integers are written out."""
    value = row.cells.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
        raise ValueError(
            f"{row.place}: key {key!r} is missing or holds no valid text (keys here: "
            f"{', '.join(row.cells) or 'none'}): correct it or the field 'dataset': gsm8k reads "
            "question and answer, math reads problem and answer or solution, both id if given"
        )
    return value.strip()


def _gsm8k(row: Row) -> tuple[str, str]:
    """Question, and the last number after ``####`` without currency and thousands separators."""
    question, worked = _text(row, "question"), _text(row, "answer")
    _, mark, tail = worked.rpartition("####")
    final = THOUSANDS.sub("", CURRENCY.sub("", tail).strip().split("\n")[0]).strip()
    if not mark or not final:
        raise ValueError(
            f"{row.place}: key 'answer' has no final answer: end it with '#### ' and the number"
        )
    return question, final


def _math(row: Row) -> tuple[str, str]:
    """Problem, and the row's own answer or else what its solution boxes last."""
    problem = _text(row, "problem")
    if row.cells.get("answer") not in (None, ""):
        return problem, _text(row, "answer")
    solution = _text(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        answer = _unbraced_box(solution)
    if not answer.strip():
        raise ValueError(
            f"{row.place}: key 'solution' has no \\boxed{{...}} with balanced braces and a "
            "content: box its final answer, or give it in a key 'answer'"
        )
    return problem, answer.strip()


def _unbraced_box(solution: str) -> str:
    r"""``\boxed 9$``, which some solutions of MATH have: up to the end of the formula, or empty."""
    _, mark, tail = solution.rpartition("\\boxed")
    content, end, _ = tail.partition("$")
    return content if mark and end and not content.lstrip().startswith("{") else ""


READERS: dict[str, Callable[[Row], tuple[str, str]]] = {"gsm8k": _gsm8k, "math": _math}


def _files_of(directory: Path, split: str) -> list[Path]:
    """Files with rows below a directory, sorted; of one split if their paths name splits."""
    found: list[Path] = []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix in SUFFIXES and path.name not in METADATA and not hidden and path.is_file():
            found.append(path)
    if not found:
        raise ValueError(
            f"{directory}: holds no file {', '.join(SUFFIXES)}: correct the field 'source'"
        )
    named = {
        name: [path for path in found if _names(path.relative_to(directory), name)]
        for name in (split, *SPLITS)
    }
    chosen = named[split] if any(named.values()) else found
    if not chosen:
        others = ", ".join(name for name, paths in named.items() if paths)
        raise ValueError(
            f"{directory}: no file there is named for the split {split!r}, only for {others}: "
            "correct the field 'split', or set 'source' to one file"
        )
    suffixes = sorted({path.suffix for path in chosen})
    if len(suffixes) > 1:
        raise ValueError(
            f"{directory}: holds the rows of {split!r} as {' and '.join(suffixes)}, which may be "
            "copies of each other: set the field 'source' to one file or folder"
        )
    return chosen


def _names(path: Path, split: str) -> bool:
    """Whether a path has the split as a word: train.jsonl, train-00000-of-00001, train/a.json."""
    spaced, wanted = (re.sub(r"[\W_]+", " ", text.lower()) for text in (str(path), split))
    return f" {wanted} " in f" {spaced} "


def _file_rows(path: Path) -> Iterator[Row]:
    """Rows of one file."""
    if path.suffix == ".jsonl":
        lines = _content(path).split("\n")
        return (
            _row(f"{path}:{number}", _parsed(f"{path}:{number}", line, "a line is one object"))
            for number, line in enumerate(lines, 1)
            if line.strip()
        )
    if path.suffix == ".json":
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise ValueError(
        f"{path}: problems are read from {', '.join(SUFFIXES)} files: convert it to .jsonl"
    )


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json file: a list of objects, or one object as MATH was released."""
    remedy = "it holds a list of objects; name it .jsonl if it has an object a line"
    content = _parsed(str(path), _content(path), remedy)
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: is no list: {remedy}")
    return _numbered(str(path), rows)


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, read by pyarrow, which comes with `datasets`."""
    parquet = _package("pyarrow.parquet", str(path))
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as parquet; write it again: {error}") from error
    return _numbered(str(path), rows)


def _saved_rows(directory: Path, split: str) -> Iterator[Row]:
    """Rows of what save_to_disk wrote; the split matters where it wrote several."""
    datasets = _package("datasets", str(directory))
    try:
        saved = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory}: cannot be read as a dataset of save_to_disk; write it again: {error}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(
                f"{directory}: has no split {split!r}: set the field 'split' to one of "
                f"{', '.join(saved)}"
            )
        saved = saved[split]
    return _numbered(str(directory), saved)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Row]:
    return (_row(f"{name}, row {number}", cells) for number, cells in enumerate(rows, 1))


def _row(place: str, cells: Any) -> Row:
    if not isinstance(cells, dict):
        raise ValueError(f'{place}: is no object: write it as {{"question": "...", ...}}')
    return Row(place, cells)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _parsed(place: str, text: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}: {remedy}") from error


def _package(module: str, source: str) -> Any:
    """A module of the optional extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{source}: reading it needs the package 'datasets': pip install 'rectify[math]', or "
            "set the field 'source' to a .jsonl or .json file"
        ) from error
