"""GenEval's detectors and colours on small random weights, saved as transformers' own are."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_detectors import CLASSES, save_all
from transformers import (
    CLIPModel,
    CLIPProcessor,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2ForObjectDetection,
    Owlv2Processor,
)

from rewards.calling import call_reward
from rewards.geneval import COLORS, Geneval, crop
from rewards.geneval_rules import Asked, Detection, correct, kept, share
from rollout.prompts import FilePrompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("geneval"))


def settings(files: Path, detector: str, **options: Any) -> Geneval:
    given: dict[str, Any] = {"color_model": str(files / "clip"), "threshold": 0.01, **options}
    return Geneval(detector=str(files / detector), counting_threshold=0.02, **given)


def pictures(count: int = 3, height: int = 48, width: int = 72) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    small = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in small]


def found(files: Path, detector: str, names: list[str], frames: list[np.ndarray]) -> Any:
    """Of each frame: names, scores and boxes of what the reward's detector finds, surest first."""
    reward: Any = settings(files, detector).build()
    rows = reward.detector.find(frames, [names] * len(frames))
    return [[(d.name, d.score, d.box) for d in sorted(r, key=lambda d: -d.score)] for r in rows]


def same(got: Any, want: list[list[tuple[str, float, Any]]], kinds: int = 2) -> None:
    """Equal, and there is something to be equal to."""
    assert sum(map(len, want)) >= 6 and len({name for row in want for name, *_ in row}) >= kinds
    for mine, theirs in zip(got, want, strict=True):
        theirs = sorted(theirs, key=lambda row: -row[1])
        assert [name for name, *_ in mine] == [name for name, *_ in theirs]
        assert [s for _, s, _ in mine] == pytest.approx([s for _, s, _ in theirs], abs=1e-4)
        boxes = [[float(edge) for edge in box] for *_, box in theirs]
        np.testing.assert_allclose([box for *_, box in mine], boxes, atol=1e-2)


def test_a_crop_is_grey_outside_the_mask_and_at_least_a_pixel():
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 3] = True
    shown = crop(frame, Detection("cat", 1, (2.4, 1.6, 5.0, 4.0), mask))
    assert shown.shape == (2, 3, 3) and shown.dtype == np.uint8
    assert shown[0, 1].tolist() == frame[2, 3].tolist()
    shown[0, 1] = 153
    assert (shown == 153).all()
    assert (crop(frame, Detection("cat", 1, (2.4, 1.6, 5.0, 4.0))) == frame[2:4, 2:5]).all()
    assert crop(frame, Detection("cat", 1, (7.9, -3.0, 12.0, 0.2))).tolist() == [
        [frame[0, 7].tolist()]
    ]


def test_detr_s_objects_are_those_of_transformers(files: Path):
    network: Any = DetrForObjectDetection.from_pretrained(files / "detr").eval()
    processor: Any = DetrImageProcessorPil.from_pretrained(files / "detr")
    want: list[list[tuple[str, float, Any]]] = []
    for frame in pictures():
        with torch.no_grad():
            outputs = network(**processor(images=Image.fromarray(frame), return_tensors="pt"))
        (result,) = processor.post_process_object_detection(
            outputs, threshold=0.01, target_sizes=[(48, 72)]
        )
        rows = zip(result["labels"], result["scores"], result["boxes"], strict=True)
        names = {0: "cat", 2: "computer mouse"}  # the dog is not asked for
        want.append([(names[int(i)], float(s), box) for i, s, box in rows if int(i) in names])
    same(found(files, "detr", ["cat", "computer mouse"], pictures()), want)


def test_mask2former_s_objects_are_those_of_transformers_and_boxes_are_extents(files: Path):
    network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(files / "mask2former").eval()
    processor: Any = Mask2FormerImageProcessorPil.from_pretrained(files / "mask2former")
    want: list[list[tuple[str, float, Any]]] = []
    masks: list[Any] = []
    for frame in pictures():
        with torch.no_grad():
            outputs = network(**processor(images=Image.fromarray(frame), return_tensors="pt"))
        (result,) = processor.post_process_instance_segmentation(
            outputs, threshold=0.01, target_sizes=[(48, 72)], return_binary_maps=True
        )
        want.append([])
        for segment, mask in zip(result["segments_info"], result["segmentation"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            want[-1].append((CLASSES[segment["label_id"]].lower(), segment["score"], box))
            masks.append(mask.bool().numpy())
    names = ["cat", "dog", "mouse"]
    same(found(files, "mask2former", names, pictures()), want)
    reward: Any = settings(files, "mask2former").build()
    got = [d.mask for row in reward.detector.find(pictures(), [names] * 3) for d in row]
    assert all((a == b).all() for a, b in zip(got, masks, strict=True))


def test_owlv2_is_asked_by_text(files: Path):
    network: Any = Owlv2ForObjectDetection.from_pretrained(files / "owlv2").eval()
    processor: Any = Owlv2Processor.from_pretrained(files / "owlv2")
    want: list[list[tuple[str, float, Any]]] = []
    for frame in pictures():
        inputs = processor(
            images=Image.fromarray(frame),
            text=[["a photo of a cat", "a photo of a bird"]],
            return_tensors="pt",
        )
        with torch.no_grad():
            outputs = network(**inputs)
        (result,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.01, target_sizes=[(48, 72)], text_labels=[["cat", "Bird"]]
        )
        want.append(
            [
                (name, float(score), box)
                for name, score, box in zip(
                    result["text_labels"], result["scores"], result["boxes"], strict=True
                )
            ]
        )
    same(found(files, "owlv2", ["cat", "Bird"], pictures()), want)


def test_grounding_dino_names_objects_by_whole_classes_only(files: Path):
    network: Any = GroundingDinoForObjectDetection.from_pretrained(files / "dino").eval()
    processor: Any = GroundingDinoProcessor.from_pretrained(files / "dino")
    names = ["cat", "dog", "computer mouse"]
    want: list[list[tuple[str, float, Any]]] = []
    phrases: set[str] = set()
    for frame in pictures():
        inputs = processor(
            images=Image.fromarray(frame), text="cat. dog. computer mouse.", return_tensors="pt"
        )
        with torch.no_grad():
            outputs = network(**inputs)
        (result,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.01, target_sizes=[(48, 72)]
        )
        rows = zip(result["text_labels"], result["scores"], result["boxes"], strict=True)
        want.append([(name, float(s), box) for name, s, box in rows if name in names])
        phrases |= set(result["text_labels"])
    assert phrases - set(names)
    same(found(files, "dino", names, pictures()), want, kinds=1)


def test_the_verdict_is_that_of_the_rules_on_what_the_detector_finds(files: Path):
    media = [np.stack(pictures()), np.stack(pictures(2)), np.stack(pictures(3)[1:])]
    rows: list[Any] = [
        [{"class": "computer mouse", "count": 4}],
        [{"class": "dog", "count": 3}],
        [{"class": "dog", "count": 2, "color": "red"}],
    ]
    tags = ["counting", None, "colors"]
    columns: dict[str, Any] = {"include": rows, "tag": tags, "digit": [1, 2, 3]}
    for strict in (True, False):
        config = settings(files, "mask2former", strict=strict, frame_batch=2)
        reward: Any = config.build()
        want: list[float] = []
        for frames, row, tag in zip(media, rows, tags, strict=True):
            wanted = Asked.of("p", row, None, tag)
            scores: list[float] = []
            for frame in frames:
                (seen,) = reward.detector.find([frame], [wanted.classes])
                objects = kept(seen, 0.02 if tag == "counting" else 0.01, 1.0)
                named = functools.partial(reward.colors.of, frame)
                scores.append((correct if strict else share)(wanted, objects, named))
            want.append(float(np.mean(scores)))
        # In one call, in batches of two frames, as one by one.
        assert reward(["p"] * 3, media, **columns) == pytest.approx(want)
        assert len(set(want)) == 3
        scored = call_reward("geneval", reward, ["p"] * 3, media, columns, 64)
        assert scored.failures == () and list(scored.values) == pytest.approx(want)
        best = settings(files, "mask2former", strict=strict, aggregate="top", top_fraction=0.1)
        assert best.build()(["p"] * 3, media, **columns) != pytest.approx(want)


@pytest.mark.parametrize("detector", ["mask2former", "detr", "owlv2", "dino"])
def test_what_is_found_does_not_depend_on_the_other_frames(files: Path, detector: str):
    frames = [*pictures(), *pictures(2, 60, 40)]
    names = [["cat"], ["dog", "computer mouse"], ["dog", "computer mouse"], ["cat"], ["dog"]]
    reward: Any = settings(files, detector).build()
    together = reward.detector.find(frames, names)
    assert sum(map(len, together)) > 2
    for frame, asked_for, mine in zip(frames, names, together, strict=True):
        (alone,) = reward.detector.find([frame], [asked_for])
        assert [d.name for d in mine] == [d.name for d in alone]
        np.testing.assert_allclose([d.score for d in mine], [d.score for d in alone], atol=1e-4)
        np.testing.assert_allclose([d.box for d in mine], [d.box for d in alone], atol=1e-2)


def test_colors_are_clip_s_zero_shot_of_three_texts_on_the_crop(files: Path):
    network: Any = CLIPModel.from_pretrained(files / "clip").eval()
    processor: Any = CLIPProcessor.from_pretrained(files / "clip")
    frame = pictures(1)[0]
    objects = [Detection("cat", 1, (20 * i, 5 * i, 21 * i + 8, 6 * i + 8)) for i in range(4)]
    texts = [
        [f"a photo of a {c} cat", f"a photo of a {c}-colored cat", f"a photo of a {c} object"]
        for c in COLORS
    ]
    with torch.no_grad():
        classes = torch.stack(
            [
                torch.nn.functional.normalize(
                    network.get_text_features(
                        **processor(text=t, padding=True, truncation=True, return_tensors="pt")
                    ).pooler_output,
                    dim=-1,
                ).mean(0)
                for t in texts
            ]
        )
        crops = [Image.fromarray(frame).crop(o.box) for o in objects]
        images = network.get_image_features(
            **processor(images=crops, return_tensors="pt")
        ).pooler_output
    cosines = torch.nn.functional.cosine_similarity(images[:, None], classes[None], dim=-1)
    want = [COLORS[int(i)] for i in cosines.argmax(1)]
    assert len(COLORS) == 10 and len(set(want)) > 1
    reward: Any = settings(files, "detr").build()
    assert reward.colors.of(frame, "cat", objects) == want
    torch.testing.assert_close(
        reward.colors.texts["cat"], classes / classes.norm(dim=-1, keepdim=True), atol=1e-4, rtol=0
    )
    assert reward.colors.of(frame, "cat", objects[1:2]) == want[1:2]  # by the texts kept


def test_a_whole_set_has_accuracies_by_tag_and_their_mean(files: Path):
    media = [np.stack(pictures(1))] * 3
    reward: Any = settings(files, "mask2former", strict=False).build()
    right, wrong = [{"class": "dog", "count": 1}], [{"class": "cat", "count": 9}]
    metrics = reward.describe_set(
        ["p"] * 3, media, include=[right, wrong, right], tag=["colors", "colors", "position"]
    )
    assert metrics == {"accuracy": 0.75, "accuracy/colors": 0.5, "accuracy/position": 1.0}


def test_geneval_s_own_file_serves_as_prompts(files: Path, tmp_path: Path):
    rows = [
        '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}',
        '{"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, '
        '"position": ["left of", 0]}], "prompt": "a photo of a dog left of a cat"}',
        '{"tag": "counting", "include": [{"class": "tv remote", "count": 2}], "exclude": [{"class": '
        '"tv remote", "count": 3}], "prompt": "a photo of two tv remotes"}',
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(rows))
    prompts = FilePrompts(path=tmp_path / "evaluation_metadata.jsonl").load()
    names = {name for prompt in prompts for name in prompt.columns}
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    reward = settings(files, "mask2former", labels={"tv remote": "mouse"}, strict=False).build()
    scores = reward([p.text for p in prompts], [np.stack(pictures(1))] * 3, **columns)
    assert len(scores) == 3 and all(score is not None and score <= 1 for score in scores)


def test_a_class_that_the_detector_does_not_know_is_named(files: Path):
    columns: dict[str, Any] = {"include": [[{"class": "unicorn", "count": 1}]]}
    media = [np.stack(pictures(1))]
    with pytest.raises(ValueError, match=r"'unicorn' is not among the 3 of detector .*'labels'"):
        settings(files, "detr").build()(["p"], media, **columns)
    assert settings(files, "owlv2", threshold=0.0).build()(["p"], media, **columns) is not None
    renamed = settings(files, "detr", labels={"unicorn": "DOG"}).build()
    assert renamed(["p"], media, **columns) is not None


def test_a_color_without_a_color_model_is_refused_and_else_none_is_needed(files: Path):
    reward = settings(files, "detr", color_model=None).build()
    media = [np.stack(pictures(1))]
    plain: dict[str, Any] = {"class": "cat", "count": 1}
    assert reward(["p"], media, include=[[plain]])[0] in (0, 1)
    with pytest.raises(ValueError, match=r"prompt 'p' asks for a colour.*'color_model'"):
        reward(["p"], media, include=[[{**plain, "color": "red"}]])


def test_what_is_no_detector_or_lacks_weights_is_refused(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is of type clip, which detects no objects"):
        settings(files, "clip").build()
    holed = shutil.copytree(files / "detr", tmp_path / "holed")
    state = load_file(holed / "model.safetensors")
    del state["class_labels_classifier.bias"]
    save_file(state, holed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is no detr: it lacks class_labels_classifier\.bias"):
        settings(tmp_path, "holed", color_model=None).build()


def test_problems_name_the_field(files: Path, monkeypatch: pytest.MonkeyPatch):
    assert Geneval().problem() is None and Geneval(color_model=None).problem() is None
    assert settings(files, "detr").problem() is None and not Geneval().has_gradient()
    for field in ("detector", "color_model"):
        absent: dict[str, Any] = {field: "./absent"}
        problem = Geneval(**absent).problem()
        assert problem is not None and repr(field) in problem
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download rectify-tests/absent"):
        Geneval(detector="rectify-tests/absent", color_model=None).build()
    assert (Geneval().device, Geneval(gpus=0.5).device) == ("cpu", "cuda")
