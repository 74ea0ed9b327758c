"""ImageReward in its own environment against the authors' package, random weights of the true size."""

from __future__ import annotations

import json
import os
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards.environment import missing, python_of
from rewards.image_reward import CONFIG, VOCABULARY, WEIGHTS, ImageReward
from rewards.serving import EnvironmentProcess, RewardFailed

# The second is longer than the 35 tokens that are read.
PROMPTS = ["a red cat on a blue sofa", "two dogs " * 20]
SHAPES = [(300, 230, 3), (240, 261, 3), (240, 261, 3)]
# The published med_config.json.
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
# The package looks for its words under this name, where we are first.
MAKE = """
import ImageReward, sys, torch
torch.manual_seed(0)
model = ImageReward.ImageReward(med_config=sys.argv[2])
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.startswith("mlp") and name.endswith("weight"):
            parameter.mul_(60)
torch.save(model.state_dict(), sys.argv[1])
"""
AUTHORS = """
import ImageReward, json, sys
from PIL import Image
model = ImageReward.load(sys.argv[1], device="cpu", med_config=sys.argv[2])
prompts, images = map(json.loads, sys.argv[3:])
pictures = [Image.open(image) for image in images]
print(json.dumps([[model.score(prompt, picture) for picture in pictures] for prompt in prompts]))
"""


def in_environment(code: str, directory: Path, *arguments: str) -> str:
    command = [str(python_of("image-reward")), "-I", "-W", "ignore", "-c", code, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model and, beside it, a tokenizer with as many words as BERT's, letters and some whole."""
    reason = missing("image-reward")
    if reason is not None:
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("image-reward")
    words = made / "bert-base-uncased"
    words.mkdir()
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "dogs", "##wo"]
    known += [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    unused = [f"[unused{number}]" for number in range(30522 - len(known))]
    (words / VOCABULARY).write_text("\n".join([*known, *unused]) + "\n")
    (words / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (made / CONFIG).write_text(json.dumps(MED))
    in_environment(MAKE, made, str(made / WEIGHTS), str(made / CONFIG))
    yield made
    (made / WEIGHTS).unlink()  # 2 GB


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
    lists = [json.dumps(PROMPTS), json.dumps(files)]
    said = in_environment(
        AUTHORS, directory, str(directory / WEIGHTS), str(directory / CONFIG), *lists
    )
    want = np.array(json.loads(said.strip().splitlines()[-1]))
    assert want.std(axis=1).min() > 1e-3 and np.abs(want[0] - want[1]).min() > 1e-3

    words = directory / "bert-base-uncased"
    config = ImageReward(model=str(directory), tokenizer=str(words), frame_batch=2)
    assert config.problem() is None
    server = EnvironmentProcess(config, threads=2)
    media = [image[None] for image in images]
    video = np.stack(images[1:])
    prompts = [*[PROMPTS[0]] * 3, *[PROMPTS[1]] * 2]
    scores, seconds = server.score(prompts, {}, media, [media[0], video])
    assert scores.failures == () and seconds > 0
    assert scores.values[:4] == pytest.approx([*want[0], want[1, 0]], abs=1e-5)
    assert scores.values[4] == pytest.approx(want[1, 1:].mean(), abs=1e-5)


@pytest.mark.slow
def test_a_file_that_is_no_checkpoint_is_named(directory: Path, tmp_path: Path):
    (tmp_path / CONFIG).write_text(json.dumps(MED | {"num_hidden_layers": 1}))
    in_environment(
        "import sys, torch; torch.save({}, sys.argv[1])", tmp_path, str(tmp_path / WEIGHTS)
    )
    config = ImageReward(model=str(tmp_path), tokenizer=str(directory / "bert-base-uncased"))
    with pytest.raises(RewardFailed, match=r"ImageReward\.pt lacks blip\.visual_encoder"):
        EnvironmentProcess(config, threads=1)


def test_a_file_that_is_nowhere_is_named_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rewards.contract.missing", lambda name: None)
    assert ImageReward().problem() is None
    (tmp_path / WEIGHTS).touch()
    assert CONFIG in (ImageReward(model=str(tmp_path)).problem() or "")
    (tmp_path / CONFIG).touch()
    assert ImageReward(model=str(tmp_path)).problem() is None
    problem = ImageReward(model=str(tmp_path), tokenizer=str(tmp_path)).problem()
    assert problem is not None and VOCABULARY in problem and "give field 'tokenizer' one" in problem


def test_without_its_environment_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path))
    assert "rectify env create image-reward" in (ImageReward().problem() or "")
