"""HPSv2 in its own environment against the authors' package, on random weights of the true size."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.environment import missing, python_of
from rewards.hpsv2 import FILES, HpsV2
from rewards.serving import EnvironmentProcess, RewardFailed

PROMPTS = ["a red cat on a blue sofa", "two dogs, oil painting"]
# A resize enlarges one and shrinks the others; bars are left and right, above and below, and nowhere.
SHAPES = [(300, 180, 3), (40, 61, 3), (40, 61, 3)]

# Weights as open_clip draws them, with differences between images and prompts that can be seen.
MAKE = """
import sys, open_clip, torch
torch.manual_seed(0)
model = open_clip.create_model("ViT-H-14", load_weights=False)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name in ("positional_embedding", "visual.positional_embedding"):
            parameter.mul_(0.1)
torch.save({"state_dict": {k: v.half() for k, v in model.state_dict().items()}}, sys.argv[1])
"""
# The wheel lacks the vocabulary, and its model begins from weights of the hub before it takes its own.
AUTHORS = """
import functools, json, pathlib, shutil, sys
import importlib.util, open_clip
from PIL import Image
checkpoint, place, prompts, images = sys.argv[1], pathlib.Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
found = pathlib.Path(importlib.util.find_spec("hpsv2").origin).parent
shutil.copytree(found, place / "hpsv2")
words = "bpe_simple_vocab_16e6.txt.gz"
shutil.copy(pathlib.Path(open_clip.__file__).parent / words, place / "hpsv2/src/open_clip" / words)
sys.path.insert(0, str(place))
from hpsv2 import img_score
made = img_score.create_model_and_transforms
img_score.create_model_and_transforms = lambda name, tag, **options: made(name, None, **options)
pictures = [Image.open(image) for image in images]
scores = [img_score.score(pictures, prompt, cp=checkpoint) for prompt in prompts]
print(json.dumps([[float(score) for score in row] for row in scores]))
"""


def in_environment(code: str, *arguments: str) -> str:
    command = [str(python_of("hpsv2")), "-I", "-W", "ignore", "-c", code, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    reason = missing("hpsv2")
    if reason is not None:
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("hpsv2")
    file = made / FILES["v2"]
    in_environment(MAKE, str(file))
    yield made
    file.unlink()  # 2 GB


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    found: list[np.ndarray] = []
    for height, width, channels in SHAPES:
        blobs = Image.fromarray(generator.integers(0, 256, (4, 6, channels), dtype=np.uint8))
        found.append(np.asarray(blobs.resize((width, height))))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_scores_are_those_of_the_authors_package(directory: Path, tmp_path: Path):
    images = pictures()
    files: list[str] = []
    for index, image in enumerate(images):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image).save(files[-1])
    checkpoint = str(directory / FILES["v2"])
    said = in_environment(
        AUTHORS, checkpoint, str(tmp_path), json.dumps(PROMPTS), json.dumps(files)
    )
    want = np.array(json.loads(said.strip().splitlines()[-1]))
    assert want.std(axis=1).min() > 1e-3 and np.abs(want[0] - want[1]).min() > 1e-3

    config = HpsV2(checkpoint=str(directory), version="v2", frame_batch=2)
    assert config.problem() is None
    server = EnvironmentProcess(config, threads=2)
    media: list[Any] = [image[None] for image in images]
    video = np.stack(images[1:])
    prompts = [*[PROMPTS[0]] * 3, *[PROMPTS[1]] * 2]
    scores, seconds = server.score(prompts, {}, media, [media[0], video])
    assert scores.failures == () and seconds > 0
    assert scores.values[:4] == pytest.approx([*want[0], want[1, 0]], abs=2e-6)
    assert scores.values[4] == pytest.approx(want[1, 1:].mean(), abs=2e-6)


@pytest.mark.slow
def test_a_file_that_is_no_checkpoint_is_named(directory: Path, tmp_path: Path):
    wrong = tmp_path / "wrong.pt"
    in_environment("import sys, torch; torch.save({'state_dict': {}}, sys.argv[1])", str(wrong))
    with pytest.raises(RewardFailed, match=r"wrong\.pt is no HPSv2 checkpoint: Missing key"):
        EnvironmentProcess(HpsV2(checkpoint=str(wrong)), threads=1)


def test_a_checkpoint_that_is_nowhere_is_named_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rewards.contract.missing", lambda name: None)
    (tmp_path / FILES["v2"]).touch()
    assert HpsV2(checkpoint=str(tmp_path), version="v2").problem() is None
    assert FILES["v2.1"] in (HpsV2(checkpoint=str(tmp_path)).problem() or "")
    assert HpsV2().problem() is None
    for wrong in ("./absent", "absent", "a/b/c"):
        assert "give field 'checkpoint' one" in (HpsV2(checkpoint=wrong).problem() or "")


def test_without_its_environment_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path))
    assert "rectify env create hpsv2" in (HpsV2().problem() or "")
    with pytest.raises(RewardFailed, match="rectify env create hpsv2"):
        EnvironmentProcess(HpsV2(), threads=1)
