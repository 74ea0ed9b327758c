"""Math prompt sets: real small files in every layout, ids, placed mistakes, boxes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollout.draws import Prompt
from rollout.math_prompts import TEMPLATE, MathPrompts, last_boxed

GSM8K: list[dict[str, Any]] = [
    {"question": "Two hens lay 3 eggs each. How many?", "answer": "2*3 = <<2*3=6>>6\n#### 6"},
    {"question": "A car costs half of $2,500,000.", "answer": "It is #### so:\n#### $1,250,000 "},
    {"question": "What {is} -3 times 4?", "answer": "#### -12\n"},
]
GSM8K_ANSWERS = ["6", "1250000", "-12"]
MATH: list[dict[str, Any]] = [
    {"problem": "Half?", "solution": r"First $\boxed{2}$, so $\boxed{\frac{1}{2}}$.", "level": "1"},
    {"problem": "Set?", "solution": r"$\boxed{\left\{ x : x^{2} = \sqrt{y} \right.}$"},
    {"problem": "Nine?", "solution": r"The answer is $\boxed 9$, as \(x\) costs $9$."},
    {
        "problem": "Own?",
        "solution": "no box",
        "answer": r" \text{(A)} ",
        "unique_id": "test/1.json",
    },
    {"problem": "Number?", "answer": 42, "id": 7},
    {"problem": "Framed?", "solution": r"\fbox{\boxed {3 }}", "answer": None},
]
NESTED = r"\left\{ x : x^{2} = \sqrt{y} \right."
MATH_ANSWERS = [r"\frac{1}{2}", NESTED, "9", r"\text{(A)}", "42", "3"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def gsm8k(source: Path, **fields: Any) -> list[Prompt]:
    return MathPrompts(dataset="gsm8k", source=str(source), **fields).load()


def math(source: Path, **fields: Any) -> list[Prompt]:
    return MathPrompts(dataset="math", source=str(source), **fields).load()


def answers(prompts: list[Prompt]) -> list[str]:
    return [prompt.columns["answer"] for prompt in prompts]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet"])
def test_gsm8k_rows_give_the_number_after_the_last_mark(tmp_path: Path, name: str):
    prompts = gsm8k(write(tmp_path / name, GSM8K))
    assert [prompt.columns for prompt in prompts] == [{"answer": a} for a in GSM8K_ANSWERS]
    for prompt, row in zip(prompts, GSM8K, strict=True):
        assert prompt.text.endswith(f"Problem: {row['question']}")
        assert "\\boxed{your answer}" in prompt.text and "{form}" not in prompt.text
        # One place to fill for the reasoning, one for the answer, each also named in the text.
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        assert [prompt.text.count(tag) for tag in tags] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_math_rows_give_their_own_answer_or_what_the_solution_boxes_last(tmp_path: Path, name: str):
    prompts = math(write(tmp_path / name, MATH))
    assert answers(prompts) == MATH_ANSWERS
    assert [prompts[3].id, prompts[4].id] == ["test/1.json", "7"]
    assert prompts[0].text == TEMPLATE.format(
        form="the final answer, in LaTeX and simplified", question="Half?"
    )


@pytest.mark.parametrize(
    ("tail", "answer"),
    [("€12,345,678.50", "12345678.50"), (r"\$7", "7"), ("5 $", "5"), ("1,2\nas asked", "1,2")],
)
def test_final_numbers_lose_currency_and_thousands_separators(
    tmp_path: Path, tail: str, answer: str
):
    rows = [{"question": "q", "answer": f"1 #### 2 #### {tail}"}]
    assert answers(gsm8k(write(tmp_path / "a.jsonl", rows))) == [answer]


def test_a_hub_clone_is_read_by_subset_and_split(tmp_path: Path):
    write(tmp_path / "main" / "train-00000-of-00002.parquet", GSM8K[:1])
    write(tmp_path / "main" / "train-00001-of-00002.parquet", GSM8K[1:2])
    write(tmp_path / "main" / "test-00000-of-00001.parquet", GSM8K[2:])
    write(tmp_path / "socratic" / "train-00000-of-00001.parquet", [GSM8K[0], GSM8K[0]])
    write(tmp_path / ".cache" / "train.jsonl", GSM8K)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert answers(gsm8k(tmp_path, subset="main")) == GSM8K_ANSWERS[:2]
    assert answers(gsm8k(tmp_path, subset="main", split="test")) == GSM8K_ANSWERS[2:]
    assert answers(gsm8k(tmp_path, subset="socratic")) == ["6", "6"]
    with pytest.raises(ValueError, match="no folder 'other': remove or correct the field 'subset'"):
        gsm8k(tmp_path, subset="other")
    with pytest.raises(ValueError, match=r"split 'validation', only for train, test: .*'split'"):
        gsm8k(tmp_path, split="validation")


def test_the_release_of_math_has_one_object_a_file(tmp_path: Path):
    for split, kind, number in (("train", "algebra", 0), ("train", "number", 2), ("test", "a", 1)):
        path = tmp_path / split / kind / "1.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(MATH[number]))
    assert answers(math(tmp_path)) == [MATH_ANSWERS[0], MATH_ANSWERS[2]]
    assert answers(math(tmp_path, split="test")) == [MATH_ANSWERS[1]]
    assert answers(math(tmp_path / "test", split="train")) == [MATH_ANSWERS[1]]


def test_saved_datasets_are_read_with_and_without_splits(tmp_path: Path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(GSM8K[:2]), Dataset.from_list(GSM8K[2:])
    train.save_to_disk(tmp_path / "one")
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "several")
    assert answers(gsm8k(tmp_path / "one")) == GSM8K_ANSWERS[:2]
    assert answers(gsm8k(tmp_path / "several")) == GSM8K_ANSWERS[:2]
    assert answers(gsm8k(tmp_path / "several", split="test")) == GSM8K_ANSWERS[2:]
    with pytest.raises(ValueError, match="no split 'dev': set the field 'split' to one of train, "):
        gsm8k(tmp_path / "several", split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="one: cannot be read as a dataset of save_to_disk"):
        gsm8k(tmp_path / "one")


def test_ids_do_not_depend_on_the_order_of_the_rows_or_the_file_type(tmp_path: Path):
    rows = [*GSM8K, {"question": f" {GSM8K[0]['question']} ", "answer": "#### 6"}]
    forward = gsm8k(write(tmp_path / "a.jsonl", rows))
    backward = gsm8k(write(tmp_path / "b.parquet", rows[::-1]))
    assert {p.id: p for p in forward} == {p.id: p for p in backward}
    assert len({p.id for p in forward}) == 4
    assert forward[3].id == f"{forward[0].id}-2"
    assert [p.id for p in gsm8k(tmp_path / "a.jsonl", limit=2)] == [p.id for p in forward[:2]]
    # Runs are compared by prompt id: blake2b of 64 bits, as `b2sum -l 64` prints it.
    assert forward[0].id == "32c51dfdb9fad34f"


def test_a_limit_stops_before_later_rows_are_read(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [*GSM8K, {"broken": 1}])
    assert len(gsm8k(path, limit=3)) == 3
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        gsm8k(path, limit=4)


@pytest.mark.parametrize(
    ("dataset", "text", "words"),
    [
        ("gsm8k", '{"question": "q"}', r"a\.jsonl:1: key 'answer' is missing .*keys here: quest"),
        ("gsm8k", '\n{"problem": "q"}', r"a\.jsonl:2: key 'question' .*the field 'dataset': gsm8k"),
        ("gsm8k", '{"question": "q", "answer": "6"}', r":1: key 'answer' has no final answer: end"),
        ("gsm8k", '{"question": "q", "answer": "6 ####\\n"}', r":1: key 'answer' has no final"),
        ("gsm8k", '{"question": "q", "answer": "#### $"}', r":1: key 'answer' has no final"),
        ("gsm8k", '{"question": " ", "answer": "#### 1"}', r":1: key 'question' is missing"),
        ("gsm8k", '{"question": "\\ud800", "answer": "#### 1"}', r":1: key 'question' .*no valid"),
        ("gsm8k", '{"question": true, "answer": "#### 1"}', r":1: key 'question'"),
        ("gsm8k", '{"question": "q", "answer": "#### 1", "id": [1]}', r":1: key 'id' is missing"),
        ("gsm8k", '["q"]', r"a\.jsonl:1: is no object"),
        ("gsm8k", '\n{"question" 3}', r"a\.jsonl:2: not JSON: .*a line is one object"),
        ("gsm8k", "\n \n", r"a\.jsonl: holds no row: correct the field 'source' or 'split'"),
        ("math", '{"problem": "q"}', r":1: key 'solution' is missing"),
        ("math", '{"problem": "q", "answer": [1]}', r":1: key 'answer' is missing or holds no"),
        ("math", '{"problem": "q", "solution": "it is 5"}', r":1: key 'solution' has no .*boxed"),
        ("math", '{"problem": "q", "solution": "$\\\\boxed{5$"}', r":1: key 'solution' has no"),
        (
            "math",
            '{"problem": "q", "solution": "\\\\boxed{ }"}',
            r":1: key 'solution' has no .*'an",
        ),
        ("math", '{"problem": "q", "solution": "\\\\boxed 5"}', r":1: key 'solution' has no"),
    ],
)
def test_mistakes_in_a_row_are_placed(tmp_path: Path, dataset: Any, text: str, words: str):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        MathPrompts(dataset=dataset, source=str(path)).load()


def test_rows_of_lists_and_tables_are_counted_from_one(tmp_path: Path):
    rows = [{"question": "q", "answer": "#### 1"}, {"question": "r", "answer": "2"}]
    for name in ("a.json", "a.parquet"):
        with pytest.raises(ValueError, match=rf"{name}, row 2: key 'answer'"):
            gsm8k(write(tmp_path / name, rows))


def test_two_rows_with_one_id_are_both_named(tmp_path: Path):
    rows = [{**row, "id": identity} for row, identity in zip(GSM8K, ("x", "1", 1), strict=True)]
    with pytest.raises(ValueError, match=r"a\.jsonl:3: has the id '1' of .*a\.jsonl:2: make the"):
        gsm8k(write(tmp_path / "a.jsonl", rows))


def test_sources_that_cannot_be_read_are_named_with_a_remedy(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
    (tmp_path / "broken.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "text.json").write_text('"a"')
    (tmp_path / "lines.json").write_text("{}\n{}\n")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "both" / "train.jsonl", GSM8K)
    write(tmp_path / "both" / "train.parquet", GSM8K)
    for name, words in {
        "rows.csv": r"rows\.csv: rows are read from \.jsonl, .*: convert it",
        "latin.jsonl": r"latin\.jsonl: cannot be read as UTF-8",
        "broken.parquet": r"broken\.parquet: cannot be read as parquet",
        "text.json": r"text\.json: is no list: it holds a list of objects",
        "lines.json": r"lines\.json: not JSON: .*name it \.jsonl",
        "none.json": r"none\.json: holds no row",
        "empty": r"empty: holds no file \.jsonl",
        "both": r"both: holds the rows of 'train' as \.jsonl and \.parquet.*: set the field",
    }.items():
        with pytest.raises(ValueError, match=words):
            gsm8k(tmp_path / name)
    with pytest.raises(ValueError, match="no folder 'main'"):
        gsm8k(write(tmp_path / "a.jsonl", GSM8K), subset="main")


@pytest.mark.parametrize(
    "source",
    ["./a", "../a", "/absent", "~/absent", "~nobody-here/x", "a.jsonl", "a/b/c", "a/b/", "a\0b"],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub would be reported as not installed
    with pytest.raises(ValueError, match=r"no such file or directory .*: correct the field"):
        MathPrompts(dataset="gsm8k", source=source).load()


def test_only_what_needs_the_optional_package_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = write(tmp_path / "a.jsonl", GSM8K)
    table = write(tmp_path / "a.parquet", GSM8K)
    write(tmp_path / "saved" / "state.json", [])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert answers(gsm8k(lines)) == GSM8K_ANSWERS
    for source in (table, tmp_path / "saved", Path("AI-MO/NuminaMath-1.5")):
        with pytest.raises(ValueError, match=r"needs the package .*pip install 'rectify\[math\]'"):
            gsm8k(source)


HUB_SCRIPT = """
import json, sys
from rollout.math_prompts import MathPrompts
heavy = [m for m in ("datasets", "pyarrow", "transformers", "math_verify") if m in sys.modules]

import datasets
from datasets.arrow_writer import ArrowWriter
from pathlib import Path
rows = json.loads(sys.argv[1])
folder = Path(datasets.config.HF_DATASETS_CACHE, "openai___gsm8k", "main", "0.0.0", "abc")
folder.mkdir(parents=True)
with ArrowWriter(path=str(folder / "gsm8k-test.arrow")) as writer:
    for row in rows:
        writer.write(row)
    count, _ = writer.finalize()
datasets.DatasetInfo(
    features=datasets.Features.from_arrow_schema(writer.schema), config_name="main",
    builder_name="parquet", dataset_name="gsm8k", version=datasets.Version("0.0.0"),
    splits={"test": {"name": "test", "num_examples": count, "dataset_name": "gsm8k"}},
).write_to_directory(str(folder))

def attempt(source, **fields):
    try:
        prompts = MathPrompts(dataset="gsm8k", source=source, **fields).load()
        return [prompt.columns["answer"] for prompt in prompts]
    except ValueError as error:
        return str(error)

sys.stdout.write(json.dumps([
    heavy,
    attempt("openai/gsm8k", subset="main", split="test"),
    attempt("openai/gsm8k", subset="main", split="train"),
    attempt("openai/absent"),
    attempt("AI-MO/NuminaMath-1.5"),
]))
"""


def test_without_network_the_hub_gives_what_was_downloaded_and_else_a_remedy(tmp_path: Path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    rows = [*GSM8K, {"question": "q", "answer": "#### 5"}]
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(rows)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heavy, cached, no_split, absent, dotted = json.loads(done.stdout)
    assert heavy == []
    assert cached == [*GSM8K_ANSWERS, "5"]
    for message in (no_split, absent, dotted):
        assert re.match(r"(openai|AI-MO)/\S+: is no local path and cannot be read from", message)
        assert "HF_HUB_OFFLINE=1" in message and "local .jsonl, .json or .parquet" in message
    assert "train" in no_split.partition("The reason given: ")[2]
    assert "Couldn't reach 'openai/absent'" in absent


def test_fields_are_checked_before_anything_is_read():
    with pytest.raises(ValidationError):
        MathPrompts.model_validate({"dataset": "gsm8k"})
    for field, value in {"source": "", "limit": 0, "split": "train[:9]", "dataset": "aime"}.items():
        with pytest.raises(ValidationError, match=field):
            MathPrompts.model_validate({"dataset": "math", "source": "a.jsonl", field: value})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1}", r"\left\{ 1"),
        (r"x \\\boxed{5}", "5"),
        (r"\boxed{a \\}", r"a \\"),
        ("\\boxed\n {5}", "5"),
        (r"\boxed{}", ""),
        (r"\fbox{3}", "3"),
        (r"\boxedtext{3}", None),
        (r"\boxed 3", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box(text: str, content: str | None):
    assert last_boxed(text) == content


def boxed_by_trial(text: str) -> str | None:
    """The same by trying every box from the last one on: quadratic, but plain to see."""
    tokens: list[str] = []
    while text:
        size = 7 if text.startswith("\\boxed{") else 2 if text[0] == "\\" else 1
        tokens.append(text[:size])
        text = text[size:]
    for start in reversed([i for i, token in enumerate(tokens) if token == "\\boxed{"]):
        depth = 1
        for end in range(start + 1, len(tokens)):
            depth += (tokens[end] in ("{", "\\boxed{")) - (tokens[end] == "}")
            if depth == 0:
                return "".join(tokens[start + 1 : end])
    return None


def test_boxes_agree_with_a_plain_search_on_random_nests():
    generator = random.Random(0)
    parts = ["\\boxed{", "{", "}", "}", "\\{", "\\}", "\\\\", "x"]
    found = 0
    for _ in range(3000):
        text = "".join(generator.choices(parts, k=generator.randrange(14)))
        assert last_boxed(text) == boxed_by_trial(text), text
        found += last_boxed(text) is not None
    assert 500 < found < 2500


def test_adversarial_braces_take_bounded_time():
    many = 100_000
    started = time.monotonic()
    assert last_boxed("\\boxed{" * many) is None
    assert last_boxed("\\boxed{" * many + "}" * many) == ""
    assert last_boxed("\\boxed{1}" + "{" * many) == "1"
    assert last_boxed("\\boxed{" + "{" * many + "}" * many + "}") == "{" * many + "}" * many
    assert last_boxed("}" * many + "\\" * many + "\\boxed{1}") == "1"
    assert last_boxed("\\boxed" + " " * many) is None
    assert last_boxed(("\\boxed" + " " * 10) * many) is None
    # About half a second in all; a search of each box anew would take hours.
    assert time.monotonic() - started < 20
