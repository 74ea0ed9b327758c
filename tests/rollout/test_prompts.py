"""Prompt sets: the embedded digits, and files whose mistakes are placed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from rollout.draws import Prompt
from rollout.policies.wan import WanPolicy
from rollout.prompts import DIRECTIONS, DigitPrompts, FilePrompts, PromptsConfig


def write(directory: Path, text: str, name: str = "prompts.jsonl") -> FilePrompts:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return FilePrompts(path=path)


def test_the_embedded_policy_understands_every_digit_prompt(base_policy: WanPolicy):
    prompts = DigitPrompts().load()
    conditions = base_policy.encode([prompt.text for prompt in prompts])
    assert conditions[:, 0].argmax(1).tolist() == [prompt.columns["digit"] for prompt in prompts]
    assert conditions.sum() == 10


def test_moving_prompts_are_all_pairs_with_ids_of_their_own():
    prompts = DigitPrompts(moving=True).load()
    pairs = {(prompt.columns["digit"], prompt.columns["direction"]) for prompt in prompts}
    assert pairs == {(digit, way) for digit in range(10) for way in DIRECTIONS}
    assert len({prompt.id for prompt in prompts}) == 40
    assert all(
        prompt.text == f"a handwritten {prompt.columns['digit']} moving "
        f"{prompt.columns['direction']}"
        for prompt in prompts
    )


def test_text_files_hold_a_prompt_a_line(tmp_path: Path):
    prompts = write(tmp_path, "a red fox\n\n  ünïcode 狐 \r\n", "p.txt").load()
    assert prompts == [Prompt("1", "a red fox", {}), Prompt("3", "ünïcode 狐", {})]


def test_jsonl_files_hold_ids_and_columns(tmp_path: Path):
    rows = [
        {"prompt": "a 3", "id": "three", "digit": 3},
        {"prompt": "a 4", "digit": 4, "tags": ["x"]},
        {"prompt": "a 5", "id": 17},
    ]
    prompts = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n").load()
    assert prompts == [
        Prompt("three", "a 3", {"digit": 3}),
        Prompt("2", "a 4", {"digit": 4, "tags": ["x"]}),
        Prompt("17", "a 5", {}),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt" "b"}\n', r"prompts\.jsonl:2:11: not JSON"),
        ('\n["a"]\n', r"prompts\.jsonl:2: each line needs"),
        ('{"text": "a"}\n', r"prompts\.jsonl:1: each line needs"),
        ('{"prompt": 3}\n', r"prompts\.jsonl:1: each line needs"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "prompts 1 and 2 share .*'x'"),
        ('{"prompt": "a", "id": "2"}\n{"prompt": "b"}\n', "prompts 1 and 2 share the id '2'"),
        (" \n\n", "holds no prompt"),
        ("", "holds no prompt"),
    ],
)
def test_mistakes_in_a_file_are_placed(tmp_path: Path, text: str, words: str):
    with pytest.raises(ValueError, match=words):
        write(tmp_path, text).load()


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read"):
        FilePrompts(path=tmp_path / "absent.txt").load()
    with pytest.raises(ValueError, match=r"from \.txt or \.jsonl"):
        FilePrompts(path=tmp_path / "prompts.csv").load()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt: cannot be read"):
        FilePrompts(path=tmp_path / "latin.txt").load()
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt: cannot be read"):
        FilePrompts(path=tmp_path / "folder.txt").load()


def test_a_json_string_may_hold_any_separator_but_a_line_feed(tmp_path: Path):
    prompts = write(tmp_path, '{"prompt": "one\u2028line"}\n{"prompt": "two\u0085too"}\n').load()
    assert [prompt.text for prompt in prompts] == ["one\u2028line", "two\u0085too"]


def test_the_kind_chooses_the_prompts():
    adapter: TypeAdapter[DigitPrompts | FilePrompts] = TypeAdapter(PromptsConfig)
    assert adapter.validate_python({"kind": "digits", "moving": True}) == DigitPrompts(moving=True)
    chosen = adapter.validate_python({"kind": "file", "path": "a.txt"})
    assert chosen == FilePrompts(path=Path("a.txt"))
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "digits", "path": "a.txt"})
