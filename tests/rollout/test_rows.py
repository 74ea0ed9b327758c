"""Rows as prompt sets see them: numbered, placed, and plain Python whatever wrote them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollout.rows import Row, RowSource, file_rows, numbered_lines


def rows_of(source: Path, **fields: Any) -> list[Row]:
    return list(RowSource(source=str(source), **fields).rows())


def test_lines_keep_their_numbers_and_only_a_line_feed_ends_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  \ntwo\u2028still two\n", encoding="utf-8")
    assert list(numbered_lines(path)) == [(1, "one"), (4, "two\u2028still two")]


def test_a_row_says_where_it_stands(tmp_path: Path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": {"b": [2]}}\n')
    assert list(file_rows(lines)) == [
        Row(f"{lines}:1", 1, {"a": 1}),
        Row(f"{lines}:3", 3, {"a": {"b": [2]}}),
    ]
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps([{"a": 1}, {"a": None}]))
    assert list(file_rows(whole)) == [
        Row(f"{whole}, row 1", 1, {"a": 1}),
        Row(f"{whole}, row 2", 2, {"a": None}),
    ]


def test_a_later_line_is_read_only_when_it_is_asked_for(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a"\n')
    rows = file_rows(path)
    assert next(rows).cells == {"a": 1}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON: .* at column 5: a line is one"):
        next(rows)


def test_a_saved_dataset_gives_plain_python_whatever_format_it_was_saved_with(tmp_path: Path):
    from datasets import Dataset

    rows = [{"n": [1, 2], "tree": {"x": [{"y": "z"}]}, "f": 0.5}]
    for layout in ("numpy", "torch", "arrow", None):
        Dataset.from_list(rows).with_format(layout).save_to_disk(tmp_path / str(layout))
        (row,) = rows_of(tmp_path / str(layout))
        assert row.cells == rows[0]
        assert type(row.cells["n"]) is list and type(row.cells["f"]) is float


def test_pictures_are_handed_on_as_their_bytes(tmp_path: Path):
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    buffer = io.BytesIO()
    Picture.new("L", (2, 2), 7).save(buffer, "PNG")
    features = Features({"prompt": Value("string"), "image": Image()})
    rows = [{"prompt": "p", "image": {"bytes": buffer.getvalue(), "path": None}}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    assert [row.cells for row in rows_of(tmp_path / "set")] == rows


def test_objects_of_different_keys_come_back_as_objects(tmp_path: Path):
    from datasets import Dataset

    rows = [{"x": [{"a": 1}, {"b": "2"}]}]
    Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(tmp_path / "set")
    assert [row.cells for row in rows_of(tmp_path / "set")] == rows


@pytest.mark.parametrize(
    ("source", "on_hub"),
    [
        ("openai/gsm8k", True),
        ("AI-MO/NuminaMath-1.5", True),
        ("gsm8k", True),
        ("rows.jsonl", False),
        ("./gsm8k", False),
        ("a/b/c", False),
        ("~/gsm8k", False),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(
    source: str, on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert RowSource(source=source).on_hub == on_hub


def test_what_is_here_is_never_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    (tmp_path / "openai" / "gsm8k" / "test.jsonl").write_text('{"a": 1}\n')
    assert not RowSource(source="openai/gsm8k").on_hub
    assert [row.cells for row in rows_of(Path("openai/gsm8k"), split="test")] == [{"a": 1}]


def test_the_hubs_reader_is_checked_without_importing_it(monkeypatch: pytest.MonkeyPatch):
    source = RowSource(source="openai/gsm8k")
    for name in [n for n in sys.modules if n.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    source.check_hub_reader()
    assert "datasets" not in sys.modules
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"openai/gsm8k: reading it needs the package 'datasets'"):
        source.check_hub_reader()


def test_unknown_fields_and_files_are_refused(tmp_path: Path):
    with pytest.raises(ValidationError, match="column"):
        RowSource.model_validate({"source": "a.jsonl", "column": "x"})
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"a\.csv: rows are read from \.jsonl, .*convert it"):
        rows_of(tmp_path / "a.csv")
