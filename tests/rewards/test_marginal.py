"""The marginal reward: its weights, its two forms, gradients, and what it says of a set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rewards.calling import call_reward
from rewards.contract import ClassifierReward, DifferentiableReward, SetMetric
from rewards.digits import DigitLogProb, real_digits
from rewards.marginal import Marginal, MarginalReward

EVEN = (0.1,) * 10
SKEW = (0.28, 0.08) * 2 + (0.28,) + (0.0,) * 5
POINT = (0.0,) * 3 + (1.0,) + (0.0,) * 6


def reward(target: tuple[float, ...] = SKEW, base: tuple[float, ...] = EVEN) -> MarginalReward:
    built = Marginal(target=target, base=base).build()
    assert isinstance(built, MarginalReward)
    return built


def media(count: int = 60) -> tuple[list[np.ndarray], np.ndarray]:
    """Real digits as completions of one frame, and their labels."""
    images, labels = real_digits()
    frames = (images[-count:] * 255).round().astype(np.uint8)
    return list(frames[:, None, :, :, None]), labels[-count:]


def pixels(completions: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(completions)).float() / 255


def test_a_score_is_the_log_of_the_expected_weight():
    completions, labels = media()
    classifier: Any = DigitLogProb().build()
    posterior = np.exp(classifier.log_probs(completions).astype(np.float64))
    expected = np.log(posterior @ (np.array(SKEW) / 0.1))
    scores = reward()([""] * len(completions), completions)
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-4)
    wanted = [s for s, label in zip(scores, labels, strict=True) if s is not None and label == 0]
    assert np.median(wanted) == pytest.approx(np.log(2.8), abs=0.05)


def test_served_and_differentiable_scores_are_the_same_numbers():
    completions, _ = media()
    marginal = reward()
    assert isinstance(marginal, DifferentiableReward) and isinstance(marginal, SetMetric)
    assert isinstance(marginal.classifier, ClassifierReward)
    scores = marginal.differentiable([""] * len(completions), pixels(completions))
    assert scores.tolist() == marginal([""] * len(completions), completions, digit=[None] * 60)
    served = call_reward("marginal", marginal, [""] * 60, completions, {"digit": [3] * 60}, 64)
    assert served.failures == () and list(served.values) == pytest.approx(scores.tolist())


def test_the_tilted_law_is_normalised_where_the_base_is_the_mean_posterior():
    completions, _ = media(200)
    found = reward().describe_set([""] * 200, completions)
    base = np.array([found[f"marginal/{label}"] for label in range(10)])
    target = (0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.0)
    marginal = reward(target, tuple((base / base.sum()).tolist()))
    weights = np.exp(marginal([""] * 200, completions))  # pyright: ignore
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    # E_p'[p(y|x)] need not be the target, but the label whose law is w(y) p(y|x) p(x) has it.
    logits = marginal.classifier.logits(pixels(completions)).softmax(-1).numpy()
    assert (logits * np.array(target) / base).mean(0) == pytest.approx(target, abs=1e-4)


def test_gradients_point_at_wanted_digits_and_are_finite_with_unwanted_ones():
    completions, labels = media()
    start = pixels(completions).requires_grad_()
    for target in (SKEW, POINT):
        marginal = reward(target)
        scores = marginal.differentiable([""] * len(completions), start)
        (gradient,) = torch.autograd.grad(scores.sum(), start)
        assert scores.isfinite().all() and gradient.isfinite().all()
        unwanted = torch.from_numpy(labels == 7)
        assert gradient[unwanted].abs().amax() > 1e-2
        moved = (start + 0.02 * gradient.sign())[unwanted].detach()
        gained = marginal.differentiable([""] * len(moved), moved) - scores[unwanted]
        assert (gained > 0).all()


def test_a_point_mass_is_the_log_probability_of_its_digit():
    completions, _ = media()
    classifier: Any = DigitLogProb().build()
    wanted = classifier([""] * 60, completions, digit=[3] * 60)
    # Up to the constant log 1/base.
    assert reward(POINT)([""] * 60, completions) == pytest.approx(
        np.array(wanted) + np.log(10), abs=1e-4
    )


def test_the_target_that_is_the_base_is_worth_nothing_anywhere():
    completions, _ = media()
    start = pixels(completions).requires_grad_()
    scores = reward(EVEN, EVEN).differentiable([""] * 60, start)
    (gradient,) = torch.autograd.grad(scores.sum(), start)
    assert torch.equal(scores, torch.zeros(60)) and torch.equal(gradient, torch.zeros_like(start))


def test_a_set_has_its_marginal_and_the_distance_to_the_target():
    completions, labels = media(400)
    threes = [m for m, label in zip(completions, labels, strict=True) if label == 3]
    described = reward(POINT).describe_set([""] * len(threes), threes)
    assert described["marginal/3"] > 0.95
    assert described["total_variation"] == pytest.approx(1 - described["marginal/3"], abs=1e-6)
    assert sum(described[f"marginal/{label}"] for label in range(10)) == pytest.approx(1)
    far = reward(POINT[-1:] + POINT[:-1]).describe_set([""] * len(threes), threes)
    assert far["total_variation"] > 0.95


@pytest.mark.parametrize(
    ("target", "base", "words"),
    [
        ((0.5, 0.5), EVEN, "target has 2 entries; digit_log_prob knows 10 classes"),
        (EVEN, (1.0,), "base has 1 entries"),
        ((0.2,) * 10, EVEN, "target sums to 2, not to 1"),
        (EVEN, (0.1,) * 9 + (0.10001,), r"base sums to 1\.00001"),
        ((1.1, -0.1) + (0.0,) * 8, EVEN, "target has 1.1: probabilities are from 0 to 1"),
        ((float("nan"),) * 10, EVEN, "target has nan"),
        (POINT, SKEW[:3] + (0.0, 0.36) + (0.0,) * 5, "wants class 3, which base never has"),
    ],
)
def test_what_is_no_pair_of_distributions_is_refused(
    target: tuple[float, ...], base: tuple[float, ...], words: str
):
    with pytest.raises(ValidationError, match=words):
        Marginal(target=target, base=base)


def test_rounding_within_a_millionth_is_accepted_and_a_class_neither_has_is_fine():
    assert Marginal(target=(0.1000001, *EVEN[1:]), base=EVEN).target[0] == 0.1000001
    narrow = Marginal(target=POINT, base=(0.0, 0.0, 0.5, 0.5) + (0.0,) * 6).build()
    completions, labels = media(40)
    scores = narrow([""] * 40, completions)
    threes = [s for s, label in zip(scores, labels, strict=True) if label == 3 and s is not None]
    assert threes and max(threes) == pytest.approx(math.log(2), abs=1e-3)


def test_other_media_are_refused():
    completions, _ = media(2)
    for wrong in (
        [completions[0].astype(np.float32)],
        [completions[0][0]],
        [completions[0], np.concatenate([completions[1]] * 2)],
        [],
    ):
        with pytest.raises(ValueError, match="media must be uint8"):
            reward()([""] * len(wrong), wrong)
