"""Mathematical answers: whether a completion's final answer is equivalent to the gold one.

math-verify reads both and compares them with SymPy. It bounds its own time by signals, which need
the main thread, and neither those nor a bound on the syntax stop SymPy in the middle of
``9^{9^9}``. So comparisons run in another process, which forks for each: the fork has a limit of
CPU time and of memory that the kernel enforces, and what reaches one counts as wrong. Nothing of
math-verify is imported where the reward itself runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any, Literal, NoReturn

from pydantic import Field

from rewards.answers import CLOSING, OPENING, last_answer
from rewards.contract import RewardFunction, RewardSettings

MAX_COMPLETION = 50_000
MAX_PROSE = 2_000
MAX_ANSWER = 1_000
MAX_BYTES = 2 << 30
MARKUP = "* \n\t"  # around a marked answer it means nothing
SAME = 3  # exit status of a comparison; a crash of Python's is 1
WARM_UP = (
    ("11\\sqrt{5}+11", "11(1+\\sqrt5)", False),
    ("(x+1)^2", "\\frac{1}{2}(2x^2+4x+2)", False),
    ("(1,2]", "so it is $(1, 2]$", True),
)
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
ENVIRONMENT = re.compile(r"\$[^$]+\$|\\\(|\\\[")
NUMBER = re.compile(r"\d[\d.,]*")
WORD = re.compile(r"(?<![\\A-Za-z{])(?!sqrt|root|sin|cos|tan|log|exp|frac)[A-Za-z]{3}|%")


class MathAnswerReward(RewardSettings, frozen=True, extra="forbid"):
    """1 if the final answer is equivalent to the column ``answer`` by math-verify, else 0."""

    kind: Literal["math_answer"] = "math_answer"
    format_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Added where there is exactly one answer block, or without any exactly one "
        "\\boxed{}.",
    )
    time_limit: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="CPU seconds one comparison may take; a longer one counts as wrong.",
    )

    def build(self) -> RewardFunction:
        """The function; its comparing process starts with the first answer to compare."""
        return MathAnswers(self.format_weight, self.time_limit)

    def problem(self) -> str | None:
        """Whether math-verify is installed, without importing it."""
        if importlib.util.find_spec("math_verify") is None:
            return "math-verify is not installed: pip install 'rectify[math]'"
        return None


class MathAnswers:
    """Scores by the column ``answer``: the gold one, LaTeX or a number."""

    def __init__(self, format_weight: float = 0.0, time_limit: float = 1.0) -> None:
        self.format_weight = format_weight
        self.comparer = Comparer(time_limit)

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        answer: list[str | int | float],
        **columns: Any,
    ) -> list[float | None]:
        """Correctness (0 or 1) plus ``format_weight`` where the completion is well formed.

        Raises:
            ValueError: a gold answer is empty, too long, or neither text nor a number; the sample
                is named.
            RuntimeError: the comparing process does not start or was lost.
        """
        right = self._right(completions, answer)
        formed = [self.format_weight * well_formed(text) for text in completions]
        return [float(a) + b for a, b in zip(right, formed, strict=True)]

    def describe_set(
        self,
        prompts: list[str],
        completions: list[str],
        answer: list[str | int | float],
        **columns: Any,
    ) -> dict[str, float]:
        """accuracy, and answered_rate: the share with an answer block or a closed \\boxed{}.

        Raises:
            ValueError: a gold answer is malformed; the sample is named.
            RuntimeError: the comparing process does not start or was lost.
        """
        right = self._right(completions, answer)
        answered = [final_answer(text) is not None for text in completions]
        return {
            "accuracy": sum(right) / len(right),
            "answered_rate": sum(answered) / len(answered),
        }

    def _right(self, completions: list[str], answer: list[str | int | float]) -> list[bool]:
        """Equal pairs, frequent in a group, are compared once."""
        known: dict[tuple[str, str, bool], bool] = {}
        right: list[bool] = []
        for index, (text, given) in enumerate(zip(completions, answer, strict=True)):
            gold, final = _gold(index, given), final_answer(text)
            prose = final is None
            pair = (gold, text[-MAX_PROSE:] if final is None else final, prose)
            if pair not in known:
                known[pair] = self._equivalent(*pair)
            right.append(known[pair])
        return right

    def _equivalent(self, gold: str, answer: str, prose: bool) -> bool:
        if prose:
            return self.comparer.equivalent(gold, answer, prose)
        if len(answer) > MAX_ANSWER or not answer:
            return False
        return _plain(gold) == _plain(answer) or self.comparer.equivalent(gold, answer, prose)


class Comparer:
    """The process that compares, started when it is first needed; safe to share among threads."""

    def __init__(self, time_limit: float) -> None:
        self.time_limit = time_limit
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def equivalent(self, gold: str, answer: str, prose: bool) -> bool:
        """Whether math-verify finds ``answer`` equivalent to ``gold`` within the limits.

        With ``prose`` the answer is text in which math-verify looks for it. Once the process has
        started, this takes at most about ``time_limit`` CPU seconds.

        Raises:
            RuntimeError: the process does not start or was lost; the next call starts another.
        """
        request = json.dumps([gold, answer, prose])
        with self.lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            reply = ""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{request}\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            if not reply:
                raise RuntimeError(f"the math-verify process ended with status {process.wait()}")
        return reply == "1\n"

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            # The same modules and the same order of SymPy's sets wherever a reward is served.
            paths = os.pathsep.join(sys.path)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.math_answer", str(self.time_limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            weakref.finalize(self, _stop, self.process)
        return self.process


def final_answer(text: str) -> str | None:
    """The answer a completion commits to, stripped; None where it marks none.

    The last answer block (the last \\boxed{} in it, if any), else the last \\boxed{} that is
    closed. Looks at the last 50,000 characters.
    """
    text = text[-MAX_COMPLETION:]
    block = last_answer(text)
    inside = text if block is None else block
    boxes = _boxes(inside)
    if boxes:
        start, end = boxes[-1]
        return inside[start:end].strip()
    return block


def well_formed(text: str) -> bool:
    """Whether exactly one answer is marked and not blank, in the last 50,000 characters.

    That is one closed answer block, of any number of lines; or no answer tag and one closed
    \\boxed{}.
    """
    text = text[-MAX_COMPLETION:]
    openings, closings = text.count(OPENING), text.count(CLOSING)
    if openings or closings:
        in_order = text.find(OPENING) < text.find(CLOSING)
        return openings == closings == 1 and in_order and bool(last_answer(text))
    return len(_boxes(text)) == 1 and bool(final_answer(text))


def serve(time_limit: float) -> None:
    """Answer requests on stdin (a line of JSON: gold, answer, prose) by lines 1 or 0 on stdout.

    Raises:
        RuntimeError: a comparison that must hold does not, e.g. for lack of memory.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no timeout
    for gold, answer, prose in WARM_UP:  # what is loaded and cached now is so in every fork
        _same(gold, answer, prose)
    if not _judged(json.dumps(["\\frac{1}{2}", "0.5", False]), time_limit):
        raise RuntimeError("math-verify cannot tell within its limits that 1/2 is 0.5")
    with os.fdopen(os.dup(1), "w") as replies, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        for line in sys.stdin:
            replies.write(f"{int(_judged(line, time_limit))}\n")
            replies.flush()


def _judged(request: str, time_limit: float) -> bool:
    child = os.fork()
    if child == 0:
        _judge(request, time_limit)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == SAME


def _judge(request: str, time_limit: float) -> NoReturn:
    """End this process with the status SAME if a request's answers are equivalent."""
    status = 0
    try:
        # The default action ends the process in the kernel, even within one long C operation.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        signal.setitimer(signal.ITIMER_PROF, time_limit)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = MAX_BYTES if hard == resource.RLIM_INFINITY else min(MAX_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        status = SAME if _same(*json.loads(request)) else 0
    finally:
        os._exit(status)


def _same(gold: str, answer: str, prose: bool) -> bool:
    """math-verify's comparison, without a limit of time."""
    from math_verify import parse, verify

    read = parse(answer, parsing_timeout=None) if prose else _read(answer)  # type: ignore[arg-type]
    return verify(_read(gold), read, timeout_seconds=None)


def _read(answer: str) -> list[Any]:
    """What a marked answer means: its LaTeX; also its only number where it has words or a %."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    answer = answer.strip(MARKUP)
    if ENVIRONMENT.search(answer):
        return parse(answer, parsing_timeout=None)  # type: ignore[arg-type]
    read = parse(
        f"\\boxed{{{answer}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    if WORD.search(answer) and len(NUMBER.findall(answer)) == 1:
        read += parse(answer, [ExprExtractionConfig()], parsing_timeout=None)  # type: ignore[arg-type]
    return read


def _gold(index: int, given: Any) -> str:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return str(given)
    gold = ""
    if isinstance(given, str):
        final = final_answer(given)
        gold = given.strip() if final is None else final
    if not 0 < len(gold) <= MAX_ANSWER:
        raise ValueError(
            f"sample {index}: column 'answer' is {given!r}, not a number or 1 to {MAX_ANSWER} "
            "characters of text"
        )
    return gold


def _plain(answer: str) -> str:
    """As compared before math-verify is asked: without \\text{}, outer dollars, MARKUP."""
    return TEXT.sub(r"\1", answer).strip(f"${MARKUP}")


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where the contents of each closed \\boxed{} begin and end, in the order in which they close.

    One pass over the braces; escaped ones do not count.
    """
    boxes: list[tuple[int, int]] = []
    opened: list[int | None] = []
    for token in BRACES.finditer(text):
        if token.group().startswith("\\boxed"):
            opened.append(token.end())
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened:
            start = opened.pop()
            if start is not None:
                boxes.append((start, token.start()))
    return boxes


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError), process:
        process.kill()


if __name__ == "__main__":
    serve(float(sys.argv[1]))
