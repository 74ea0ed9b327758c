"""Whether the objects asked for are in a frame, as many, coloured and placed as asked: GenEval.

An object detector finds objects and CLIP names their colours (arXiv 2310.11513); as a reward see
Flow-GRPO (arXiv 2505.05470). The rules are in ``rewards.geneval_rules``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic import Field

from rewards.clip_score import CLIP_L, Clip
from rewards.contract import RewardFunction
from rewards.detectors import Detector, read_detector
from rewards.frames import FrameScoreSettings
from rewards.geneval_rules import COUNTING, Asked, Color, Detection, correct, kept, share
from rewards.published import missing_model

if TYPE_CHECKING:
    from torch import Tensor

COLORS: tuple[str, ...] = get_args(Color)
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
# What is not the object is painted over, in #999, before its colour is named.
BACKGROUND = 0x99


class Geneval(FrameScoreSettings, frozen=True, extra="forbid"):
    """GenEval's verdict on a frame, or with ``strict: false`` the share of it that is right.

    What is asked for are the columns ``include``, ``exclude`` and ``tag`` of GenEval's
    evaluation_metadata.jsonl, which serves as a file of prompts unchanged. It runs on a GPU where
    ``gpus`` is more than 0, else on the CPU. GenEval's own detector is mmdet's Mask2Former with
    Swin-S; the default here is its authors' model of the same architecture and data.
    """

    kind: Literal["geneval"] = "geneval"
    detector: str = Field(
        default="facebook/mask2former-swin-small-coco-instance",
        description="A directory or a hub id of a Mask2Former, of a detector with fixed classes (DETR "
        "and its kin), or of one that takes them as text (OWLv2, Grounding DINO).",
    )
    threshold: float = Field(
        default=0.3, ge=0, lt=1, description="Objects count with a score above it."
    )
    counting_threshold: float = Field(
        default=0.9, ge=0, lt=1, description="The same for prompts with the tag counting."
    )
    max_overlap: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Of two objects of a class that overlap (IoU) by this or more the less sure one is "
        "dropped; 1, GenEval's, drops none. Detectors that take text need about 0.5.",
    )
    color_model: str | None = Field(
        default=CLIP_L,
        description="The CLIP model that names colours: a directory or a hub id; null where no prompt "
        "asks for one.",
    )
    labels: Mapping[str, str] = Field(
        default={"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"},
        description="What a detector with fixed classes calls a class that the prompts name "
        "otherwise; the default is how GenEval's names differ from COCO's.",
    )
    strict: bool = Field(
        default=True,
        description="1 if all is right, else 0; false: Flow-GRPO's share of it that is right.",
    )

    @property
    def device(self) -> str:
        """Of the models."""
        return "cuda" if self.gpus > 0 else "cpu"

    def build(self) -> RewardFunction:
        """With its models.

        Raises:
            ValueError: one cannot be had, or is none of its kind.
        """
        clip = self.color_model and Clip(
            self.color_model, self.color_model, self.device, "float32", self.frame_batch
        )
        detector = read_detector(
            self.detector,
            self.device,
            threshold=min(self.threshold, self.counting_threshold),
            batch=self.frame_batch,
            labels=self.labels,
        )
        return GenevalScores(self, detector, ColorNames(clip) if clip else None)

    def problem(self) -> str | None:
        """Whether a local ``detector`` and a local ``color_model`` are there."""
        found = missing_model("detector", self.detector)
        return found or (self.color_model and missing_model("color_model", self.color_model))


class GenevalScores:
    """See ``Geneval``."""

    def __init__(self, settings: Geneval, detector: Detector, colors: ColorNames | None) -> None:
        self.settings = settings
        self.detector = detector
        self.colors = colors

    def __call__(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        include: list[Any] | None = None,
        exclude: list[Any] | None = None,
        tag: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, 1 or 3).

        Raises:
            ValueError: other media, columns that are not GenEval's, a class that the detector does
                not know, or a colour without ``color_model``.
        """
        asked = self._asked(prompts, include, exclude, tag)
        return list(self._scores(asked, completions, self.settings.strict))

    def describe_set(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        include: list[Any] | None = None,
        exclude: list[Any] | None = None,
        tag: list[Any] | None = None,
        **columns: Any,
    ) -> dict[str, float]:
        """accuracy/<tag>, shares of correct frames, and accuracy, the mean of them over tags.

        Raises:
            ValueError: see ``__call__``.
        """
        asked = self._asked(prompts, include, exclude, tag)
        groups: dict[str, list[float]] = defaultdict(list)
        for one, score in zip(asked, self._scores(asked, completions, True), strict=True):
            groups[one.tag or "untagged"].append(score)
        means = {f"accuracy/{name}": float(np.mean(part)) for name, part in groups.items()}
        return {"accuracy": float(np.mean(list(means.values()))), **means}

    def _asked(self, prompts: list[str], *columns: list[Any] | None) -> list[Asked]:
        rows = [[None] * len(prompts) if column is None else column for column in columns]
        asked = [Asked.of(*row) for row in zip(prompts, *rows, strict=True)]
        self.detector.check({name for one in asked for name in one.classes})
        for prompt, one in zip(prompts, asked, strict=True):
            if self.colors is None and any(clause.color for clause in one.include):
                raise ValueError(
                    f"prompt {prompt!r} asks for a colour: give reward geneval the field 'color_model'"
                )
        return asked

    def _scores(
        self, asked: list[Asked], completions: list[np.ndarray], strict: bool
    ) -> Iterator[float]:
        """Of each sample, over its frames."""
        import torch

        media = self.settings.chosen_frames(completions)
        frames = [frame for part in media for frame in part]
        wanted = [one.classes for one, part in zip(asked, media, strict=True) for _ in part]
        found = iter(self.detector.find(frames, wanted))
        for one, part in zip(asked, media, strict=True):
            scores = [self._score(one, frame, next(found), strict) for frame in part]
            yield float(self.settings.aggregated(torch.tensor(scores)))

    def _score(
        self, asked: Asked, frame: np.ndarray, detections: Sequence[Detection], strict: bool
    ) -> float:
        settings = self.settings
        counting = asked.tag == COUNTING
        threshold = settings.counting_threshold if counting else settings.threshold
        found = kept(detections, threshold, settings.max_overlap)

        def colors(name: str, objects: Sequence[Detection]) -> list[str]:
            assert self.colors is not None
            return self.colors.of(frame, name, objects)

        return float(correct(asked, found, colors) if strict else share(asked, found, colors))


class ColorNames:
    """The likeliest of ten colours of an object, by CLIP with the mean of three texts for each."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.texts: dict[str, Tensor] = {}

    def of(self, frame: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """Of objects of the class ``name`` in a frame uint8 RGB (height, width, 3)."""
        import torch
        from torch.nn.functional import normalize

        if name not in self.texts:
            texts = [form.format(color, name) for color in COLORS for form in TEMPLATES]
            embedded = self.clip.of_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self.texts[name] = normalize(embedded.mean(1), dim=-1)
        crops = [crop(frame, one)[None] for one in objects]
        images = torch.cat(self.clip.of_frames(crops))
        return [COLORS[int(best)] for best in (images @ self.texts[name].T).argmax(-1)]


def crop(frame: np.ndarray, one: Detection) -> np.ndarray:
    """The object's box, at least a pixel; grey outside its mask where it has one."""
    height, width = frame.shape[:2]
    left, top = (
        min(max(round(v), 0), s - 1) for v, s in zip(one.box[:2], (width, height), strict=True)
    )
    right, bottom = (max(round(v), s + 1) for v, s in zip(one.box[2:], (left, top), strict=True))
    shown = frame if one.mask is None else np.where(one.mask[..., None], frame, BACKGROUND)
    return shown[top:bottom, left:right].astype(np.uint8)
