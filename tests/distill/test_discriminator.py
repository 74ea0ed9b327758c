"""The critics: heads, losses at their optimum, the R1 estimate, and the law that they lead a student to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_two_step import (
    SAME,
    SIGMAS,
    TEACHER,
    Affine,
    Gaussian,
    Setup,
    batch_of,
    settings,
    small,
)
from torch import Tensor

from distill.discriminator import (
    DiscriminatorConfig,
    Heads,
    approximate_r1,
    discriminator_losses,
    generator_losses,
    layers_at,
)
from distill.networks import generate
from distill.noise import gaussians, logit_normals, uniforms
from distill.two_step import DMD_RANGE, FakeScoreConfig, StepOneConfig, renoised_at
from distill.two_step import TwoStepConfig as Config

# The slope of the second step that gives the teacher's spread from fresh noise.
FRESH = 0.4506474


def heads(channels: int = 16) -> Heads:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Heads([6, 10], channels, ("final", "first"))


def features(rows: int = 5, frames: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, width, frames, 4, 6, generator=generator) for width in (6, 10)]


@pytest.mark.parametrize(("form", "least"), [("softplus", 2 * math.log(2)), ("hinge", 2.0)])
def test_at_equal_laws_the_loss_has_its_golden_minimum(form: Any, least: float):
    logits = torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = discriminator_losses(logits, logits, form)
    assert losses.min().item() == pytest.approx(least, abs=1e-12)
    assert discriminator_losses(torch.zeros(1), torch.zeros(1), form).item() == pytest.approx(least)
    both = discriminator_losses(logits[:, None], logits[None], form)
    assert both.min() < least  # where it can tell them apart


@pytest.mark.parametrize("form", ["softplus", "hinge"])
def test_trained_heads_end_at_it(form: Any):
    network, same = heads(), features()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        real, fake = network("final", same), network("final", [f.roll(1, 0) for f in same])
        optimizer.zero_grad()
        loss = discriminator_losses(real, fake, form).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(2 * math.log(2) if form == "softplus" else 2.0, abs=2e-3)


def test_losses_are_those_of_their_names():
    real, fake = torch.tensor([0.4, -2.0]), torch.tensor([1.5, -0.3])
    expected = torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(fake))
    torch.testing.assert_close(discriminator_losses(real, fake, "softplus"), expected)
    hinge = discriminator_losses(real, fake, "hinge")
    torch.testing.assert_close(hinge, torch.tensor([0.6 + 2.5, 3.0 + 0.7]))
    torch.testing.assert_close(generator_losses(fake, "softplus"), torch.log1p(torch.exp(-fake)))
    torch.testing.assert_close(generator_losses(fake, "hinge"), -fake)


def test_approximate_r1_is_the_squared_gradient_with_a_known_bias():
    """D = x'Hx/2 + w'x on N(0, I): E|grad D|^2 = 19.25, and the finite difference adds 16 sigma^2."""
    h, w = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, 400_000, 3, generator=generator, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:
        return (h * x.square() / 2 + w * x).sum(1)

    for sigma in (0.05, 0.5, 1.0):
        found = approximate_r1(logits(x), logits(x + sigma * delta), sigma)
        error = found.std().item() / math.sqrt(len(x))
        assert error < 0.15
        assert abs(found.mean().item() - 19.25 - 16 * sigma**2) < 4 * error
    # The bias by itself: the same draws without it are those of sigma to 0.
    unbiased = ((h * x + w) * delta).sum(1).square()
    excess = approximate_r1(logits(x), logits(x + delta), 1.0) - unbiased
    assert abs(excess.mean().item() - 16) < 4 * excess.std().item() / math.sqrt(len(x)) < 0.6


def test_a_logit_is_of_one_sample_alone():
    network, many = heads(), features()
    logits = network("final", many)
    assert logits.shape == (5,)
    for row in range(5):
        alone = network("final", [f[row : row + 1] for f in many])
        torch.testing.assert_close(alone[0], logits[row])


def test_logits_average_over_depths_and_frames():
    network, video = heads(), features()
    frames = [network("final", [f[:, :, k : k + 1] for f in video]) for k in range(3)]
    torch.testing.assert_close(torch.stack(frames).mean(0), network("final", video))
    only = Heads([6], 16, ("final",))
    own = {k: v for k, v in network.state_dict().items() if k.startswith("heads.final.0.")}
    only.load_state_dict(own)
    shallow = only("final", video[:1])
    deep = network("final", [video[0], torch.zeros_like(video[1])])
    rest = network("final", [torch.zeros_like(f) for f in video])
    none = only("final", [torch.zeros_like(video[0])])
    torch.testing.assert_close(deep - rest, (shallow - none) / 2)


def test_what_is_judged_has_heads_of_its_own():
    network, sample = heads(), features()
    network("first", sample).sum().backward()
    touched = {n.split(".")[1] for n, p in network.named_parameters() if p.grad is not None}
    assert touched == {"first"}
    assert not torch.equal(network("first", sample), network("final", sample))


def test_depths_are_shares_of_the_blocks():
    assert layers_at((0.25, 0.5, 0.75, 1.0), 4) == [0, 1, 2, 3]
    assert layers_at((0.25, 0.5, 0.75, 1.0), 30) == [7, 14, 22, 29]
    assert layers_at((0.0, 1.0), 1) == [0, 0]


@pytest.mark.parametrize(
    ("noise", "taught", "slope"),
    [("same", TEACHER, SAME), ("fresh", TEACHER, FRESH),
     ("same", 0.5, 0.5 / (0.25 * TEACHER + 0.75)), ("fresh", 0.5, 0.5 / math.hypot(0.25 * TEACHER, 0.75))],
)  # fmt: skip
def test_dmd_gives_the_law_that_its_teacher_s_score_is_of(noise: Any, taught: float, slope: float):
    """The score of the data leads to the data, not to what the teacher makes in eight steps."""
    config = Config(
        adversarial=0, dmd=1, warmup_steps=0, noise=noise, end_to_end=False,
        step1=StepOneConfig(weight=0), fake_score=FakeScoreConfig(updates=1),
    )  # fmt: skip
    student = Affine(TEACHER, 0.5)
    setup = Setup(config, Gaussian(taught), student, {"student": 0.1, "fake_score": 1.0}, 1.0)
    trail: list[float] = []
    for step in range(120):
        setup.update(batch_of(student, 4, seed=4 * step), step=step)
        trail.append(student.slopes[1])
    assert np.mean(trail[-40:]) == pytest.approx(slope, abs=0.012)


@pytest.mark.parametrize(("start", "data", "std"), [(0.5, None, TEACHER), (TEACHER, 0.5, 0.5)])
def test_an_adversarial_student_gets_the_spread_of_the_real_class(
    start: float, data: float | None, std: float
):
    """Teacher samples: .340, as the teacher draws them. Data: .5."""
    judge = DiscriminatorConfig(depths=(1.0,), channels=16, r1_weight=1.0)
    config = Config(
        adversarial=1, warmup_steps=0, end_to_end=False, step1=StepOneConfig(weight=0),
        discriminator=judge,
    )  # fmt: skip
    student = Affine(TEACHER, start / (0.25 * TEACHER + 0.75))
    setup = Setup(config, Gaussian(0.5), student, {"student": 0.05}, 1.0)
    critic = setup.networks["heads"]
    critic.optimizer = torch.optim.Adam(critic.parameters, 1e-2, (0.0, 0.99))
    trail: list[float] = []
    for step in range(160):
        setup.update(batch_of(student, 4, seed=4 * step, data=data), step=step)
        trail.append(student.std)
    assert np.mean(trail[-40:]) == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("form", ["softplus", "hinge"])
def test_critics_learn_from_samples_of_noise_that_only_they_see(form: Any):
    """Their gradients are those of the formulas; real and fake have noise level and noise in common."""
    judge = DiscriminatorConfig(depths=(0.5, 1.0), channels=8, r1_weight=0.5, updates=1, loss=form)
    fake_score = FakeScoreConfig(updates=1)
    setup, batch = small(settings(discriminator=judge, fake_score=fake_score, noise="fresh"))
    networks, seeds, shape = setup.networks, batch.seeds, setup.student.latent_shape
    step, rows = 3, torch.zeros(len(batch.seeds), dtype=torch.float64)

    def drawn(*key: int | str) -> Tensor:
        return gaussians(seeds, shape, *key).double()

    def fakes(*key: int | str) -> dict[str, Tensor]:
        z, n = drawn(*key, "z"), drawn(*key, "n")
        with torch.no_grad():
            y1, y2 = generate(setup.student.velocity, z, n, batch.condition, SIGMAS, True)
        return {"final": y2, "first": y1}

    losses = {"heads": rows, "fake_score": rows}
    for name, y in fakes("heads", step, 0).items():
        key = ("heads", step, 0, name)
        tau, noise = logit_normals(seeds, *key, "tau").double(), drawn(*key, "noise")
        real, fake = (renoised_at(x, tau, noise) for x in (batch.real, y))
        logits = [
            networks["heads"](name, setup.teacher.features(x, tau, batch.condition, [0, 1]))
            for x in (real, fake, real + 0.05 * drawn(*key, "r1"))
        ]
        penalty = 0.5 / 2 * ((logits[2] - logits[0]) / 0.05).square()
        losses["heads"] = losses["heads"] + discriminator_losses(*logits[:2], form) + penalty
    for name, y in fakes("fake", step, 0).items():
        t = uniforms(seeds, *DMD_RANGE, "fake", step, 0, name, "t").double()
        noise = drawn("fake", step, 0, name)
        off = networks["fake_score"](renoised_at(y, t, noise), t, batch.condition) - (noise - y)
        losses["fake_score"] = losses["fake_score"] + off.square().mean((1, 2, 3, 4))
    expected = {
        name: torch.autograd.grad((batch.weights * loss).sum(), networks[name].parameters)
        for name, loss in losses.items()
    }
    setup.update(batch, step=step)
    for name, parts in expected.items():
        gradient = torch.cat([part.flatten() for part in parts])
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(networks[name].gradient, gradient, rtol=0, atol=1e-12)
