"""GenEval's rules, and Flow-GRPO's share of what is right, on hand-made detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rewards.geneval_rules import Asked, Detection, correct, kept, overlap, relations, share


def asked(*include: dict[str, Any], exclude: Any = None, tag: str = "") -> Asked:
    return Asked.of("a photo", list(include), exclude, tag)


def one(name: str, left: float = 0, top: float = 0, score: float = 0.95, size: float = 10) -> Any:
    return Detection(name, score, (left, top, left + size, top + size))


def verdict(wanted: Asked, *detections: Detection, colors: Sequence[str] = ()) -> Any:
    """Whether it is right, and the share that is, as the tag's threshold has it; colours by left edge."""
    found = kept(detections, 0.9 if wanted.tag == "counting" else 0.3, 1.0)

    def named(name: str, objects: Sequence[Detection]) -> list[str]:
        return [colors[int(o.box[0]) // 20] for o in objects]

    return correct(wanted, found, named), pytest.approx(share(wanted, found, named))


def test_single_object():
    wanted = asked({"class": "cat", "count": 1}, tag="single_object")
    assert verdict(wanted, one("cat")) == (True, 1)
    assert verdict(wanted, one("cat", score=0.31)) == (True, 1)
    assert verdict(wanted, one("cat", score=0.3)) == (False, 0)  # above, not at, the threshold
    assert verdict(wanted, one("dog")) == (False, 0)
    assert verdict(wanted) == (False, 0)
    # GenEval asks for at least as many, Flow-GRPO's reward for exactly as many.
    assert verdict(wanted, one("cat"), one("cat", 50)) == (True, 0)
    assert verdict(wanted, one("cat"), one("cat", 50), one("cat", 90)) == (True, -1)


def test_two_objects():
    wanted = asked({"class": "cat", "count": 1}, {"class": "dog", "count": 1}, tag="two_object")
    assert verdict(wanted, one("cat"), one("dog")) == (True, 1)
    assert verdict(wanted, one("cat")) == (False, 0.5)
    assert verdict(wanted, one("cat"), one("mouse")) == (False, 0.5)


def test_counting_takes_surer_objects_and_no_more_of_them():
    wanted = asked(
        {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}], tag="counting"
    )
    three = [one("cat", left) for left in (0, 20, 40)]
    assert verdict(wanted, *three) == (True, 1)
    assert verdict(wanted, *three, one("cat", 60, score=0.9)) == (True, 1)
    assert verdict(wanted, *three, one("cat", 60, score=0.91)) == (False, 2 / 3)
    assert verdict(wanted, *three[:2]) == (False, 2 / 3)
    assert verdict(wanted, *three[:1]) == (False, 1 / 3)


def test_colors():
    wanted = asked({"class": "cat", "count": 1, "color": "red"}, tag="colors")
    assert verdict(wanted, one("cat"), colors=["red"]) == (True, 1)
    assert verdict(wanted, one("cat"), colors=["blue"]) == (False, 0.5)
    assert verdict(wanted) == (False, 0)
    # Only the surest counts for GenEval.
    two = (one("cat", score=0.4), one("cat", 20, score=0.8))
    assert verdict(wanted, *two, colors=["blue", "red"]) == (True, 0)
    assert verdict(wanted, *two, colors=["red", "blue"]) == (False, 0)
    pair = asked({"class": "cat", "count": 2, "color": "red"})
    assert verdict(pair, *two, colors=["red", "blue"]) == (False, 0.75)


def test_color_attribution():
    wanted = asked(
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue"},
        tag="color_attr",
    )
    both = (one("cat"), one("dog", 20))
    assert verdict(wanted, *both, colors=["red", "blue"]) == (True, 1)
    assert verdict(wanted, *both, colors=["blue", "red"]) == (False, 0.5)
    assert verdict(wanted, both[0], colors=["red"]) == (False, 0.5)


@pytest.mark.parametrize(
    ("relation", "place"),
    [("left of", (0, 50)), ("right of", (99, 50)), ("above", (50, 0)), ("below", (50, 99))],
)
def test_position(relation: str, place: tuple[float, float]):
    clauses: Any = (
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": [relation, 0]},
    )
    wanted = asked(*clauses, tag="position")
    dog = one("dog", 50, 50)
    assert verdict(wanted, one("cat", *place), dog) == (True, 1)
    opposite = (100 - place[0], 100 - place[1])
    assert verdict(wanted, one("cat", *opposite), dog) == (False, 2 / 3)
    assert verdict(wanted, one("cat", *place)) == (False, 1 / 3)  # no dog to be placed by
    assert verdict(wanted, dog) == (False, 1 / 3)


def test_every_object_has_to_be_in_place_of_every_other():
    clauses: Any = (
        {"class": "dog", "count": 2},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    )
    cat = one("cat", 40)
    assert verdict(asked(*clauses), one("dog", 60), one("dog", 80), cat) == (True, 1)
    assert verdict(asked(*clauses), one("dog", 60), one("dog", 0), cat) == (False, 2 / 3)


def test_relations_take_a_tenth_of_both_extents_off_the_offset():
    still = (100.0, 100.0, 110.0, 110.0)
    assert relations(still, still) == set()
    assert relations((102.0, 100.0, 112.0, 110.0), still) == set()  # 2 = 0.1 * (10 + 10)
    assert relations((104.1, 100.0, 114.1, 110.0), still) == {"right of"}  # 2.1 of 4.1
    assert relations((103.9, 100.0, 113.9, 110.0), still) == set()  # 1.9 of 3.9
    assert relations((0.0, 0.0, 10.0, 10.0), still) == {"left of", "above"}
    assert relations((150.0, 120.0, 160.0, 130.0), still) == {"right of"}
    # Each direction has its own extents: 0.1 * (200 + 10) across, 0.1 * (10 + 10) down.
    assert relations((25.0, 140.0, 225.0, 150.0), still) == {"below"}


def test_at_most_sixteen_of_a_class_count_and_doubles_can_be_dropped():
    many = [one("cat", 20 * i) for i in range(20)]
    assert len(kept(many, 0.3, 1.0)["cat"]) == 16
    first, double, apart = one("cat", 0, score=0.5), one("cat", 1, score=0.9), one("cat", 8)
    assert [d.score for d in kept([first, double, apart], 0.3, 1.0)["cat"]] == [0.95, 0.9, 0.5]
    assert kept([first, double, apart], 0.3, 0.5)["cat"] == [apart, double]
    assert kept([first, one("dog")], 0.3, 0.5) == {"cat": [first], "dog": [one("dog")]}
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (0, 5, 9, 14)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (50, 50, 59, 59)) == 0


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (None, "no column 'include'"),
        ([], "no column 'include'"),
        ([{"count": 1}], "class: Field required"),
        ([{"class": "cat", "count": 0}], "count: Input should be greater"),
        ([{"class": "cat", "count": 1, "color": "mauve"}], "color: Input should be 'red'"),
        ([{"class": "cat", "count": 1, "position": ["near", 0]}], "position.0: Input should"),
        ([{"class": "cat", "count": 1, "position": ["above", 0]}], "none before its own, 0"),
        ([{"class": "cat", "count": 1, "size": 3}], "size: Extra inputs"),
    ],
)
def test_columns_that_are_not_geneval_s_are_named(include: Any, message: str):
    with pytest.raises(ValueError, match=f"prompt 'p'.*{message}"):
        Asked.of("p", include, None, None)
