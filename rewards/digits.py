"""Rewards on handwritten digits: a classifier to train against, and another one that never is.

Both learn from the 900 real digits that the embedded generator has not seen. They differ in kind (a
small convolutional network; scikit-learn's support vector machine), so that what fools one need not
fool the other: when the trained reward rises and the held-out one does not, that is reward hacking.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from rewards.contract import RewardFunction, RewardSettings
from rewards.frechet import frechet_distance

if TYPE_CHECKING:
    import torch

PERMUTATION_SEED = 20260101
FIRST_HELD_OUT = 897
VERSION = 1
STEPS = 600
BATCH = 128


class DigitLogProb(RewardSettings, frozen=True, extra="forbid"):
    """Log-probability of the asked digit under a convolutional classifier."""

    differentiable: ClassVar[bool] = True

    kind: Literal["digit_log_prob"] = "digit_log_prob"

    def build(self) -> RewardFunction:
        """Train it or read it from the cache."""
        return DigitLogProbReward()


class DigitHeldOut(RewardSettings, frozen=True, extra="forbid"):
    """Whether another classifier sees the asked digit; with accuracy, recall, Fréchet distance."""

    kind: Literal["digit_held_out"] = "digit_held_out"

    def build(self) -> RewardFunction:
        """Fit it."""
        return DigitHeldOutReward()


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 real digits in the order of the split: images (n, 8, 8) in [0, 1], labels (n,)."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(PERMUTATION_SEED).permutation(1797)
    return (digits.images[order] / 16).astype(np.float32), digits.target[order]


def asked_digits(prompts: list[str], digit: list[int | None] | None) -> list[int]:
    """The digit of each sample: the column, or the first one in the prompt.

    Raises:
        ValueError: neither names a digit, or the column has something else than 0 to 9.
    """
    asked: list[int] = []
    for position, prompt in enumerate(prompts):
        given = digit[position] if digit is not None else None
        if given is None:
            found = re.search(r"\b\d\b", prompt)
            if found is None:
                raise ValueError(f"prompt {prompt!r} names no digit and there is no column 'digit'")
            given = int(found.group())
        if given not in range(10):
            raise ValueError(
                f"column 'digit' of prompt {prompt!r} is {given!r}, not an integer 0 to 9"
            )
        asked.append(int(given))
    return asked


def pixels_of(completions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (all frames, 64) in [0, 1], and the frame (n - 1,) at which each next sample begins.

    Raises:
        ValueError: a completion is not uint8 (frames, 8, 8, 1).
    """
    for media in completions:
        # Any other size would pass the reshape and be scored as if it were more frames.
        if media.dtype != np.uint8 or media.ndim != 4 or media.shape[1:] != (8, 8, 1):
            raise ValueError(
                f"digit rewards take uint8 (frames, 8, 8, 1), not {media.dtype} {media.shape}"
            )
    pixels = np.concatenate(completions).reshape(-1, 64).astype(np.float32) / 255
    return pixels, np.cumsum([len(media) for media in completions])[:-1]


class DigitLogProbReward:
    """A small CNN; scores the mean log-probability over the frames of a sample."""

    def __init__(self) -> None:
        import torch

        self.network = _network()
        arrays = _cached("cnn", _train_network)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.network.load_state_dict(state)
        self.network.eval().requires_grad_(False)

    def __call__(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        digit: list[int | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Log-probabilities of the asked digits, for media uint8 (F, 8, 8, 1)."""
        log_probs = self.log_probs(completions)
        asked = asked_digits(prompts, digit)
        return [float(row[label]) for row, label in zip(log_probs, asked, strict=True)]

    def log_probs(self, completions: list[np.ndarray]) -> np.ndarray:
        """(n, 10), averaged over frames."""
        import torch

        pixels, starts = pixels_of(completions)
        frames = torch.from_numpy(pixels.reshape(-1, 1, 8, 8))
        out = self.network(frames).log_softmax(-1).numpy()
        return np.stack([part.mean(0) for part in np.split(out, starts)])

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (n, 10) averaged over frames, of pixels (n, F, 8, 8, 1) in [0, 1]."""
        frames = pixels.movedim(-1, 2).flatten(0, 1)
        out = self.network(frames).log_softmax(-1)
        return out.unflatten(0, pixels.shape[:2]).mean(1)

    def differentiable(
        self,
        prompts: list[str],
        pixels: torch.Tensor,
        digit: list[int | None] | None = None,
        **columns: Any,
    ) -> torch.Tensor:
        """See ``rewards.contract.DifferentiableReward``."""
        import torch

        asked = torch.tensor(asked_digits(prompts, digit), device=pixels.device)
        return self.logits(pixels).gather(1, asked[:, None])[:, 0]


class DigitHeldOutReward:
    """scikit-learn's support vector classifier; 1 where it sees the asked digit, else 0.

    Fitted in a second on the held-out real digits and copies of them shifted by a pixel. Its 45
    pairwise margins are the features of the Fréchet distance.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        images, labels = real_digits()
        images, labels = images[FIRST_HELD_OUT:], labels[FIRST_HELD_OUT:]
        shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
        shifted = [_shift(image, *shift) for shift in shifts for image in images]
        self.model: Any = SVC(
            C=10,
            gamma=0.25,  # type: ignore[arg-type]
            decision_function_shape="ovo",
        )
        self.model.fit(np.stack(shifted).reshape(-1, 64), np.tile(labels, len(shifts)))

    def __call__(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        digit: list[int | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Correctness: the mean of many is the accuracy."""
        asked = asked_digits(prompts, digit)
        _, seen = self._look(completions)
        return [float(a == b) for a, b in zip(asked, seen, strict=True)]

    def describe_set(
        self,
        prompts: list[str],
        completions: list[np.ndarray],
        digit: list[int | None] | None = None,
        **columns: Any,
    ) -> dict[str, float]:
        """accuracy, frechet (to all real digits, in features), recall/<digit>, diversity.

        Diversity is the root mean square distance between features of two samples of one digit,
        averaged over digits, relative to the real ones.
        """
        asked = np.array(asked_digits(prompts, digit))
        features, seen = self._look(completions)
        images, labels = real_digits()
        real = self.margins(images.reshape(-1, 64))
        metrics = {
            "accuracy": float((seen == asked).mean()),
            "frechet": frechet_distance(features, real),
        }
        for label in np.unique(asked):
            metrics[f"recall/{label}"] = float((seen == asked)[asked == label].mean())
        common = [label for label in range(10) if (asked == label).sum() > 1]
        if common:
            drawn = np.mean([_spread(features[asked == label]) for label in common])
            metrics["diversity"] = float(
                drawn / np.mean([_spread(real[labels == label]) for label in common])
            )
        return metrics

    def margins(self, pixels: np.ndarray) -> np.ndarray:
        """Features (n, 45) of pixels (n, 64) in [0, 1]."""
        return self.model.decision_function(pixels)

    def _look(self, completions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features averaged over the frames of each sample, and the digit they vote for."""
        pixels, starts = pixels_of(completions)
        features = np.stack([part.mean(0) for part in np.split(self.margins(pixels), starts)])
        return features, votes(features)


def votes(margins: np.ndarray) -> np.ndarray:
    """The digit (n,) that wins most of the pairwise comparisons (n, 45), ties by total margin."""
    pairs = [(i, j) for i in range(10) for j in range(i + 1, 10)]
    score = np.zeros((len(margins), 10))
    for column, (i, j) in enumerate(pairs):
        margin = margins[:, column]
        score[:, i] += (margin > 0) + 1e-3 * np.tanh(margin)
        score[:, j] += (margin <= 0) - 1e-3 * np.tanh(margin)
    return score.argmax(1)


def _spread(features: np.ndarray) -> float:
    """RMS distance between two of (n, d): from the variance, which needs no n x n table."""
    return float(np.sqrt(2 * features.var(0, ddof=1).sum()))


def _network() -> torch.nn.Sequential:
    """Always the same start; the caller's random state is left as it was."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def _augmented(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out digits (count, 8, 8), shifted by up to a pixel, dimmed and with a little noise."""
    images, labels = real_digits()
    rows = generator.integers(FIRST_HELD_OUT, len(images), count)
    chosen = images[rows]
    shifts = generator.integers(-1, 2, (count, 2)) * (generator.random((count, 1)) < 0.3)
    moved = np.stack([_shift(i, dy, dx) for i, (dy, dx) in zip(chosen, shifts, strict=True)])
    moved = moved * generator.uniform(0.8, 1.1, (count, 1, 1))
    moved = moved + 0.05 * generator.standard_normal(moved.shape)
    return moved.clip(0, 1).astype(np.float32), labels[rows]


def _shift(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    padded = np.pad(image, 1)
    return padded[1 - dy : 9 - dy, 1 - dx : 9 - dx]


def _train_network() -> dict[str, np.ndarray]:
    import torch

    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        images, labels = _augmented(generator, BATCH)
        logits = network(torch.from_numpy(images)[:, None])
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def _cached(name: str, train: Any) -> dict[str, np.ndarray]:
    """Arrays from the cache, trained first where it has none; two processes may race."""
    from safetensors.numpy import load_file, save_file

    root = os.environ.get("RECTIFY_CACHE") or Path.home() / ".cache" / "rectify"
    target = Path(root) / f"digit-{name}-v{VERSION}.safetensors"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = train()
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        os.close(handle)
        save_file(arrays, scratch)
        Path(scratch).replace(target)
    return load_file(target)
