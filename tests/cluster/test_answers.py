"""``rectify answer`` against a real server with a small model: what it writes, asks again, refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from cluster import answers
from cluster.answers import AnswerFile, Question, VllmTeacher, collect, questions
from cluster.cli import app
from recipes.check import check
from recipes.errors import RecipeError
from recipes.schema import recipe_type
from recipes.source import load
from rewards import judge_engines
from rewards.environment import python_of
from rewards.judge_engines import Answer, Conversation, Sampling
from rollout.prompts import FilePrompts
from rollout.sudoku import SudokuPrompts
from tests.rewards.judge_server import (
    JudgeModel,
    JudgeServer,
    letter_tokenizer,
    serving,
    write_llama,
)

KEY = "sk-SECRET-4711"
TEXTS = ["ccc", "a cat sat", "7 * 8", "count to five", "zzz", "hello"]
IDS = [f"q{number}" for number in range(len(TEXTS))]
TOKENS = 12
ENDLESS = "dog"


@pytest.fixture(scope="module")
def model() -> JudgeModel:
    """One that mostly comes to an end."""
    made = JudgeModel()
    with torch.no_grad():
        made.network.lm_head.bias[made.tokenizer.eos_token_id] += 8
    return made


@pytest.fixture
def server(model: JudgeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr(judge_engines, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(model) as running:
        yield running


def write_prompts(directory: Path, texts: Sequence[str], **columns: Any) -> Path:
    path = directory / "prompts.jsonl"
    rows = [{"prompt": text, "id": f"q{n}", "gold": n, **columns} for n, text in enumerate(texts)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path, TEXTS)


def rectify(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["answer", *arguments, "--max-tokens", str(TOKENS)])


def ask(server: JudgeServer, prompts: Path, *more: str) -> Result:
    to = ["--out", str(prompts.with_name("answers.jsonl")), "--model", "tiny"]
    return rectify(str(prompts), *to, "--endpoint", server.url, *more)


def rows(prompts: Path) -> list[dict[str, Any]]:
    lines = prompts.with_name("answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def asked(server: JudgeServer) -> list[str]:
    return [body["messages"][-1]["content"] for _, body in server.seen]


def own_answer(model: JudgeModel, text: str) -> str:
    told = [{"role": "user", "content": text}]
    return model.tokenizer.decode(model.answer(told, None, TOKENS)[0])


def test_rows_are_the_model_s_answers_in_the_prompts_order(server: JudgeServer, prompts: Path):
    server.faults = {TEXTS[0]: [0.4]}
    result = ask(server, prompts, "--concurrency", "3")
    assert result.exit_code == 0 and "6 answers, 0 of them from before" in result.stdout
    wanted = [own_answer(server.model, text) for text in TEXTS]
    assert rows(prompts) == [
        {"prompt": text, "id": f"q{n}", "answer": answer, "teacher": "tiny", "gold": n}
        for n, (text, answer) in enumerate(zip(TEXTS, wanted, strict=True))
    ]
    assert len(set(wanted)) == 6 and "" not in wanted
    last = server.finished[-1]["messages"][0]["content"]
    assert server.busiest == 3 and last != TEXTS[-1], "the order would have been the prompts'"
    body = server.seen[0][1]
    assert set(body) == {"model", "temperature", "max_tokens", "messages"}


def test_its_file_is_one_of_prompts_with_the_answers_as_columns(server: JudgeServer, prompts: Path):
    assert ask(server, prompts, "--column", "solution").exit_code == 0
    loaded = FilePrompts(path=prompts.with_name("answers.jsonl")).load()
    assert [(p.id, p.text) for p in loaded] == list(zip(IDS, TEXTS, strict=True))
    assert [set(p.columns) for p in loaded] == [{"solution", "teacher", "gold"}] * 6
    assert loaded[4].columns["solution"] == own_answer(server.model, "zzz")


def test_a_system_message_comes_first(server: JudgeServer, prompts: Path):
    ask(server, prompts, "--system", "Be kind.")
    system = {"role": "system", "content": "Be kind."}
    assert all(body["messages"][0] == system for _, body in server.seen)
    assert sorted(asked(server)) == sorted(TEXTS)


def test_what_failed_is_named_and_only_that_is_asked_for_again(server: JudgeServer, prompts: Path):
    server.faults = {"zzz": [400], "ccc": [400]}
    result = ask(server, prompts)
    assert result.exit_code == 1
    assert "prompt 'q4': " in result.stderr and "status 400" in result.stderr
    assert "2 answers are missing (2 failed)" in result.stderr
    before = rows(prompts)
    assert [row["id"] for row in before] == ["q1", "q2", "q3", "q5"]
    server.seen.clear()
    result = ask(server, prompts)
    assert result.exit_code == 0 and "6 answers, 4 of them from before" in result.stdout
    assert sorted(asked(server)) == ["ccc", "zzz"]
    assert [row["id"] for row in rows(prompts)] == IDS
    assert [row for row in rows(prompts) if row["id"] not in ("q0", "q4")] == before


@pytest.mark.parametrize(("missing", "again"), [(0, 0), (1, 0), (2, 1), (30, 1), (10**6, 6)])
def test_a_line_that_was_not_finished_is_repaired(
    server: JudgeServer, prompts: Path, missing: int, again: int
):
    assert ask(server, prompts).exit_code == 0
    path = prompts.with_name("answers.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - missing, 0)])
    server.seen.clear()
    assert ask(server, prompts).exit_code == 0
    assert len(server.seen) == again and path.read_bytes() == whole


@pytest.mark.parametrize("torn", [b"{", b'{"prompt": "z\xc3'])
def test_the_beginning_of_a_row_is_taken_back(server: JudgeServer, prompts: Path, torn: bytes):
    assert ask(server, prompts).exit_code == 0
    path = prompts.with_name("answers.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert ask(server, prompts).exit_code == 0
    assert len(server.seen) == 6 and path.read_bytes() == whole


def test_rows_are_there_when_a_run_is_interrupted(prompts: Path):
    """And the next one puts them in order."""
    wanted = questions(FilePrompts(path=prompts).load(), 1, "answer")
    path = prompts.with_name("answers.jsonl")

    def interrupted(
        asked: Sequence[Question], told: list[Conversation]
    ) -> Iterator[tuple[int, Answer | ValueError]]:
        for place in (4, 1):
            yield place, Answer("é", cut=False, tokens=())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(interrupted, AnswerFile(path, "answer"), wanted, None, "t", str)
    assert [row["id"] for row in rows(prompts)] == ["q4", "q1"]

    def rest(
        asked: Sequence[Question], told: list[Conversation]
    ) -> Iterator[tuple[int, Answer | ValueError]]:
        assert [question.id for question in asked] == ["q0", "q2", "q3", "q5"]
        yield from ((place, Answer("x", cut=False, tokens=())) for place in range(len(told)))

    outcome = collect(rest, AnswerFile(path, "answer"), wanted, None, "t", str)
    assert (outcome.kept, outcome.written, outcome.missing) == (2, 4, 0)
    assert [row["answer"] for row in rows(prompts)] == ["x", "é", "x", "x", "é", "x"]


def test_more_samples_are_more_rows_and_the_first_are_kept(server: JudgeServer, prompts: Path):
    assert ask(server, prompts).exit_code == 0
    server.seen.clear()
    assert ask(server, prompts, "--samples", "3", "--temperature", "0.5").exit_code == 0
    assert sorted(asked(server)) == sorted(TEXTS * 2)
    assert server.seen[0][1]["temperature"] == 0.5
    assert [row["id"] for row in rows(prompts)][:4] == ["q0", "q0#2", "q0#3", "q1"]
    assert len(FilePrompts(path=prompts.with_name("answers.jsonl")).load()) == 18


def test_a_cut_answer_is_a_failure_and_not_written(server: JudgeServer, tmp_path: Path):
    prompts = write_prompts(tmp_path, ["ccc", ENDLESS])
    result = ask(server, prompts)
    assert result.exit_code == 1 and "prompt 'q1': the answer was cut" in result.stderr
    assert "--max-tokens" in result.stderr and [row["id"] for row in rows(prompts)] == ["q0"]


def test_the_key_is_sent_and_shown_nowhere(
    server: JudgeServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server.key = "another"
    refused = ask(server, prompts, "--api-key-env", "TEACHER_KEY")
    assert refused.exit_code == 1 and "status 401" in refused.stderr and "***" in refused.stderr
    server.key = KEY
    assert ask(server, prompts, "--api-key-env", "TEACHER_KEY").exit_code == 0
    assert {header for header, _ in server.seen} == {f"Bearer {KEY}"}
    written = prompts.with_name("answers.jsonl").read_text()
    assert KEY not in refused.output + refused.stderr + written


def test_many_failures_in_a_row_end_it(
    server: JudgeServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "FAILURES_IN_A_ROW", 2)
    server.key = KEY
    server.faults = {text: [0.2] for text in TEXTS}
    result = ask(server, prompts, "--concurrency", "1")
    assert result.exit_code == 1 and "6 answers are missing (2 failed, 2 one after" in result.stderr
    assert 2 <= len(server.seen) < 6


def test_a_recipe_s_prompts_are_those_that_it_trains_on(server: JudgeServer, tmp_path: Path):
    to = tmp_path / "answers.jsonl"
    sets = ["--set", "prompts.count=2", "--set", "prompts.seed=7"]
    given = ["--model", "tiny", "--endpoint", server.url, *sets]
    rectify("sudoku/sft", "--out", str(to), *given)
    wanted = [prompt.text for prompt in SudokuPrompts(count=2, seed=7).load()]
    assert sorted(asked(server)) == sorted(wanted)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--vllm"], "one of them"),
        (["--endpoint", "localhost:8000"], "not a base URL"),
        (["--gpus", "1"], "--gpus and --context are for --vllm"),
        (["--api-key-env", "TEACHER_NO_KEY"], "TEACHER_NO_KEY is not set"),
        (["--samples", "2"], "2 times the same: give --temperature"),
        (["--column", "gold"], "prompt 'q0' has a column 'gold' of its own"),
        (["--column", "completions"], "name another"),
        (["--out", "answers.txt"], "name it so"),
        (
            ["--out", "/dev/null/answers.jsonl"],
            "--out /dev/null/answers.jsonl: File exists: /dev/null",
        ),
        (["--set", "seed=1"], "--set changes a recipe"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_asked(
    server: JudgeServer, prompts: Path, more: list[str], words: str
):
    result = ask(server, prompts, *more)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert server.seen == [] and not prompts.with_name("answers.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no row\n", "answers.jsonl:1: is not JSON"),
        ("a text without an end of line", "answers.jsonl:1: is not JSON"),
        ('{"prompt": "ccc", "id": "q1"}\n{"prompt": "c', "is no answer with the keys"),
        ('{"prompt": "ccc", "id": "q0", "teacher": "t"}\n', "is no answer with the keys"),
        (
            '{"prompt": "cc", "id": "q0", "teacher": "t", "answer": "x"}',
            "id 'q0' answers no prompt",
        ),
        (
            '{"prompt": "ccc", "id": "z", "teacher": "t", "answer": "x"}\n',
            "id 'z' answers no prompt",
        ),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    server: JudgeServer, prompts: Path, line: str, words: str
):
    path = prompts.with_name("answers.jsonl")
    path.write_text(line)
    result = ask(server, prompts)
    assert result.exit_code == 2 and words in result.stderr
    assert server.seen == [] and path.read_text() == line


@pytest.mark.parametrize("source", ["nowhere.jsonl", "digits/nowhere"])
def test_prompts_that_are_not_there_are_one_message(server: JudgeServer, source: str):
    result = rectify(source, "--out", "a.jsonl", "--model", "m", "--endpoint", server.url)
    assert result.exit_code == 2 and source in result.stderr


def test_the_recipe_at_full_size_wants_the_file_and_the_column(tmp_path: Path):
    path = write_prompts(tmp_path, ["1 + 1"], answer="2", teacher="t", solution="\\boxed{2}")

    def checked(*more: str) -> str:
        sets = [f"prompts.path={path}", *more]
        try:
            check(load(Path("llada-8b/gsm8k_sft"), recipe_type, sets), 8)
        except RecipeError as error:
            return str(error)
        return ""

    assert checked() == ""
    assert "has no column 'hint'" in checked("rl.completion='{hint}'")
    gone = checked("prompts.path=gone.jsonl")
    assert "prompts.path: gone.jsonl: cannot be read" in gone and len(gone.splitlines()) == 1


@pytest.mark.slow
def test_vllm_answers_as_transformers_does_and_a_prompt_that_is_too_long_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if python_of("vllm-cpu") is None:
        pytest.skip("no environment with vLLM is ready: run 'rectify env create vllm-cpu'")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    network, tokenizer = write_llama(tmp_path), letter_tokenizer()
    texts = [*TEXTS[:2], "x" * 300, *TEXTS[2:]]
    prompts = FilePrompts(path=write_prompts(tmp_path, texts)).load()
    wanted = questions(prompts, 1, "answer")
    file = AnswerFile(tmp_path / "answers.jsonl", "answer")
    options: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"}
    teacher = VllmTeacher(str(tmp_path), Sampling(None, 0.0, 150, plain=True), options, "vllm-cpu")
    found = dict(teacher.ask(wanted, [answers.conversation(p, None) for p in prompts]))
    assert isinstance(found[2], ValueError) and len(found) == 7
    for place in (0, 1, 3, 4, 5, 6):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": texts[place]}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        made = network.generate(**ids, do_sample=False, max_new_tokens=150)[0]
        text = tokenizer.decode(made[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = found[place]
        assert isinstance(answer, Answer) and answer.text == text
    outcome = collect(teacher.ask, file, wanted, None, "t", str)
    assert "q2" in outcome.failures
    assert outcome.written == len(file.rows) == 7 - len(outcome.failures)


@pytest.mark.slow
def test_vllm_draws_by_the_question_s_own_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if python_of("vllm-cpu") is None:
        pytest.skip("no environment with vLLM is ready: run 'rectify env create vllm-cpu'")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_llama(tmp_path)
    (prompt,) = FilePrompts(path=write_prompts(tmp_path, ["zzz"])).load()
    options: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"}
    teacher = VllmTeacher(str(tmp_path), Sampling(None, 2.0, 40, plain=True), options, "vllm-cpu")
    wanted = questions([prompt], 3, "answer")
    told = [answers.conversation(prompt, None)] * 3

    def texts(asked: Sequence[Question]) -> list[str]:
        found = dict(teacher.ask(asked, told[: len(asked)]))
        return [answer.text for answer in found.values() if isinstance(answer, Answer)]

    drawn = texts(wanted)
    assert len(set(drawn)) == 3
    assert texts(wanted[1:]) == drawn[1:]
