"""GSM8K and MATH as prompt sets: problems with a known final answer."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Literal

from pydantic import Field

from rollout.draws import Prompt
from rollout.rows import SURROGATE, Row, RowSource

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

# A box that opens, any other command or escaped character, a brace: each character is read once.
LATEX = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
CURRENCY = re.compile(r"\\?[$€£¥]")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class MathPrompts(RowSource, frozen=True, extra="forbid"):
    """Math problems with a known final answer, in the layout of GSM8K or of MATH."""

    kind: Literal["math"] = "math"
    dataset: Literal["gsm8k", "math"] = Field(
        description="Layout of the rows and wording: question/answer, or problem/solution."
    )

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
        for row in islice(self.rows(), self.limit):
            question, answer = read(row)
            text = TEMPLATE.format(form=form, question=question)
            prompts.append(Prompt(ids.take(row, question), text, {"answer": answer}))
        if not prompts:
            raise ValueError(f"{self.source}: holds no row: correct the field 'source' or 'split'")
        return prompts


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
