"""A file of a teacher's answers, row by row: prompts in, and out what ``prompts: {kind: file}`` reads.

A row has ``prompt``, ``id``, the answer in a column of its own, ``teacher`` and the prompt's columns.
It is written when its answer comes; when all have come the rows are put into the prompts' order. What
is in the file is never asked for again, so a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from recipes.schema import recipe_type
from recipes.source import load
from rewards.environment import missing, python_of, variables
from rewards.judge_engines import Answer, Conversation, Sampling
from rollout.draws import Prompt, keyed_seed
from rollout.prompts import REWARD_ARGUMENTS, DatasetPrompts, FilePrompts
from rollout.rows import SUFFIXES, SURROGATE

TEACHER = "teacher"
BEGINNING = b'{"prompt": '  # of every row that is written here
OWN = frozenset({"prompt", "id", TEACHER})
# So many failures one after the other are the teacher's, not the prompts': the rest is not asked.
FAILURES_IN_A_ROW = 50
TOGETHER = 64  # conversations that vLLM gets in one call
LONGEST = 3600.0  # seconds that such a call, or loading the model, may take


class AnswersError(ValueError):
    """Prompts or a file that cannot be used; the message has the place and the remedy."""


class TeacherFailed(RuntimeError):
    """The teacher cannot be started, or ended."""


@dataclass(frozen=True)
class Question:
    """One answer that is wanted: ``id`` is that of its row."""

    id: str
    prompt: Prompt
    seed: int


@dataclass
class Outcome:
    """Rows that were there, rows that were written, and why others were not, by id."""

    kept: int
    written: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])
    missing: int = 0


# Questions and their conversations, to the place and answer of each as they come.
Ask = Callable[[Sequence[Question], list[Conversation]], Iterator[tuple[int, Answer | ValueError]]]


def prompts_of(source: Path, overrides: Sequence[str]) -> list[Prompt]:
    """Prompts of a file, of a directory of them, or those that a recipe trains on.

    Raises:
        RecipeError, ValueError: it is none, or cannot be read.
    """
    if source.suffix not in (".txt", *SUFFIXES) and not source.is_dir():
        return load(source, recipe_type, overrides).value.prompts.load()
    if overrides:
        raise AnswersError(f"{source}: --set changes a recipe, and this is a file of prompts")
    if source.is_dir():
        return DatasetPrompts(source=str(source)).load()
    return FilePrompts(path=source).load()


def questions(prompts: Sequence[Prompt], samples: int, column: str) -> list[Question]:
    """``samples`` for each prompt; the first has the prompt's id, the others #2, #3 after it.

    Raises:
        AnswersError: a row could not have all its columns or an id of its own.
    """
    if column in OWN | REWARD_ARGUMENTS:
        raise AnswersError(f"--column {column}: rows have that for something else; name another")
    wanted: dict[str, Question] = {}
    for prompt in prompts:
        taken = sorted({column, *OWN} & prompt.columns.keys())
        if taken:
            remedy = "give --column" if taken[0] == column else "rename it there"
            raise AnswersError(
                f"prompt {prompt.id!r} has a column {taken[0]!r} of its own, which an answer's row "
                f"needs: {remedy}"
            )
        for sample in range(1, samples + 1):
            key = prompt.id if sample == 1 else f"{prompt.id}#{sample}"
            if key in wanted:
                raise AnswersError(f"two answers would have the id {key!r}: rename the prompt")
            # vLLM takes 64 bits with a sign.
            wanted[key] = Question(key, prompt, keyed_seed("answer", key) >> 1)
    return list(wanted.values())


class AnswerFile:
    """Rows of answers by id, in memory and in a .jsonl file."""

    def __init__(self, path: Path, column: str) -> None:
        """What is there is read; nothing is written yet.

        Raises:
            AnswersError: the file is no .jsonl of such rows.
        """
        if path.suffix != ".jsonl":
            raise AnswersError(f"--out {path}: answers are rows of a .jsonl file; name it so")
        self.path, self.column = path, column
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise AnswersError(f"--out {path}: {error.strerror}") from error
        lines = data.split(b"\n")
        # A row that was not written to its end, which ``claim`` takes away.
        last = lines[-1]
        ours = last[: len(BEGINNING)] == BEGINNING[: len(last)]
        torn = lines.pop() if ours and not _is_json(last) else b""
        self.whole = len(data) - len(torn)
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._keep(number, line)

    def expect(self, wanted: Sequence[Question]) -> None:
        """Compare what is there with what is wanted.

        Raises:
            AnswersError: a row answers something else.
        """
        prompts = {question.id: question.prompt.text for question in wanted}
        for key, row in self.rows.items():
            if prompts.get(key) != row["prompt"]:
                raise AnswersError(
                    f"{self.path}: its row with the id {key!r} answers no prompt of these (or an "
                    "earlier text of it): give another --out, or the prompts and --samples it was "
                    "begun with"
                )

    def claim(self) -> None:
        """See that rows can be written, before any is paid for; repair the last line.

        Raises:
            AnswersError: they cannot.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self.whole)
            if self.rows and not self.path.read_bytes().endswith(b"\n"):
                with self.path.open("ab") as file:
                    file.write(b"\n")
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
            raise AnswersError(f"--out {self.path}: {reason}") from error

    def append(self, question: Question, answer: str, teacher: str) -> None:
        """Write one row, to the disk."""
        prompt = question.prompt
        own = {"prompt": prompt.text, "id": question.id, self.column: answer, TEACHER: teacher}
        row = {**own, **prompt.columns}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self.rows[question.id] = row

    def arrange(self, wanted: Sequence[Question]) -> None:
        """Put the rows into the order of ``wanted``, all at once."""
        ordered = [self.rows[q.id] for q in wanted if q.id in self.rows]
        if list(map(id, ordered)) == list(map(id, self.rows.values())):
            return
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(map(_line, ordered)), encoding="utf-8")
        os.replace(part, self.path)

    def _keep(self, number: int, line: bytes) -> None:
        place = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AnswersError(
                f"{place}: is not JSON; remove the line, or name another --out"
            ) from error
        needed = ("prompt", "id", self.column, TEACHER)
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in needed):
            raise AnswersError(
                f"{place}: is no answer with the keys {', '.join(needed)}: give another --out, or "
                "the --column that it was begun with"
            )
        if row["id"] in self.rows:
            raise AnswersError(f"{place}: repeats the id {row['id']!r}; remove one of the lines")
        self.rows[row["id"]] = row


def collect(
    ask: Ask,
    file: AnswerFile,
    wanted: Sequence[Question],
    system: str | None,
    teacher: str,
    report: Callable[[str], object],
) -> Outcome:
    """Ask for what is missing and write it; ``report`` is told after each.

    Raises:
        AnswersError: a column of a prompt cannot be written as JSON, or the file not at all.
        TeacherFailed: see ``VllmTeacher``; what came before is written.
    """
    todo = [question for question in wanted if question.id not in file.rows]
    for question in todo:
        _check_columns(question.prompt)
    file.claim()
    outcome = Outcome(kept=len(file.rows))
    in_a_row = 0
    with closing(ask(todo, [conversation(q.prompt, system) for q in todo])) as answers:  # pyright: ignore[reportArgumentType]
        for place, answer in answers:
            problem = unusable(answer)
            if isinstance(answer, Answer) and problem is None:
                file.append(todo[place], answer.text, teacher)
                outcome.written += 1
                in_a_row = 0
            else:
                outcome.failures[todo[place].id] = str(problem)
                in_a_row += 1
            report(f"{outcome.written} of {len(todo)} answers, {len(outcome.failures)} failed")
            if in_a_row == FAILURES_IN_A_ROW:
                break
    file.arrange(wanted)
    outcome.missing = len(wanted) - len(file.rows)
    return outcome


def conversation(prompt: Prompt, system: str | None) -> Conversation:
    """What the teacher is told."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt.text}]


def unusable(answer: Answer | ValueError) -> str | None:
    """Why nothing can be learnt from an answer; None if something can."""
    if isinstance(answer, ValueError):
        return str(answer)
    if answer.cut:
        return "the answer was cut at its longest: raise --max-tokens"
    if not answer.text.strip():
        return "the answer is empty"
    return "the answer is no valid text" if SURROGATE.search(answer.text) else None


class VllmTeacher:
    """vLLM in a child process in an environment of its own; it ends with this object."""

    def __init__(
        self, model: str, sampling: Sampling, options: dict[str, Any], environment: str
    ) -> None:
        """Returns when the model is loaded; ``options`` are ``vllm.LLM``'s.

        Raises:
            AnswersError: the environment is not here. TeacherFailed: the model cannot be loaded.
        """
        python = python_of(environment)
        if python is None:
            raise AnswersError(f"--vllm: {missing(environment)}")
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        ours, theirs = Pipe()
        self.connection: Any = ours
        self.process = subprocess.Popen(
            [str(python), "-P", "-m", "rewards.judge_engines", str(theirs.fileno())],
            env={**os.environ, **variables(threads)},
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        started = self._said((model, sampling.temperature, sampling.max_tokens, options))
        if isinstance(started, ValueError):
            raise TeacherFailed(f"vLLM does not take the model {model}: {started}")

    def ask(
        self, asked: Sequence[Question], conversations: list[Conversation]
    ) -> Iterator[tuple[int, Answer | ValueError]]:
        """See ``Ask``; one that vLLM refuses costs itself alone.

        Raises:
            TeacherFailed: the process failed, or ended.
        """
        waiting = [range(i, min(i + TOGETHER, len(asked))) for i in range(0, len(asked), TOGETHER)]
        waiting.reverse()
        while waiting:
            span = waiting.pop()
            told = [conversations[i] for i in span]
            said = self._said((told, [asked[i].seed for i in span]))
            if not isinstance(said, ValueError):
                yield from zip(span, said, strict=True)
            elif len(span) == 1:
                yield span[0], said
            else:
                half = len(span) // 2
                waiting += [span[half:], span[:half]]

    def _said(self, words: Any) -> list[Answer] | ValueError:
        try:
            self.connection.send(words)
            if not self.connection.poll(LONGEST):
                self.process.kill()
                raise TeacherFailed(f"vLLM gave no answer within {LONGEST:g} s")
            made, error = self.connection.recv()
        except (EOFError, OSError) as lost:
            raise TeacherFailed(f"vLLM's process ended with {self.process.wait()}") from lost
        if error is None:
            return [Answer(text, cut, ()) for text, cut in made]
        name, message = error
        if name in ("ValueError", "VLLMValidationError"):
            return ValueError(message)
        raise TeacherFailed(f"vLLM: {name}: {message}")


def _check_columns(prompt: Prompt) -> None:
    try:
        _line(prompt.columns)
    except (TypeError, ValueError) as error:
        raise AnswersError(
            f"prompt {prompt.id!r}: a column cannot be written as JSON: {error}; leave it out"
        ) from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _line(row: dict[str, Any]) -> str:
    return f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n"
