"""HPSv3's regressor on a small random Qwen2-VL, with weights named as HPSv3 publishes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from rewards.calling import call_reward
from rewards.contract import DifferentiableReward
from rewards.vlm_score import VlmScore

WIDTH = 32
PIXELS = 6 * 28 * 28
PROMPTS = ["a red cat", "two dogs, one of them much larger than the other"]
SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# The part of Qwen2-VL's template that a turn with one image needs.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE = "\nRate the picture of: {text_prompt}\n\n\nRating: <|Reward|>\n\nEND\n"


class PublishedHead(torch.nn.Module):
    """HPSv3's rm_head of type ranknet (3584 entries there, and 1024)."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.rm_head = nn.Sequential(
            nn.Linear(WIDTH, 24),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )


def save_base(directory: Path) -> Any:
    """Configuration, tokenizer and image processor, as Qwen2-VL's repository has them."""
    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer: Any = Qwen2Tokenizer(vocab=words, merges=[], chat_template=CHAT)
    tokenizer.add_tokens(["<|endoftext|>", "<|im_end|>", *SPECIAL], special_tokens=True)
    tokenizer.save_pretrained(directory)
    config: dict[str, Any] = {
        "model_type": "qwen2_vl",
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": WIDTH,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": 320,
    }
    for name, token in (
        ("image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
        ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"),
        ("bos", "<|endoftext|>"),
        ("eos", "<|im_end|>"),
    ):
        config[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(
        '{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, '
        '"merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073], '
        '"image_std": [0.26862954, 0.26130258, 0.27577711], '
        '"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}'
    )
    return Qwen2VLConfig.from_pretrained(directory)


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of transformers 4.45, which HPSv3 has."""
    renamed = {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
        for k, v in state.items()
    }
    assert {k.split(".")[0] for k in renamed} == {"visual", "model", "lm_head"}
    return renamed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, template.txt, HPSv3.safetensors; and the network in network.pt."""
    directory = tmp_path_factory.mktemp("vlm")
    config = save_base(directory / "base")
    config.text_config.vocab_size = len(AutoTokenizer.from_pretrained(directory / "base")) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Qwen2VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:  # what is seen has to show in the score
                    parameter.add_(0.15 * torch.randn_like(parameter))
        head = PublishedHead()
    state = {**published_names(network.state_dict()), **head.state_dict()}
    save_file(state, directory / "HPSv3.safetensors")
    (directory / "template.txt").write_text(TEMPLATE)
    return directory


def settings(files: Path, **options: Any) -> VlmScore:
    given: dict[str, Any] = {
        "model": str(files / "base"),
        "checkpoint": str(files / "HPSv3.safetensors"),
        "template": files / "template.txt",
        "dtype": "float32",
        "pixels": PIXELS,
    }
    return VlmScore(**{**given, **options})


def pictures(shape: tuple[int, ...] = (2, 60, 84, 3)) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in PROMPTS]


def network_of(files: Path) -> tuple[Any, PublishedHead]:
    """transformers' own model with the checkpoint's weights under today's names, and the head."""
    state = load_file(files / "HPSv3.safetensors")
    head = PublishedHead()
    head.load_state_dict({k: state.pop(k) for k in list(state) if k.startswith("rm_head")})
    config: Any = Qwen2VLConfig.from_pretrained(files / "base")
    config.text_config.vocab_size = len(state["lm_head.weight"])
    network = Qwen2VLForConditionalGeneration(config)
    network.load_state_dict(
        {
            "model." + k.replace("model.", "language_model.") if k != "lm_head.weight" else k: v
            for k, v in state.items()
        }
    )
    return network.eval(), head.eval()


def by_hand(files: Path, prompt: str, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(mu, sigma) as HPSv3RewardInferencer computes them for one picture."""
    network, head = network_of(files)
    tokenizer: Any = AutoTokenizer.from_pretrained(files / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    # Resized to the pixels asked for first; the processor then finds nothing to do.
    image = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    images = Qwen2VLImageProcessorPil()(images=[image], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, size[1] // 14, size[0] // 14]]
    count = size[0] * size[1] // 28**2
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        f"\nRate the picture of: {prompt}\n\n\nRating: <|Reward|>\n\nEND\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded = network.model.language_model.embed_tokens(ids)
        seen = network.model.visual(
            images["pixel_values"], grid_thw=images["image_grid_thw"]
        ).pooler_output
        embedded[ids == network.config.image_token_id] = seen
        # Without position_ids the language model counts tokens, as transformers 4.45's did.
        hidden = network.model.language_model(inputs_embeds=embedded).last_hidden_state
        place = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))
        return head.rm_head(hidden[0, place]).numpy()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 60, 84, 3), (84, 56)), ((2, 150, 100, 3), (56, 84)), ((2, 31, 45, 3), (84, 84))],
)
def test_scores_are_the_head_of_the_hidden_state_at_the_reward_token(
    files: Path, shape: tuple[int, ...], size: tuple[int, int]
):
    media = pictures(shape)
    outputs = np.array(
        [
            [by_hand(files, prompt, frame, size) for frame in frames]
            for prompt, frames in zip(PROMPTS, media, strict=True)
        ]
    )
    assert np.ptp(outputs[..., 0], axis=0).min() > 2e-3  # so that a mistake shows
    assert np.abs(outputs[..., 0] - outputs[..., 1]).min() > 2e-3
    reward = settings(files).build()
    assert reward(PROMPTS, media) == pytest.approx(outputs[..., 0].mean(1), abs=1e-5)
    best = settings(files, aggregate="top", top_fraction=0.5).build()
    assert best(PROMPTS, media) == pytest.approx(outputs[..., 0].max(1), abs=1e-5)
    assert not isinstance(reward, DifferentiableReward) and not settings(files).has_gradient()


def test_positions_are_not_qwen2_vl_s_three_dimensional_ones(files: Path):
    reward: Any = settings(files).build()
    regressor = reward.regressor
    frame = pictures((1, 56, 84, 3))[0]
    images = regressor.images(images=[Image.fromarray(frame[0])], return_tensors="pt")
    text = regressor.text(PROMPTS[0]).replace("<|image_pad|>", "<|image_pad|>" * 6)
    ids = regressor.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = regressor.model(
            input_ids=ids,
            mm_token_type_ids=(ids == regressor.model.config.image_token_id).int(),
            **images,
        ).last_hidden_state[ids == regressor.reward_token]
    (weight, bias), *rest = regressor.head
    for layer in rest:
        hidden = torch.nn.functional.linear(hidden, weight, bias).relu()
        weight, bias = layer
    other = torch.nn.functional.linear(hidden, weight, bias)[0, 0]
    assert abs(float(other) - reward(PROMPTS[:1], [frame])[0]) > 1e-3


def test_prompt_and_picture_both_count(files: Path):
    reward = settings(files).build()
    first, second = pictures((1, 60, 84, 3))
    scores = reward([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [first, first, second])
    assert len({round(score or 0, 4) for score in scores}) == 3


def test_a_sample_s_score_does_not_depend_on_its_batch(files: Path):
    reward = settings(files, frame_batch=3).build()
    media = [pictures()[0], pictures((3, 120, 40, 1))[1]]
    alone = [reward([p], [m])[0] for p, m in zip(PROMPTS, media, strict=True)]
    assert reward(PROMPTS, media) == pytest.approx(alone, abs=1e-5)
    scores = call_reward("vlm", reward, PROMPTS, media, {"digit": [1, 2]}, 64)
    assert scores.failures == () and list(scores.values) == pytest.approx(alone, abs=1e-5)


def test_a_pth_checkpoint_under_the_key_model_is_the_same(files: Path, tmp_path: Path):
    torch.save({"model": load_file(files / "HPSv3.safetensors")}, tmp_path / "HPSv3.pth")
    want = settings(files).build()(PROMPTS, pictures())
    assert settings(files, checkpoint=str(tmp_path / "HPSv3.pth")).build()(
        PROMPTS, pictures()
    ) == pytest.approx(want, abs=1e-6)


def test_half_precision_is_close_and_the_head_stays_fp32(files: Path):
    full = settings(files).build()(PROMPTS, pictures())
    half: Any = settings(files, dtype="bfloat16").build()
    assert half(PROMPTS, pictures()) == pytest.approx(full, abs=0.1)
    assert half.regressor.model.dtype == torch.bfloat16
    assert {weight.dtype for weight, _ in half.regressor.head} == {torch.float32}


def changed(files: Path, directory: Path, **changes: torch.Tensor | None) -> str:
    """A copy of the checkpoint, with a key's tensor replaced, or left out; dots are written __."""
    state = load_file(files / "HPSv3.safetensors")
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    save_file(state, directory / "changed.safetensors")
    return str(directory / "changed.safetensors")


def test_one_linear_layer_is_a_head_too(files: Path, tmp_path: Path):
    state = load_file(files / "HPSv3.safetensors")
    none: dict[str, Any] = {k.replace(".", "__"): None for k in state if k.startswith("rm_head")}
    checkpoint = changed(files, tmp_path, **none, rm_head__weight=torch.eye(WIDTH)[4:5].clone())
    reward: Any = settings(files, checkpoint=checkpoint).build()
    whole: Any = settings(files).build()
    whole.regressor.head = [(torch.eye(WIDTH), None)]
    frames = [frame for media in pictures((1, 56, 84, 3)) for frame in media]
    hidden = whole.regressor.outputs(frames, [whole.regressor.text(p) for p in PROMPTS])
    assert reward(PROMPTS, pictures((1, 56, 84, 3))) == pytest.approx(hidden[:, 4].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head__0__weight": torch.ones(24, 31)}, r"rm_head\.0\.weight .* takes 31 .* given 32"),
        ({"rm_head__2__out__weight": torch.ones(2, 16)}, r"no head: .*known are rm_head\.weight"),
        ({"model__norm__weight": None}, r"missing keys model\.language_model\.norm\.weight"),
        ({"model__norm__bias": torch.ones(32)}, r"unexpected keys .*norm\.bias and 0 more"),
        ({"model__embed_tokens__weight": torch.ones(300, 32)}, r"\[300\] words.* has 264"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_made_up(
    files: Path, tmp_path: Path, change: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        settings(files, checkpoint=changed(files, tmp_path, **change)).build()


def test_a_checkpoint_without_a_head_is_refused(files: Path, tmp_path: Path):
    none: dict[str, Any] = {
        k.replace(".", "__"): None
        for k in load_file(files / "HPSv3.safetensors")
        if k.startswith("rm_head")
    }
    with pytest.raises(ValueError, match=r"no head: of its \d+ keys \[\] begin with"):
        settings(files, checkpoint=changed(files, tmp_path, **none)).build()


@pytest.mark.parametrize(
    "text", ["no place <|Reward|>", "{text_prompt} but no token", "<|Reward|> {text_prompt}"]
)
def test_a_template_has_the_prompt_s_place_and_then_the_reward_token(
    files: Path, tmp_path: Path, text: str
):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=r"needs \{text_prompt\} and after it, once"):
        settings(files, template=tmp_path / "t.txt").build()


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>"])
def test_a_prompt_with_a_token_of_the_model_s_is_refused(files: Path, token: str):
    reward = settings(files).build()
    with pytest.raises(ValueError, match="token of the model's"):
        reward([f"a {token}"], pictures()[:1])


def test_a_tokenizer_without_a_chat_template_is_refused(files: Path, tmp_path: Path):
    base = shutil.copytree(files / "base", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        settings(files, model=str(base)).build()


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def test_nothing_in_a_pth_file_is_run(files: Path, tmp_path: Path):
    torch.save(Runs(tmp_path / "ran"), tmp_path / "HPSv3.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        settings(files, checkpoint=str(tmp_path / "HPSv3.pth")).build()
    assert not (tmp_path / "ran").exists()


def test_problems_and_what_cannot_be_had_name_the_remedy(
    files: Path, monkeypatch: pytest.MonkeyPatch
):
    assert settings(files).problem() is None
    assert VlmScore(template=files / "template.txt").problem() is None
    for wrong in ({"model": "./absent"}, {"checkpoint": "/absent.pth"}, {"template": Path("no")}):
        problem = settings(files, **wrong).problem()
        assert problem is not None and repr(next(iter(wrong))) in problem
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf download rectify-tests/absent HPSv3\.pth"):
        settings(files, checkpoint="rectify-tests/absent/HPSv3.pth").build()
    with pytest.raises(ValueError, match=r"hf download rectify-tests/absent"):
        settings(files, model="rectify-tests/absent").build()


def test_the_default_is_hpsv3(files: Path):
    default = VlmScore(template=files / "template.txt")
    assert (default.checkpoint, default.reward_token) == (
        "MizzenAI/HPSv3/HPSv3.safetensors",
        "<|Reward|>",
    )
    assert (default.pixels, default.dtype, default.device) == (200704, "bfloat16", "cpu")
