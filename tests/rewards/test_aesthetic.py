"""The aesthetic predictor on a small random CLIP, with a head in the published layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_clip_score import in_torch, save_clip, slopes, videos
from transformers import CLIPModel, CLIPProcessor

from rewards.aesthetic import Aesthetic, read_head
from rewards.calling import call_reward
from rewards.contract import DifferentiableReward

WIDTH = 16
# Of an embedding of length 1, between the two forms: resized pixels rounded to 256 levels or not.
EMBEDDING_ROUNDING = 5e-3


class PublishedHead(torch.nn.Module):
    """improved-aesthetic-predictor's MLP, as its train_predictor.py has it (768 entries there)."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PublishedHead]:
    """The CLIP directory, the head's .pth, and the head."""
    directory = tmp_path_factory.mktemp("aesthetic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = PublishedHead()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(3)
    torch.save(head.state_dict(), directory / "head.pth")
    return save_clip(directory / "clip"), directory / "head.pth", head.eval()


def reward(files: tuple[Path, Path, PublishedHead], **options: Any) -> Any:
    given: dict[str, Any] = {"head": str(files[1]), **options}
    return Aesthetic(model=str(files[0]), **given).build()


def published(files: tuple[Path, Path, PublishedHead], media: list[np.ndarray]) -> np.ndarray:
    """Scores (samples, frames) as DDPO's AestheticScorer computes them."""
    clip: Any = CLIPModel.from_pretrained(files[0]).eval()
    processor: Any = CLIPProcessor.from_pretrained(files[0])
    rows: list[np.ndarray] = []
    for frames in media:
        inputs = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
        with torch.no_grad():
            embedded = clip.get_image_features(**inputs).pooler_output
            unit = embedded / torch.linalg.vector_norm(embedded, dim=-1, keepdim=True)
            rows.append(files[2].layers(unit)[:, 0].numpy())
    return np.stack(rows)


def test_scores_are_those_of_the_published_predictor(files: tuple[Path, Path, PublishedHead]):
    media = videos()
    want = published(files, media)
    assert np.ptp(want) > 0.5
    assert reward(files)(["", ""], media) == pytest.approx(want.mean(1), abs=1e-4)
    best = reward(files, aggregate="top", top_fraction=0.3)
    assert best(["", ""], media) == pytest.approx(want.max(1), abs=1e-4)
    scores = call_reward("aesthetic", best, ["a", "b"], media, {"digit": [1, 2]}, 64)
    assert scores.failures == () and list(scores.values) == pytest.approx(want.max(1), abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 40, 61, 3)])
def test_both_forms_agree(files: tuple[Path, Path, PublishedHead], shape: tuple[int, ...]):
    both = reward(files)
    media = videos(shape)
    with torch.no_grad():  # without activations the head is one linear function of the embedding
        slope = float(
            (files[2].layers(torch.eye(WIDTH)) - files[2].layers(torch.zeros(WIDTH))).norm()
        )
    tolerance = 1e-4 if shape[1] == 28 else EMBEDDING_ROUNDING * slope
    served = both(["", ""], media)
    assert isinstance(both, DifferentiableReward)
    got = both.differentiable(["", ""], in_torch(media))
    assert got.tolist() == pytest.approx(served, abs=tolerance)


def test_gradients_are_those_of_finite_differences(files: tuple[Path, Path, PublishedHead]):
    score = reward(files).differentiable
    pixels = 0.25 + 0.5 * in_torch(videos((2, 33, 40, 3)))
    by_autograd, measured = slopes(lambda x: score(["", ""], x), pixels)
    assert (by_autograd > 0.01).all()
    np.testing.assert_allclose(measured, by_autograd, rtol=0.02)


def test_a_safetensors_head_is_the_same(files: tuple[Path, Path, PublishedHead], tmp_path: Path):
    save_file(files[2].state_dict(), tmp_path / "head.safetensors")
    want = reward(files)([""], videos()[:1])
    assert reward(files, head=str(tmp_path / "head.safetensors"))([""], videos()[:1]) == want


def test_a_head_with_other_keys_is_refused(files: tuple[Path, Path, PublishedHead], tmp_path: Path):
    state = files[2].state_dict()
    del state["layers.7.bias"]
    for wrong in (state, [1, 2], {**files[2].state_dict(), "extra": torch.zeros(1)}):
        torch.save(wrong, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=r"no aesthetic head: .*layers\.0\.bias"):
            read_head(str(tmp_path / "head.pth"), WIDTH)


def test_a_head_for_another_clip_is_refused(files: tuple[Path, Path, PublishedHead]):
    with pytest.raises(
        ValueError, match=r"takes 16 entries .* given \[768, 1024, 128, 64, 16, 1\]"
    ):
        read_head(str(files[1]), 768)


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def test_nothing_in_a_pth_file_is_run(tmp_path: Path):
    torch.save(Runs(tmp_path / "ran"), tmp_path / "head.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_head(str(tmp_path / "head.pth"), WIDTH)
    assert not (tmp_path / "ran").exists()


def test_problems_and_what_cannot_be_had_name_the_remedy(
    files: tuple[Path, Path, PublishedHead], monkeypatch: pytest.MonkeyPatch
):
    assert Aesthetic().problem() is None
    assert Aesthetic(model=str(files[0]), head=str(files[1])).problem() is None
    for wrong in ("absent.pth", "/absent/head.pth", "~/x/head.pth", str(files[0])):
        problem = Aesthetic(head=wrong).problem()
        assert problem is not None and "'head'" in problem and "on the hub" in problem
    problem = Aesthetic(model="./absent").problem()
    assert problem is not None and "'model'" in problem
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf download rectify-tests/absent head\.pth.*local copy"):
        reward(files, head="rectify-tests/absent/head.pth")
