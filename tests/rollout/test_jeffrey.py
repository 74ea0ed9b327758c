"""Jeffrey guidance: exact on a mixture of Gaussians, and on a skewed generator of real digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest, norm
from torch import Tensor, nn

from rewards.digits import DigitHeldOutReward, votes
from rollout.draws import keyed_generator
from rollout.flow import shifted_sigmas
from rollout.guidance.jeffrey import (
    corrected_velocity,
    jeffrey_potential,
    log_ratio,
    marginal_of,
)
from rollout.policies.digits import training_digits
from rollout.policies.wan_conditional import WanPolicy

# A mixture on the line.
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-3.0, 2.0], dtype=torch.float64)
STDS = torch.tensor([0.6, 0.4], dtype=torch.float64)
EVEN = torch.tensor([0.5, 0.5], dtype=torch.float64)


def component_logits(x: Tensor, t: float) -> Tensor:
    """log p(k, x_t), exact."""
    variance = ((1 - t) * STDS) ** 2 + t**2
    deviation = x[:, None] - (1 - t) * MEANS
    return SHARES.log() - variance.log() / 2 - deviation.square() / (2 * variance)


def component_velocities(x: Tensor, t: float) -> Tensor:
    variance = ((1 - t) * STDS) ** 2 + t**2
    deviation = x[:, None] - (1 - t) * MEANS
    return (t - (1 - t) * STDS**2) * deviation / variance - MEANS


def mixture_velocity(x: Tensor, t: float) -> Tensor:
    return (component_logits(x, t).softmax(-1) * component_velocities(x, t)).sum(-1)


def correction(x: Tensor, t: float, ratio: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    potential = jeffrey_potential(component_logits(leaf, t), ratio)
    (gradient,) = torch.autograd.grad(potential.sum(), leaf)
    return gradient


def drawn(target: Tensor, count: int = 2000, steps: int = 300) -> np.ndarray:
    """Samples at the quantiles of the start noise: the flow on a line keeps their order."""
    ratio = log_ratio(target, SHARES)
    x = torch.from_numpy(ndtri((np.arange(count) + 0.5) / count))
    for before, after in itertools.pairwise(shifted_sigmas(steps, 1.0)):
        guided = corrected_velocity(
            mixture_velocity(x, before), correction(x, before, ratio), before
        )
        middle = (before + after) / 2
        half = x - (before - middle) * guided
        guided = corrected_velocity(
            mixture_velocity(half, middle), correction(half, middle, ratio), middle
        )
        x = x - (before - after) * guided
    return x.numpy()


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("target", [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_the_corrected_velocity_is_that_of_the_reweighted_mixture(
    t: float, target: tuple[float, float]
):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    wanted = torch.tensor(target, dtype=torch.float64)
    ratio = log_ratio(wanted, SHARES)
    got = corrected_velocity(mixture_velocity(x, t), correction(x, t, ratio), t)
    posterior = (component_logits(x, t) + ratio).softmax(-1)
    assert torch.allclose(got, (posterior * component_velocities(x, t)).sum(-1), atol=1e-9)
    assert (got - mixture_velocity(x, t)).abs().max() > 1e-2


def test_a_mixture_of_three_and_seven_tenths_becomes_even_and_its_components_stay():
    before, after = drawn(SHARES), drawn(EVEN)
    assert (before < 0).mean() == pytest.approx(0.3, abs=2e-3)
    assert (after < 0).mean() == pytest.approx(0.5, abs=2e-3)
    for k, part in enumerate((after[after < 0], after[after >= 0])):
        mean, std = float(MEANS[k]), float(STDS[k])
        assert part.mean() == pytest.approx(mean, abs=0.01)
        assert part.std() == pytest.approx(std, rel=0.015)
        # The quantiles leave no sampling noise: the distance is that of the solver.
        assert kstest(part, norm(mean, std).cdf).statistic < 5e-3  # pyright: ignore


def test_weights_of_one_correct_nothing_at_all():
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    ratio = log_ratio(SHARES, SHARES.clone())
    assert torch.equal(ratio, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(jeffrey_potential(component_logits(x, 0.4), ratio), torch.zeros_like(x))
    assert torch.equal(correction(x, 0.4, ratio), torch.zeros_like(x))


def test_a_point_mass_is_classifier_guidance():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    point = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    gradients: list[Tensor] = []
    for score in (
        lambda z: jeffrey_potential(z, log_ratio(point, base)),
        lambda z: z.log_softmax(-1)[:, 2],
    ):
        leaf = logits.clone().requires_grad_()
        gradients += torch.autograd.grad(score(leaf).sum(), leaf)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0.1


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(ValueError, match=r"never has classes \[1\]"):
        log_ratio(EVEN, torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="must be"):
        log_ratio(EVEN, torch.ones(3) / 3)
    for t in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="score correction"):
            corrected_velocity(torch.zeros(2), torch.zeros(2), t)
    with pytest.raises(ValueError, match="at least one sample"):
        marginal_of(torch.zeros(0, 3))


def test_a_marginal_is_the_mean_posterior_with_half_a_sample_of_each_class():
    logits = torch.tensor([[0.9, 0.1, 1e-30], [0.5, 0.5, 1e-30]]).log() + 7
    expected = torch.tensor([1.4 + 0.5, 0.6 + 0.5, 0.5], dtype=torch.float64) / 3.5
    assert torch.allclose(marginal_of(logits), expected)
    assert torch.allclose(marginal_of(logits, 0.0)[:2].float(), torch.tensor([0.7, 0.3]))


# Real digits: a generator that draws 0 and 4 four times as often as 2 and 6.
DIGITS = (0, 2, 4, 6)
SKEW = torch.tensor([0.4, 0.1, 0.4, 0.1])
CHI_SQUARE_3 = 16.27  # exceeded once in a thousand times


class NoisyClassifier(nn.Module):
    """p(digit | x_t), all equally likely before; see ``rollout.guidance.jeffrey`` for the factor."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((64 + 8, 192), (192, 192), (192, len(DIGITS)))
        layers = [part for size in sizes for part in (nn.Linear(*size), nn.SiLU())]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        scale = ((1 - t) ** 2 / 4 + t**2).sqrt()
        angles = t * torch.arange(1, 5) * math.pi
        features = torch.cat([x.flatten(1) / scale, angles.sin(), angles.cos()], 1)
        return (1 - t) / scale * self.network(features)


@dataclass
class SkewedDigits:
    """p(x) = sum_k SKEW_k p(x|k) of the embedded class-conditional model."""

    policy: WanPolicy
    classifier: NoisyClassifier

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        return self.classifier(x, t) + SKEW.log()

    def velocity(self, x: Tensor, t: Tensor, posterior: Tensor) -> Tensor:
        """sum_k p(k|x_t) v(x_t, t | k), over the classes that matter."""
        weights = posterior * (posterior > 0.02)
        weights = weights / weights.sum(1, keepdim=True)
        row, label = weights.nonzero(as_tuple=True)
        conditions = self.policy.encode([str(DIGITS[k]) for k in label.tolist()])
        v = self.policy.velocity(x[row], t[row], conditions)
        return torch.zeros_like(x).index_add(
            0, row, v * weights[row, label].reshape(-1, 1, 1, 1, 1)
        )

    def draw(self, count: int, seed: int, ratio: Tensor | None) -> Tensor:
        x = torch.randn(count, 1, 1, 8, 8, generator=keyed_generator(seed, "start"))
        for before, after in itertools.pairwise(shifted_sigmas(16, 3.0)):
            t = torch.full((count,), before)
            leaf = x.requires_grad_()
            logits = self.logits(leaf, t)
            with torch.no_grad():
                v = self.velocity(x, t, logits.softmax(-1))
            if ratio is not None:
                (c,) = torch.autograd.grad(jeffrey_potential(logits, ratio).sum(), leaf)
                v = corrected_velocity(v, c, before)
            x = (x - (before - after) * v).detach()
        return x


def class_samples(policy: WanPolicy, each: int) -> tuple[Tensor, Tensor]:
    """The conditional model's own samples (n, 8, 8) of each class, and their places in DIGITS."""
    labels = torch.arange(len(DIGITS)).repeat_interleave(each)
    condition = policy.encode([str(DIGITS[k]) for k in labels.tolist()])
    x = torch.randn(len(labels), 1, 1, 8, 8, generator=keyed_generator(1, "classes"))
    for before, after in itertools.pairwise(shifted_sigmas(12, 3.0)):
        x = x - (before - after) * policy.velocity(x, torch.full((len(x),), before), condition)
    return x.reshape(-1, 8, 8), labels


def trained_classifier(images: Tensor, labels: Tensor, steps: int = 800) -> NoisyClassifier:
    generator = keyed_generator(0, "noisy classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = NoisyClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (256,), generator=generator)
        t = torch.rand(256, generator=generator)
        noise = torch.randn(256, 8, 8, generator=generator)
        mix = t[:, None, None]
        logits = classifier((1 - mix) * images[rows] + mix * noise, t)
        loss = nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def skewed(base_policy: WanPolicy) -> SkewedDigits:
    """Its classifier knows the generator's training digits and the generator's own samples."""
    images, digits = training_digits()
    chosen = np.isin(digits, DIGITS)
    places = torch.from_numpy(np.searchsorted(DIGITS, digits[chosen]))
    with torch.no_grad():
        own, labels = class_samples(base_policy, 200)
    classifier = trained_classifier(
        torch.cat([torch.from_numpy(images[chosen]), own]), torch.cat([places, labels])
    )
    return SkewedDigits(base_policy, classifier)


@pytest.fixture(scope="module")
def look(base_policy: WanPolicy) -> Callable[[Tensor], tuple[np.ndarray, np.ndarray]]:
    """Features (n, 45) and digits (n,) in the eyes of a classifier that guides nothing."""
    reward = DigitHeldOutReward()

    def seen(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        pixels = base_policy.decode(x).reshape(len(x), 64).astype(np.float32) / 255
        margins = reward.margins(pixels)
        return margins, votes(margins)

    return seen


def chi_square(digits: np.ndarray) -> float:
    """Of the counts of DIGITS against even ones."""
    counts = np.array([(digits == digit).sum() for digit in DIGITS])
    even = counts.sum() / len(DIGITS)
    return float(((counts - even) ** 2 / even).sum())


def same_conditionals(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> float:
    """p-value of a permutation test: within each digit, features have the same mean and spread."""
    generator = np.random.default_rng(0)

    def moments(features: np.ndarray) -> np.ndarray:
        return np.concatenate([features, features**2], 1)

    joined: list[tuple[np.ndarray, int]] = []
    for digit in DIGITS:
        parts = [features[digits == digit] for features, digits in (first, second)]
        both = np.concatenate(parts)
        both = moments((both - both.mean(0)) / both.std(0))
        joined.append((both - both.mean(0), len(parts[0])))

    def statistic(shuffled: bool) -> float:
        total = 0.0
        for both, count in joined:
            rows = generator.permutation(len(both)) if shuffled else np.arange(len(both))
            difference = both[rows[:count]].mean(0) - both[rows[count:]].mean(0)
            total += float(difference @ difference) / (1 / count + 1 / (len(both) - count))
        return total

    own = statistic(False)
    return float(np.mean([statistic(True) >= own for _ in range(400)]))


@pytest.mark.slow
def test_a_skewed_digit_generator_becomes_even_and_its_digits_stay_as_they_were(
    skewed: SkewedDigits, look: Callable[[Tensor], tuple[np.ndarray, np.ndarray]]
):
    count = 320
    even = torch.full((len(DIGITS),), 1 / len(DIGITS))
    free = skewed.draw(count, 1, None)
    guided = skewed.draw(count, 2, log_ratio(even, SKEW))
    pilot = marginal_of(skewed.logits(free, torch.zeros(count)))
    assert (pilot - SKEW).abs().sum() / 2 < 0.08
    before, after = look(free), look(guided)
    assert chi_square(before[1]) > 3 * CHI_SQUARE_3
    assert chi_square(after[1]) < CHI_SQUARE_3
    assert same_conditionals(before, after) > 0.01
    paler = look((guided + 1) * 0.9 - 1)  # the test sees a tenth less contrast
    assert same_conditionals(before, paler) < 0.01
    for digits in (before[1], after[1]):
        assert np.isin(digits, DIGITS).mean() > 0.9
