"""GenEval's rules (arXiv 2310.11513): what a prompt asks for, and whether detections show it.

They are those of evaluation/evaluate_images.py of github.com/djghosh13/geneval. ``share`` is the
reward that Flow-GRPO (arXiv 2505.05470) trains on, of github.com/yifan123/reward-server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

Color = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
]
Relation = Literal["left of", "right of", "above", "below"]
Box = tuple[float, float, float, float]

COUNTING = "counting"
MAX_OBJECTS = 16
# Share of both objects' extents that an offset of their centres has to exceed.
POSITION_SLACK = 0.1


class Clause(BaseModel, frozen=True, extra="forbid"):
    """One object asked for, as GenEval's metadata have it.

    ``position`` is a relation to the objects of the clause with that index, which comes before.
    """

    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1)
    color: Color | None = None
    position: tuple[Relation, int] | None = None


@dataclass(frozen=True)
class Asked:
    """What one prompt asks for; ``tag`` is GenEval's name of the task."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    tag: str

    @property
    def classes(self) -> list[str]:
        """Each class once, in order."""
        return list(dict.fromkeys(clause.name for clause in (*self.include, *self.exclude)))

    @classmethod
    def of(cls, prompt: str, include: Any, exclude: Any, tag: Any) -> Asked:
        """Of the columns of one prompt; ``exclude`` and ``tag`` may be None.

        Raises:
            ValueError: they are not as GenEval's metadata have them.
        """
        if not include:
            raise ValueError(
                f"prompt {prompt!r} has no column 'include': GenEval's metadata are needed, like "
                '"include": [{"class": "cat", "count": 1}]'
            )
        try:
            wanted = tuple(Clause.model_validate(clause) for clause in include)
            unwanted = tuple(Clause.model_validate(clause) for clause in exclude or ())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"prompt {prompt!r}: columns 'include' and 'exclude' are not as GenEval's metadata "
                f"have them: {place}: {first['msg']}"
            ) from error
        for index, clause in enumerate(wanted):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise ValueError(
                    f"prompt {prompt!r}: {clause.name!r} is placed by clause {clause.position[1]} of "
                    f"column 'include', which is none before its own, {index}"
                )
        return cls(wanted, unwanted, tag or "")


@dataclass(frozen=True)
class Detection:
    """One object: pixels x0, y0, x1, y1, and bool (height, width) where there is a mask."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = None


Found = Mapping[str, Sequence[Detection]]
# The colour of each of some objects of one class.
Colors = Callable[[str, Sequence[Detection]], list[str]]


def kept(detections: Sequence[Detection], threshold: float, max_overlap: float) -> Found:
    """Objects by class, surest first: above the threshold, the 16 best, then without doubles.

    Of two of a class that overlap by ``max_overlap`` or more only the surer stays; 1 keeps both.
    """
    found: dict[str, list[Detection]] = {}
    for name in {detection.name for detection in detections}:
        sure = [d for d in detections if d.name == name and d.score > threshold]
        best: list[Detection] = []
        for one in sorted(sure, key=lambda d: -d.score)[:MAX_OBJECTS]:
            if max_overlap == 1 or all(overlap(one.box, o.box) < max_overlap for o in best):
                best.append(one)
        found[name] = best
    return found


def correct(asked: Asked, found: Found, colors: Colors) -> bool:
    """GenEval's verdict: every clause of ``include`` holds, and none of ``exclude``.

    At least ``count`` objects are needed; of more, only the surest ``count`` are looked at.
    """
    groups: list[Sequence[Detection] | None] = []
    for clause in asked.include:
        objects = found.get(clause.name, ())[: clause.count]
        right = len(objects) == clause.count
        if right and clause.color is not None:
            right = colors(clause.name, objects).count(clause.color) == clause.count
        if right and clause.position is not None:
            right = _placed(objects, clause.position[0], groups[clause.position[1]])
        groups.append(objects if right else None)
    too_many = any(len(found.get(c.name, ())) >= c.count for c in asked.exclude)
    return None not in groups and not too_many


def share(asked: Asked, found: Found, colors: Colors) -> float:
    """Flow-GRPO's reward: the mean over parts of how right they are.

    With m objects of n asked for, a clause has the part 1 - |n - m| / n, which is below 0 for more
    than twice as many. A colour or a position asked for is a further part: 0 where m is not n, else
    1 - |n - c| / n of c objects in the colour; and 1 or 0 for all objects in position, not counted
    where the colour was wrong. ``exclude`` does not count: m has to be n exactly. The original adds
    another part 1 to every position, wrong ones too; it is left out here.
    """
    parts: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in asked.include:
        objects = found.get(clause.name, ())
        parts.append(_near(len(objects), clause.count))
        right = len(objects) == clause.count
        if not right and (clause.color is not None or clause.position is not None):
            parts.append(0.0)
        if right and clause.color is not None:
            colored = colors(clause.name, objects).count(clause.color)
            parts.append(_near(colored, clause.count))
            right = colored == clause.count
        if right and clause.position is not None:
            right = _placed(objects, clause.position[0], groups[clause.position[1]])
            parts.append(float(right))
        groups.append(objects if right else None)
    return sum(parts) / len(parts)


def relations(box: Box, other: Box) -> set[str]:
    """Where a box is relative to another: none, one, or two of the four relations.

    The offset of the centres is lessened, in each direction, by 0.1 of the sum of both boxes'
    extents; what is left counts where it is more than half of the whole offset's length.
    """
    boxes = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)
    offset = np.subtract(*boxes.mean(1))
    extents = np.abs(np.diff(boxes, axis=1)).sum((0, 1))
    beyond = np.maximum(np.abs(offset) - POSITION_SLACK * extents, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    held = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, part in held.items() if part > 0.5}


def overlap(box: Box, other: Box) -> float:
    """Intersection over union of boxes whose last pixels belong to them."""
    shared = (
        max(box[0], other[0]),
        max(box[1], other[1]),
        min(box[2], other[2]),
        min(box[3], other[3]),
    )
    union = _area(box) + _area(other) - _area(shared)
    return _area(shared) / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _near(have: int, want: int) -> float:
    return 1 - abs(want - have) / want


def _placed(
    objects: Sequence[Detection], relation: str, others: Sequence[Detection] | None
) -> bool:
    """Whether every object is so to every other; no where the others were not right themselves."""
    return others is not None and all(
        relation in relations(one.box, other.box) for one in objects for other in others
    )
