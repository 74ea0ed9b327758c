"""The embedded base models: tiny Wan transformers trained on scikit-learn's handwritten digits.

The real architecture (``WanTransformer3DModel``, patch 1x2x2, about 0.6 M parameters) on real data
(UCI optical recognition of handwritten digits, 8x8 pixels), class-conditional with dropout for
classifier-free guidance. ``digits`` draws one frame, ``moving-digits`` four frames in which a digit
moves left, right, up or down by a pixel a frame. Trained once in about a minute, cached and seeded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.draws import keyed_generator
from rollout.policies.embedded import cached, ensure
from rollout.policies.wan_conditional import encode_words, null_words
from rollout.prompts import DIRECTIONS

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": 16,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
VERSION = 1
STEPS = {"digits": 400, "moving-digits": 500}
BATCH = {"digits": 128, "moving-digits": 48}
LEARNING_RATE = 4e-3
CONDITION_DROPOUT = 0.1
SEED = 0
# The first images of this permutation are the generator's; the reward classifiers learn from the
# others, so that a reward is never the memory of a training image.
PERMUTATION_SEED = 20260101
TRAINING_IMAGES = 897


def training_digits() -> tuple[np.ndarray, np.ndarray]:
    """The generator's share of the real digits: images (897, 8, 8) in [-1, 1] and labels (897,)."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    chosen = np.random.default_rng(PERMUTATION_SEED).permutation(1797)[:TRAINING_IMAGES]
    return (digits.images[chosen] / 8 - 1).astype(np.float32), digits.target[chosen]


def moving_digits(images: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Clips (B, 4, 8, 8) of ``images`` (B, 8, 8) shifted by -1 ... 2 pixels along a direction."""
    clips = np.full((len(images), 4, 8, 8), -1.0, np.float32)
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip, image, direction in zip(clips, images, directions, strict=True):
        dy, dx = steps[DIRECTIONS[direction]]
        for frame in range(4):
            y, x = dy * (frame - 1), dx * (frame - 1)
            clip[frame, max(y, 0) : 8 + min(y, 0), max(x, 0) : 8 + min(x, 0)] = image[
                max(-y, 0) : 8 - max(y, 0), max(-x, 0) : 8 - max(x, 0)
            ]
    return clips


def vocabulary(name: str) -> list[list[str]]:
    """The condition words of an embedded model, one list a slot."""
    digits = [str(d) for d in range(10)]
    return [digits] if name == "digits" else [digits, list(DIRECTIONS)]


def cached_directory(name: str) -> Path:
    """Where an embedded base is cached."""
    return cached(f"wan-{name}-v{VERSION}")


def ensure_base(name: str) -> Path:
    """The directory of an embedded base, training it first where it is not cached."""

    def train(directory: Path) -> None:
        train_base(name, STEPS[name]).save_pretrained(directory / "transformer")
        frames = 1 if name == "digits" else 4
        conditions = {"latent_shape": [1, frames, 8, 8], "vocabulary": vocabulary(name)}
        (directory / "conditions.json").write_text(json.dumps(conditions))

    return ensure(f"wan-{name}-v{VERSION}", train)


def train_base(name: str, steps: int) -> Any:
    """Train a base with the flow-matching loss ``|v - (eps - x0)|^2``; returns its EMA weights."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = WanTransformer3DModel(**TRANSFORMER)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    images, labels = training_digits()
    for step in range(steps):
        generator = keyed_generator(SEED, "base", name, step)
        x0, condition = _batch(name, images, labels, generator)
        t = torch.rand(len(x0), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        mix = t.reshape(-1, 1, 1, 1, 1)
        (velocity,) = model(
            hidden_states=(1 - mix) * x0 + mix * noise,
            timestep=(t * 1000).floor(),
            encoder_hidden_states=condition,
            return_dict=False,
        )
        loss = (velocity - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    return averaged.module


def _batch(
    name: str, images: np.ndarray, labels: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x0 (B, 1, F, 8, 8) and conditions (B, slots, width), some dropped."""
    batch = BATCH[name]
    rows = torch.randint(len(images), (batch,), generator=generator).numpy()
    words = [str(label) for label in labels[rows]]
    if name == "digits":
        clips = images[rows][:, None]
    else:
        ways = torch.randint(4, (batch,), generator=generator).numpy()
        clips = moving_digits(images[rows], ways)
        words = [f"{word} {DIRECTIONS[way]}" for word, way in zip(words, ways, strict=True)]
    slots = vocabulary(name)
    condition = encode_words(words, slots, TRANSFORMER["text_dim"])
    dropped = torch.rand(batch, generator=generator) < CONDITION_DROPOUT
    condition[dropped] = null_words(int(dropped.sum()), len(slots), TRANSFORMER["text_dim"])
    return torch.from_numpy(clips)[:, None], condition
