"""Object detectors of transformers behind one interface: with fixed classes, or asked by text."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.geneval_rules import Detection
from rewards.published import pretrained

OWL = ("owlvit", "owlv2")


def read_detector(
    name: str, device: str, *, threshold: float, batch: int, labels: Mapping[str, str]
) -> Detector:
    """The detector in a directory or of a hub id; ``labels`` see ``FixedClasses``.

    Raises:
        ValueError: it cannot be had, lacks weights, or is no detector.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kinds: list[tuple[Any, Any, Any, type[Detector]]] = [
        (
            auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
            transformers.AutoModelForZeroShotObjectDetection,
            transformers.AutoProcessor,
            TextDetector,
        ),
        (
            auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
            transformers.AutoModelForObjectDetection,
            transformers.AutoImageProcessor,
            BoxDetector,
        ),
        (
            (transformers.Mask2FormerConfig, transformers.MaskFormerConfig),
            transformers.AutoModelForUniversalSegmentation,
            transformers.AutoImageProcessor,
            MaskDetector,
        ),
    ]
    config = pretrained(transformers.AutoConfig, name)
    for mapping, model, processor, kind in kinds:
        if type(config) in mapping:
            loaded, info = pretrained(model, name, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(
                    f"{name!r} is no {config.model_type}: it lacks "
                    f"{sorted(info['missing_keys'])[0]} and {len(info['missing_keys']) - 1} more"
                )
            settings: dict[str, Any] = {"threshold": threshold, "batch": batch, "labels": labels}
            return kind(name, loaded.to(device), pretrained(processor, name), **settings)
    raise ValueError(
        f"{name!r} is of type {config.model_type}, which detects no objects; give a Mask2Former, a "
        "DETR, an OWLv2 or a Grounding DINO"
    )


class Detector(ABC):
    """A model with its processor; objects with a score below ``threshold`` are not reported."""

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        *,
        threshold: float,
        batch: int,
        labels: Mapping[str, str],
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.threshold = threshold
        self.batch = batch
        self.labels = labels

    def check(self, classes: Iterable[str]) -> None:
        """Raises ValueError where it does not know one of the classes."""
        for name in classes:
            self.label(name)

    def find(
        self, frames: Sequence[np.ndarray], asked: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """The objects of the asked classes in each frame uint8 RGB (height, width, 3).

        Only frames of one size share a forward: padding would make scores depend on neighbours.
        """
        found: list[list[Detection]] = []
        keys = [
            (frame.shape, self.joins(names)) for frame, names in zip(frames, asked, strict=True)
        ]
        for _, run in itertools.groupby(range(len(frames)), key=keys.__getitem__):
            places = list(run)
            for start in range(0, len(places), self.batch):
                part = places[start : start + self.batch]
                found += self.detect([frames[i] for i in part], [asked[i] for i in part])
        return found

    @abstractmethod
    def label(self, name: str) -> str:
        """What the detector calls a class."""

    @abstractmethod
    def joins(self, names: Sequence[str]) -> Hashable:
        """Frames whose classes have the same may share a forward."""

    @abstractmethod
    def detect(self, frames: list[np.ndarray], asked: list[Sequence[str]]) -> list[list[Detection]]:
        """``find`` in one forward."""

    def outputs(self, inputs: Any) -> Any:
        """Of the model, on the CPU, where transformers makes objects of them."""
        import torch

        with torch.no_grad():
            outputs = self.model(**inputs.to(self.model.device))
        tensors = {k: v.cpu() for k, v in outputs.items() if isinstance(v, torch.Tensor)}
        return type(outputs)(**tensors)


class TextDetector(Detector):
    """Asked by text: OWLv2 ('a photo of a cat'), Grounding DINO ('cat').

    Grounding DINO names an object by the words that fit it; it counts where they are a whole class.
    """

    def label(self, name: str) -> str:
        """The class itself, in lower case."""
        return name.lower()

    def joins(self, names: Sequence[str]) -> Hashable:
        """The same classes, so that no text is padded."""
        return tuple(names)

    def detect(self, frames: list[np.ndarray], asked: list[Sequence[str]]) -> list[list[Detection]]:
        """See ``find``."""
        names = {self.label(name): name for name in asked[0]}
        form = "a photo of a {}" if self.model.config.model_type in OWL else "{}"
        inputs = self.processor(
            images=_images(frames),
            text=[[form.format(label) for label in names]] * len(frames),
            return_tensors="pt",
        )
        results = self.processor.post_process_grounded_object_detection(
            self.outputs(inputs),
            threshold=self.threshold,
            target_sizes=[frame.shape[:2] for frame in frames],
            text_labels=[list(names)] * len(frames),
        )
        return [
            [
                Detection(names[label], score, box)
                for label, score, box in zip(
                    r["text_labels"],
                    r["scores"].tolist(),
                    map(tuple, r["boxes"].tolist()),
                    strict=True,
                )
                if label in names
            ]
            for r in results
        ]


class FixedClasses(Detector):
    """A detector whose classes are its configuration's ``id2label``, in any case.

    ``labels``: what it calls classes that are asked for by another name.
    """

    def label(self, name: str) -> str:
        """The class itself where it is known by it, else what ``labels`` says.

        Raises:
            ValueError: it is known by neither.
        """
        known = {label.lower() for label in self.model.config.id2label.values()}
        for label in (name.lower(), self.labels.get(name, name).lower()):
            if label in known:
                return label
        raise ValueError(
            f"class {name!r} is not among the {len(known)} of detector {self.name!r}; say under field "
            "'labels' what it calls it, or give a detector that is asked by text, as OWLv2 is"
        )

    def joins(self, names: Sequence[str]) -> Hashable:
        """Whatever is asked for."""
        return None

    def detect(self, frames: list[np.ndarray], asked: list[Sequence[str]]) -> list[list[Detection]]:
        """See ``find``."""
        inputs = self.processor(images=_images(frames), return_tensors="pt")
        objects = self.objects(inputs, [frame.shape[:2] for frame in frames])
        labels = self.model.config.id2label
        found: list[list[Detection]] = []
        for names, part in zip(asked, objects, strict=True):
            wanted = {self.label(name): name for name in names}
            known = [(wanted.get(labels[label].lower()), *rest) for label, *rest in part]
            found.append([Detection(name, *rest) for name, *rest in known if name is not None])
        return found

    @abstractmethod
    def objects(self, inputs: Any, sizes: list[tuple[int, ...]]) -> list[list[tuple[Any, ...]]]:
        """Label's number, score, box and maybe mask of each object in frames of (height, width)."""


class BoxDetector(FixedClasses):
    """DETR and its kin."""

    def objects(self, inputs: Any, sizes: list[tuple[int, ...]]) -> list[list[tuple[Any, ...]]]:
        """See ``FixedClasses``."""
        results = self.processor.post_process_object_detection(
            self.outputs(inputs), threshold=self.threshold, target_sizes=sizes
        )
        return [
            list(
                zip(
                    r["labels"].tolist(),
                    r["scores"].tolist(),
                    map(tuple, r["boxes"].tolist()),
                    strict=True,
                )
            )
            for r in results
        ]


class MaskDetector(FixedClasses):
    """Mask2Former and MaskFormer; a box is the extent of its mask, past the last pixel."""

    def objects(self, inputs: Any, sizes: list[tuple[int, ...]]) -> list[list[tuple[Any, ...]]]:
        """See ``FixedClasses``."""
        results = self.processor.post_process_instance_segmentation(
            self.outputs(inputs),
            threshold=self.threshold,
            target_sizes=sizes,
            return_binary_maps=True,
        )
        return [
            [
                (segment["label_id"], segment["score"], _extent(mask), mask)
                for segment, mask in zip(
                    r["segments_info"], np.asarray(r["segmentation"]) > 0, strict=False
                )
            ]
            for r in results
        ]


def _images(frames: Iterable[np.ndarray]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


def _extent(mask: np.ndarray) -> tuple[float, ...]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return tuple(float(edge) for edge in edges)
