"""The OCR reward: the distance of texts, which text is asked for, and reading rendered frames."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards.calling import call_reward
from rewards.ocr import Ocr, asked_texts, edit_distance, text_score


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_counts_changes_and_is_symmetric(first: str, second: str, distance: int):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "score"),
    [
        ("Hello World", 1),
        ("hello\nworld", 1),
        ("see HELLOWORLD!", 1),
        ("hellowor", 0.8),
        ("hallo world", 0.9),
        ("", 0),
        ("completely unrelated words", 0),
    ],
)
def test_a_score_ignores_case_spaces_and_surroundings_and_is_never_negative(
    read: str, score: float
):
    assert text_score("Hello World", read) == pytest.approx(score)


def test_the_column_says_what_is_asked_for_else_the_first_quotes():
    prompts = ['a sign "Open" by a "door"', "a sign “Closed”", 'a cup "Tea"', "no quotes"]
    assert asked_texts(prompts[:3], None) == ["Open", "Closed", "Tea"]
    assert asked_texts(prompts, ["Shop", None, None, "x y"]) == ["Shop", "Closed", "Tea", "x y"]


@pytest.mark.parametrize(
    ("prompt", "text"), [("a sign", None), ("a sign", [None]), ('a "  "', None), ('"a"', [" "])]
)
def test_nothing_to_read_is_an_error_that_names_the_prompt(
    prompt: str, text: list[str | None] | None
):
    with pytest.raises(ValueError, match="no text in double quotes") as raised:
        asked_texts([prompt], text)
    assert repr(prompt) in str(raised.value)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == "rapidocr_onnxruntime" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    problem = Ocr().problem()
    assert problem is not None and "pip install 'rectify[ocr]'" in problem


@pytest.fixture(scope="module")
def reader() -> Any:
    pytest.importorskip("rapidocr_onnxruntime")
    assert Ocr().problem() is None
    return Ocr().build()


def written(text: str, ink: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A frame uint8 (96, 128, 3) with ``text`` on white."""
    image = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(image).text((12, 28), text, ink, ImageFont.load_default(32))
    return np.asarray(image)


def test_rendered_text_is_read_in_colour_and_in_grey(reader: Any):
    grey, red = written("Open")[None, ..., :1], written("Open", (200, 30, 0))[None]
    assert reader(['a sign "Open"'] * 2, [grey, red]) == [1, 1]
    assert reader(["a sign"], [red], text=["Oven"]) == [0.75]


def test_frames_are_averaged_or_the_best_counts(reader: Any):
    video = np.stack([written(""), written("Open")])
    prompt = 'a door sign "Open"'
    assert reader([prompt], [video]) == [0.5]
    best = Ocr(aggregate="top", top_fraction=0.5).build()
    assert best([prompt], [video]) == [1]


def test_a_smaller_shortest_side_is_taken(reader: Any):
    tiny: Any = Ocr(shortest_side=32).build()
    assert tiny.reader.text_det.limit_side_len == 32
    assert reader.reader.text_det.limit_side_len == 736


def test_a_sample_that_asks_for_nothing_fails_alone(reader: Any):
    media = [written("Open")[None], written("")[None]]
    scores = call_reward("ocr", reader, ['"Open"', "a sign"], media, {"digit": [1, 2]}, 64)
    assert scores.values[0] == 1 and np.isnan(scores.values[1])
    assert "a sign" in scores.failures[0].message
