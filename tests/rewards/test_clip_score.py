"""CLIPScore and PickScore on small random models in the published layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from rewards.calling import call_reward
from rewards.clip_score import ClipScore, PickScore, TextScores
from rewards.contract import DifferentiableReward

SIZE = 28
PROMPTS = ["a red cat", "dog 7"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Of cosines: the served form rounds resized pixels to 256 grey levels, the other does not.
ROUNDING = 2e-3


def save_clip(directory: Path, seed: int = 0) -> Path:
    """A random CLIP of the true architecture with its processor, as CLIPProcessor saves them."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 7},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # as published ones, images have to differ
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif name == "logit_scale":
                    parameter.fill_(np.log(50.0))
    model.save_pretrained(directory)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def videos(shape: tuple[int, ...] = (3, 40, 61, 3)) -> list[np.ndarray]:
    """Two uint8 videos of smooth coloured blobs."""
    generator = np.random.default_rng(5)
    found: list[np.ndarray] = []
    for _ in range(2):
        small = generator.integers(0, 256, (shape[0], 5, 5, shape[3]), dtype=np.uint8)
        frames = [
            Image.fromarray(frame if shape[3] == 3 else frame[..., 0]).resize((shape[2], shape[1]))
            for frame in small
        ]
        found.append(np.stack([np.asarray(frame) for frame in frames]).reshape(shape))
    return found


def in_torch(media: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(media)).float() / 255


def slopes(score: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> Any:
    """Directional derivative of each sample's score along its gradient: by autograd, measured."""
    pixels = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(pixels).sum(), pixels)
    length = gradient.flatten(1).norm(dim=1)
    step = 0.005 * (gradient.flatten(1) / length[:, None]).view_as(pixels)
    with torch.no_grad():
        measured = (score(pixels + step) - score(pixels - step)) / 0.01
    return length.numpy(), measured.numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def published(model: Path, media: list[np.ndarray], prefix: str = "") -> np.ndarray:
    """Cosines (samples, frames) by transformers' own CLIPModel and CLIPProcessor."""
    network: Any = CLIPModel.from_pretrained(model).eval()
    processor: Any = CLIPProcessor.from_pretrained(model)
    rows: list[np.ndarray] = []
    for prompt, frames in zip(PROMPTS, media, strict=True):
        images = [Image.fromarray(f if f.shape[-1] == 3 else f[..., 0]) for f in frames]
        inputs = processor(text=[prefix + prompt], images=images, return_tensors="pt")
        with torch.no_grad():
            rows.append(network(**inputs).logits_per_image[:, 0].double().numpy() / 50)
    return np.stack(rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_cosines_and_logits_are_those_of_transformers(model: Path, channels: int):
    media = videos((3, 40, 61, channels))
    want = published(model, media)
    assert np.ptp(want) > 0.05  # scores tell frames apart, so that a mistake shows
    cosine = ClipScore(model=str(model), scale="cosine").build()(PROMPTS, media)
    assert cosine == pytest.approx(want.mean(1), abs=1e-5)
    for kind in (ClipScore(model=str(model), scale="logits"), pick(model)):
        assert kind.build()(PROMPTS, media) == pytest.approx(50 * want.mean(1), abs=1e-3)


def pick(model: Path, **options: Any) -> PickScore:
    return PickScore(model=str(model), processor=str(model), **options)


def test_clipscore_is_two_and_a_half_times_the_positive_part_and_takes_a_prefix(model: Path):
    media = videos()
    plain, prefixed = (published(model, media, prefix) for prefix in ("", "photo "))
    assert (plain.mean(1) < -0.05).any() and (plain.mean(1) > 0.05).any()
    for prefix, cosines in (("", plain), ("photo ", prefixed)):
        reward = ClipScore(model=str(model), prefix=prefix).build()
        want = (2.5 * cosines.clip(min=0)).mean(1)
        assert reward(PROMPTS, media) == pytest.approx(want, abs=1e-5)
    assert np.abs(plain - prefixed).max() > 0.01


def test_flow_grpo_s_pick_score_is_divided_by_26(model: Path):
    plain = pick(model).build()(PROMPTS, videos())
    divided = pick(model, scale="flow_grpo").build()(PROMPTS, videos())
    assert divided == pytest.approx([(score or 0) / 26 for score in plain])


def test_frames_are_chosen_and_the_best_can_count(model: Path):
    media = videos((6, 28, 28, 3))
    want = published(model, media)
    options: Any = {"model": str(model), "scale": "cosine"}
    two = ClipScore(**options, frames=2).build()(PROMPTS, media)
    assert two == pytest.approx(want[:, [1, 4]].mean(1), abs=1e-5)
    best = ClipScore(**options, aggregate="top", top_fraction=1 / 6).build()(PROMPTS, media)
    assert best == pytest.approx(want.max(1), abs=1e-5)


def test_served_scores_do_not_depend_on_batches_and_may_be_of_unlike_videos(model: Path):
    media = [videos()[0], videos((5, 28, 28, 1))[1]]
    together = ClipScore(model=str(model), scale="cosine").build()
    by_two = ClipScore(model=str(model), scale="cosine", frame_batch=2).build()
    want = [together([p], [m])[0] for p, m in zip(PROMPTS, media, strict=True)]
    assert by_two(PROMPTS, media) == pytest.approx(want, abs=1e-5)
    scores = call_reward("clip", by_two, PROMPTS, media, {"digit": [1, 2]}, 64)
    assert scores.failures == () and list(scores.values) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "tolerance"),
    [((3, 28, 28, 3), 1e-5), ((3, 40, 61, 3), ROUNDING), ((2, 8, 8, 1), ROUNDING)],
)
def test_both_forms_agree_exactly_where_nothing_is_resized_else_up_to_rounding(
    model: Path, shape: tuple[int, ...], tolerance: float
):
    reward: Any = ClipScore(model=str(model), scale="cosine", frame_batch=2).build()
    media = videos(shape)
    served = reward(PROMPTS, media)
    assert isinstance(reward, DifferentiableReward)
    got = reward.differentiable(PROMPTS, in_torch(media), digit=[1, 2])
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(served, abs=tolerance)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_those_of_finite_differences(model: Path, channels: int):
    reward: Any = pick(model, aggregate="top", top_fraction=0.5).build()
    pixels = 0.25 + 0.5 * in_torch(videos((4, 33, 40, channels)))
    by_autograd, measured = slopes(lambda x: reward.differentiable(PROMPTS, x), pixels)
    assert (by_autograd > 0.1).all()
    np.testing.assert_allclose(measured, by_autograd, rtol=0.02)


def test_a_long_prompt_is_cut_at_what_the_model_reads(model: Path):
    reward = pick(model).build()
    long = "abcdefghijklmn" * 9
    media = videos()[:1]
    assert reward([long], media) == reward([long + "opq"], media)
    assert reward([long[:5]], media) != reward([long], media)


def test_half_precision_is_close(model: Path):
    full = ClipScore(model=str(model), scale="cosine").build()(PROMPTS, videos())
    half = ClipScore(model=str(model), scale="cosine", dtype="bfloat16").build()
    assert half(PROMPTS, videos()) == pytest.approx(full, abs=0.03)
    assert half(PROMPTS, videos()) != full


def test_the_older_preprocessor_file_is_read(model: Path, tmp_path: Path):
    older = tmp_path / "older"
    shutil.copytree(model, older)
    (older / "processor_config.json").unlink(missing_ok=True)
    (older / "preprocessor_config.json").write_text(
        '{"crop_size": 28, "do_center_crop": true, "do_normalize": true, "do_resize": true, '
        '"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 28, '
        '"image_mean": [0.48145466, 0.4578275, 0.40821073], '
        '"image_std": [0.26862954, 0.26130258, 0.27577711]}'
    )
    want = pick(model).build()(PROMPTS, videos())
    assert pick(older).build()(PROMPTS, videos()) == pytest.approx(want, abs=1e-4)


def test_problems_name_the_field_and_the_remedy_and_ask_no_network(model: Path, tmp_path: Path):
    assert ClipScore().problem() is None and PickScore().problem() is None
    assert pick(model).problem() is None
    for wrong in (str(tmp_path), str(tmp_path / "absent"), "~/absent", "a/b/c", ""):
        problem = ClipScore(model=wrong).problem()
        assert problem is not None and "'model'" in problem and "hub id" in problem
    problem = PickScore(model=str(model), processor="./absent").problem()
    assert problem is not None and "'processor'" in problem


def test_a_model_that_cannot_be_had_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf download rectify-tests/absent.*local directory"):
        ClipScore(model="rectify-tests/absent").build()


def test_a_directory_without_a_tokenizer_is_refused(model: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors", "processor_config.json"):
        if (model / name).exists():
            shutil.copy(model / name, tmp_path / name)
    with pytest.raises(ValueError, match="CLIPTokenizer"):
        pick(tmp_path).build()


def test_another_architecture_is_refused_and_not_filled_with_random_weights(
    model: Path, tmp_path: Path
):
    shutil.copytree(model, tmp_path / "bert")
    small: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, intermediate_size=16, vocab_size=9)).save_pretrained(
        tmp_path / "weights"
    )
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path / "bert")
    with pytest.raises(ValueError, match="is no CLIP model: it lacks"):
        pick(tmp_path / "bert").build()


def test_it_runs_on_a_gpu_only_where_it_reserves_one(model: Path):
    reward = pick(model).build()
    assert isinstance(reward, TextScores)
    assert reward.clip.model.device.type == "cpu"
    assert PickScore(gpus=0.5).device == "cuda"
