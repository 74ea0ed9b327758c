"""Digit rewards from an empty cache: training, refused media, what a set is told to lack."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import digits
from rewards.calling import call_reward
from rewards.digits import (
    FIRST_HELD_OUT,
    DigitHeldOut,
    DigitHeldOutReward,
    DigitLogProb,
    DigitLogProbReward,
    asked_digits,
    real_digits,
)

IMAGES, LABELS = real_digits()
# The generator's share, which neither classifier has learned from.
UNSEEN = [np.round(255 * i).astype(np.uint8)[None, ..., None] for i in IMAGES[:FIRST_HELD_OUT]]
ASKED = [int(label) for label in LABELS[:FIRST_HELD_OUT]]
PROMPTS = [f"a handwritten {label}" for label in ASKED]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, so that the classifier is trained by the code under test."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECTIFY_CACHE", str(root))
        yield root


@pytest.fixture(scope="module")
def log_prob(cache: Path) -> DigitLogProbReward:
    reward = DigitLogProb().build()
    assert isinstance(reward, DigitLogProbReward)
    return reward


@pytest.fixture(scope="module")
def held_out() -> DigitHeldOutReward:
    reward = DigitHeldOut().build()
    assert isinstance(reward, DigitHeldOutReward)
    return reward


def test_freshly_trained_the_network_knows_digits_it_has_not_seen(log_prob: DigitLogProbReward):
    assert (log_prob.log_probs(UNSEEN).argmax(1) == ASKED).mean() >= 0.97


def test_the_score_is_a_normalised_log_probability(log_prob: DigitLogProbReward):
    each = np.array([log_prob([""], UNSEEN[:1], digit=[d])[0] for d in range(10)], float)
    assert np.exp(each).sum() == pytest.approx(1, abs=1e-5)
    assert int(each.argmax()) == ASKED[0]


def test_samples_of_different_length_keep_their_own_frames(log_prob: DigitLogProbReward):
    clip = np.concatenate(UNSEEN[:4])
    mixed = log_prob(["3"] * 3, [UNSEEN[5], clip, UNSEEN[6]])
    frames = np.array(log_prob(["3"] * 4, UNSEEN[:4]), float)
    assert mixed[1] == pytest.approx(frames.mean(), abs=1e-5)
    assert mixed[::2] == pytest.approx(log_prob(["3"] * 2, UNSEEN[5:7]), abs=1e-5)


def test_a_video_shows_the_digit_that_most_of_it_shows(held_out: DigitHeldOutReward):
    three, eight = UNSEEN[ASKED.index(3)], UNSEEN[ASKED.index(8)]
    clip = np.concatenate([three, three, three, eight])
    assert held_out(["3", "8"], [clip, clip]) == [1.0, 0.0]


def test_the_column_goes_before_the_prompt_and_must_be_a_digit():
    assert asked_digits(["a handwritten 7", "draw 4"], [2, None]) == [2, 4]
    with pytest.raises(ValueError, match="'no number 12' names no digit"):
        asked_digits(["no number 12"], None)
    with pytest.raises(ValueError, match="-1, not an integer 0 to 9"):
        asked_digits(["a 7"], [-1])


@pytest.mark.parametrize(
    "media",
    [
        np.zeros((1, 16, 16, 1), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 1), np.float32),
    ],
)
def test_media_of_another_kind_is_refused_by_name(
    media: np.ndarray, log_prob: DigitLogProbReward, held_out: DigitHeldOutReward
):
    for reward in (log_prob, held_out):
        scores = call_reward("r", reward, ["a 3", "a 4"], [media, UNSEEN[0]], {}, 64)
        (failure,) = scores.failures
        assert failure.index == 0 and str(media.shape) in failure.message
        assert np.isfinite(scores.values[1])


def test_recalls_add_up_to_the_accuracy_which_is_the_mean_score(held_out: DigitHeldOutReward):
    described = held_out.describe_set(PROMPTS, UNSEEN, direction=["up"] * len(UNSEEN))
    recalls = [described[f"recall/{d}"] for d in range(10)]
    counts = np.bincount(ASKED, minlength=10)
    assert described["accuracy"] == pytest.approx(np.average(recalls, weights=counts))
    assert described["accuracy"] == np.mean(np.array(held_out(PROMPTS, UNSEEN), float))


def test_a_set_of_one_digit_is_far_from_all_and_its_wrong_prompts_are_told(
    held_out: DigitHeldOutReward,
):
    ones = [media for media, d in zip(UNSEEN, ASKED, strict=True) if d == 1]
    narrow = held_out.describe_set(["a 1"] * len(ones), ones)
    assert narrow["frechet"] > 20 * held_out.describe_set(PROMPTS, UNSEEN)["frechet"]
    wrong = held_out.describe_set(["a 1", "a 2"] * 40, ones[:1] * 80)
    assert (wrong["accuracy"], wrong["recall/1"], wrong["recall/2"]) == (0.5, 1.0, 0.0)
    assert "recall/3" not in wrong


def test_training_is_keyed_and_leaves_the_caller_s_randomness_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(digits, "STEPS", 5)
    weights: list[bytes] = []
    for seed in (1, 2):
        monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        DigitLogProbReward()
        assert torch.equal(torch.random.get_rng_state(), before)
        weights += [path.read_bytes() for path in (tmp_path / str(seed)).iterdir()]
    assert len(weights) == 2 and weights[0] == weights[1]


def test_what_was_trained_is_read_back_and_not_trained_again(
    log_prob: DigitLogProbReward, cache: Path
):
    (file,) = cache.iterdir()
    assert file.name == f"digit-cnn-v{digits.VERSION}.safetensors"
    before = file.stat()
    again = DigitLogProbReward().log_probs(UNSEEN[:50])
    assert np.array_equal(again, log_prob.log_probs(UNSEEN[:50]))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_two_that_train_at_once_both_get_whole_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path))
    both = threading.Barrier(2, timeout=10)
    got: list[np.ndarray] = []

    def train() -> dict[str, np.ndarray]:
        both.wait()  # neither has written before both have found the cache empty
        return {"weight": np.arange(100_000.0)}

    def race() -> None:
        got.append(digits._cached("race", train)["weight"])

    threads = [threading.Thread(target=race) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [array.sum() for array in got] == [4_999_950_000.0] * 2
    assert len(list(tmp_path.iterdir())) == 1
