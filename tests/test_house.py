"""The house rules that a tool can hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "recipes", "distill", "rl", "rollout", "rewards")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_a_reader_s_head(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_loop_is_at_most_120_lines():
    text = (ROOT / "rl" / "train.py").read_text()
    loop = next(
        n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Trainer"
    )
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno <= 120


def test_deepspeed_is_imported_in_one_file_and_pickle_in_none():
    assert [p.name for p in FILES if "deepspeed" in imports(p)] == ["deepspeed_engine.py"]
    assert [p for p in FILES if "pickle" in imports(p)] == []
    assert {p.parent.name for p in FILES if "ray" in imports(p)} == {"cluster"}


def test_tests_stay_out_of_the_wheel():
    found = find_packages(str(ROOT), include=[f"{name}*" for name in (*PACKAGES, "distill")])
    assert {name.split(".")[0] for name in found} >= set(PACKAGES)
    assert not any(name.startswith(("tests", "benchmarks", "docs")) for name in found)
