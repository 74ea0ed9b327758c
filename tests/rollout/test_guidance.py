"""Every inference-time method against closed forms on flows whose law is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian_flows import FunctionTilt, MixtureFlow, linear, recursion, sem, slope_of, uniform_grid
from torch import Tensor

from rollout.draws import Group, Prompt, groups_for
from rollout.guidance.contract import COUNTED, GuidanceError, Tilt
from rollout.guidance.gradient import DPS, NTRK, FreeDoM, kl_to_base
from rollout.guidance.kernels import KernelConfig, travelled_back
from rollout.guidance.particles import DAS, SMC, log_potential, normalised, systematic
from rollout.guidance.sampler import METHODS, GuidedSampler, Method
from rollout.guidance.search import RBF, SVDD, Beam, BestOfN
from rollout.guidance.whitening import WhiteningConfig

SIGMAS = 4.0  # every statistical bound: four standard errors, a false alarm in 16,000
ANCESTRAL = KernelConfig()
# One element has no spectrum: a whitened gradient is its sign.
SIGN = WhiteningConfig(operator="rescale")


def groups(count: int, size: int = 1, seed: int = 0) -> list[Group]:
    return groups_for([Prompt("a", "a", {})], seed=seed, step=0, count=count, size=size)


def drawn(
    method: Method,
    tilt: Tilt,
    count: int,
    steps: int = 8,
    flow: MixtureFlow | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Samples (count, elements) and counts by name."""
    flow = flow or MixtureFlow()
    sampler = GuidedSampler(uniform_grid(steps), flow, tilt)
    media: list[Tensor] = []
    flow.decode = lambda x: media.append(x.flatten(1)) or np.zeros((len(x), 1, 1, 1, 1), np.uint8)  # type: ignore[method-assign,assignment]
    _, counts = sampler.sample(groups(count), method)
    return media[0].double(), counts.columns


@pytest.mark.parametrize(
    ("kind", "variance"),
    [("ode", 0.22203), ("linear", 0.23000), ("ancestral", 0.19726), ("renoise", 0.10883)],
)
def test_kernels_have_the_variance_of_the_spec(kind: str, variance: float) -> None:
    assert recursion(25, KernelConfig(kind=kind))[1] == pytest.approx(variance, abs=5e-6)


@pytest.mark.parametrize("kind", ["ode", "ancestral", "linear", "psi", "rbf", "flow", "memoryless"])
def test_kernels_keep_the_marginals_of_an_exact_model_as_steps_grow(kind: str) -> None:
    coarse, fine = (recursion(n, KernelConfig(kind=kind)) for n in (60, 960))
    assert fine[0] == pytest.approx(1.0, abs=1e-6)
    assert abs(fine[1] - 0.25) < 2e-3
    if kind != "flow":  # whose error changes sign on the way
        assert abs(fine[1] - 0.25) < max(abs(coarse[1] - 0.25) / 6, 2e-4)


def test_full_renoise_does_not_and_tends_to_half_of_the_variance() -> None:
    assert recursion(4000, KernelConfig(kind="renoise"))[1] == pytest.approx(0.125, abs=1e-3)


def test_travelling_back_gives_the_marginal_of_the_earlier_time() -> None:
    x = 0.7 * torch.tensor([[2.0]]) + 0.3 * torch.tensor([[0.0]])  # x0 = 2, no noise drawn yet
    back = travelled_back(x, 0.3, 0.6, torch.tensor([[1.0]]))
    added = math.sqrt(0.6**2 - (0.3 * 0.4 / 0.7) ** 2)
    assert back.item() == pytest.approx(0.4 * 2.0 + added)


def test_plain_methods_are_the_plain_sampler() -> None:
    """One copy, no noise: the ODE sample of the same draw, whose law is the recursion's."""
    samples, counts = drawn(BestOfN(best_of=1), linear(2), 3000)
    mean, variance = recursion(8, KernelConfig(kind="ode"))
    assert abs(samples.mean() - mean) < SIGMAS * sem(samples)
    assert samples.var().item() == pytest.approx(variance, rel=0.12)
    assert counts["forwards"].tolist() == [8] * 3000 and counts["rewards"].sum() == 0


@pytest.mark.parametrize(("n", "expected"), [(2, 0.564190), (10, 1.538753), (20, 1.867475)])
def test_best_of_n_has_the_expected_maximum(n: int, expected: float) -> None:
    samples, counts = drawn(BestOfN(best_of=n), linear(2), 1500)
    mean, variance = recursion(8, KernelConfig(kind="ode"))
    assert abs(samples.mean() - mean - math.sqrt(variance) * expected) < SIGMAS * sem(samples)
    assert counts["forwards"].tolist() == [8 * n] * 1500
    assert counts["rewards"].tolist() == counts["decodes"].tolist() == [n] * 1500


def test_maximum_and_kl_of_the_spec() -> None:
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    pdf = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    cdf = torch.special.ndtr(grid)
    for n, expected in ((2, 0.564190), (10, 1.538753), (20, 1.867475), (100, 2.507594)):
        density = n * pdf * cdf ** (n - 1)
        assert torch.trapezoid(grid * density, grid).item() == pytest.approx(expected, abs=1e-5)
        if n <= 10:
            kl = torch.trapezoid(density * (n * cdf ** (n - 1)).clamp(min=1e-300).log(), grid)
            assert kl.item() == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-5)
    assert [round(kl_to_base(rho), 6) for rho in (0.01, 0.1)] == [0.005025, 0.05268]


@pytest.mark.parametrize("k", [1, 10])
def test_svdd_takes_the_best_noise_of_a_step(k: int) -> None:
    """Two steps: the first is a full renoise, the best of K noises; the second has none."""
    samples, counts = drawn(SVDD(candidates=k), linear(2), 2500, steps=2)
    expected = {1: 0.0, 10: 1.538753}[k]
    last = recursion(1, KernelConfig(kind="ode"))[0]  # x0_hat at t = 1 is the mean
    assert last == pytest.approx(1.0)
    # x at 1/2 is (1/2) 1 + (1/2) eta, and x0_hat of it is 1 + slope (eta / 2)
    assert abs(samples.mean() - 1 - slope_of(0.5) * expected / 2) < SIGMAS * sem(samples) + 1e-9
    assert counts["forwards"].tolist() == [1 + k] * 2500
    assert counts["rewards"].tolist() == [k] * 2500


def test_svdd_with_a_temperature_draws_by_weight() -> None:
    """Many candidates at temperature tau tilt the noise of the step by exp(r / tau): a shift."""
    method = SVDD(candidates=64, temperature=1.0)
    samples, _ = drawn(method, linear(2), 2500, steps=2)
    shift = 2 * slope_of(0.5) / 2  # d r / d eta
    assert abs(samples.mean() - 1 - slope_of(0.5) / 2 * shift) < SIGMAS * sem(samples) + 0.01


def test_rbf_accepts_the_first_improvement_and_rolls_the_rest_over() -> None:
    """From t = 1 a candidate improves iff its noise is positive: a half-normal, two trials on average."""
    samples, counts = drawn(RBF(quota=12), linear(2), 2500, steps=2)
    expected = 1 + slope_of(0.5) / 2 * math.sqrt(2 / math.pi)
    assert abs(samples.mean() - expected) < SIGMAS * sem(samples) + 1e-4
    trials = counts["forwards"].double() - 1
    assert abs(trials.mean() - 2) < SIGMAS * sem(trials) + 0.01
    _, counts = drawn(RBF(quota=3), linear(2), 400, steps=8)
    assert counts["forwards"].max() <= 1 + 3 * 7 and counts["forwards"].min() >= 8


def test_rbf_of_one_candidate_is_the_plain_kernel() -> None:
    plain, _ = drawn(SVDD(candidates=1), linear(2), 50)
    rbf, counts = drawn(RBF(quota=1), linear(2), 50)
    torch.testing.assert_close(plain, rbf, rtol=0, atol=0)
    assert counts["forwards"].tolist() == [8] * 50


def test_a_beam_of_one_is_svdd_and_wider_ones_do_better() -> None:
    svdd, _ = drawn(SVDD(candidates=6), linear(2), 200)
    beam, counts = drawn(Beam(width=1, children=6), linear(2), 200)
    torch.testing.assert_close(svdd, beam, rtol=0, atol=0)
    assert counts["forwards"].tolist() == [1 + 6 * 7] * 200
    wide, counts = drawn(Beam(width=3, children=2), linear(2), 200)
    assert counts["forwards"].tolist() == [3 + 6 * 7] * 200
    plain, _ = drawn(SVDD(candidates=1), linear(2), 200)
    assert wide.mean() > plain.mean() + 3 * sem(plain)


@pytest.mark.parametrize("shift", ["consistent", "variance"])
def test_dps_reaches_the_tilted_mean_of_its_recursion(shift: str) -> None:
    method = DPS(beta=1.0, shift=shift, limit=None)  # type: ignore[arg-type]
    samples, counts = drawn(method, linear(2), 2500, steps=25)

    def step(t: float, s: float, std: float) -> float:
        if shift == "variance":
            return std**2 * 2 * slope_of(t)
        if t == 1:
            return 0.0
        c, before = 2 * slope_of(t), s * s * (1 - t) / ((1 - s) * t)
        return ((1 - s) * t * t / (1 - t) - before * t) * c

    mean, variance = recursion(25, ANCESTRAL, shift=step)
    assert abs(samples.mean() - mean) < SIGMAS * sem(samples)
    assert samples.var().item() == pytest.approx(variance, rel=0.12)
    assert counts["forwards"].tolist() == counts["backwards"].tolist() == [25] * 2500


def test_only_the_consistent_shift_is_exact_for_other_kernels() -> None:
    """Target mean 1.5 at a thousand steps: the spec's three numbers, and that of g = t."""

    def popular(t: float, s: float, std: float) -> float:
        return std**2 * 2 * slope_of(t)

    def consistent(t: float, s: float, std: float) -> float:
        return 0.0 if t == 1 else (t / (1 - t) + t * t / 2) * (t - s) * 2 * slope_of(t)

    linear_kernel = KernelConfig(kind="linear")
    assert recursion(1000, ANCESTRAL, shift=popular)[0] == pytest.approx(1.49503, abs=5e-6)
    assert recursion(1000, linear_kernel, shift=popular)[0] == pytest.approx(1.0897, abs=5e-5)
    assert recursion(1000, linear_kernel, shift=consistent)[0] == pytest.approx(1.4998, abs=5e-5)


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.1])
def test_ntrk_follows_the_recursion_of_the_spec(rho: float) -> None:
    known = {0.0: (0, 0.19726), 0.05: (0.43564, 0.18740), 0.1: (0.61608, 0.17753)}[rho]
    exact = recursion(25, ANCESTRAL, shift=lambda t, s, std: std * math.sqrt(rho), keep=1 - rho)
    assert exact == pytest.approx((1 + known[0], known[1]), abs=1e-5)
    method = NTRK(rho=rho, whitening=SIGN)
    samples, counts = drawn(method, linear(2), 2500, steps=25)
    # At t = 1 the prediction does not depend on the state: that step has no gradient, and is plain.
    first = recursion(
        25, ANCESTRAL, shift=lambda t, s, std: 0 if t == 1 else std * math.sqrt(rho), keep=1 - rho
    )[0]
    assert abs(samples.mean() - first) < SIGMAS * sem(samples)
    assert samples.var().item() == pytest.approx(exact[1], rel=0.12)
    assert counts["fallbacks"].tolist() == [1] * 2500
    assert (
        counts["backwards"].tolist() == [24] * 2500 and counts["forwards"].tolist() == [25] * 2500
    )


def test_ntrk_keeps_the_length_of_the_noise_where_dps_inflates_it() -> None:
    """E |eta|^2 / N of the injected noise: 1 for NTRK, 1 + rho for a shift of the same size."""
    plain = torch.randn(400, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(400, 1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    from rollout.guidance.walk import Slope

    slope = Slope(plain, plain, plain.flatten(1).sum(1).double(), gradient)
    for rho, inflation in ((0.01, 1.004988), (0.1, 1.048809)):
        eta = NTRK(rho=rho).noise(slope, plain, 0.3, 0.1)
        assert eta.square().mean().item() == pytest.approx(1.0, abs=0.01)
        shifted = plain + math.sqrt(rho) * gradient
        length = shifted.square().mean().sqrt().item()
        assert length == pytest.approx(inflation, abs=0.01)
        assert math.sqrt(1 + rho) == pytest.approx(inflation, abs=1e-6)


def test_ntrk_schedules() -> None:
    gradient = torch.full((1, 1, 1, 2, 2), 2.0)
    assert NTRK(rho=0.2).shares(gradient, 0.3, 0.1).item() == pytest.approx(0.2)
    invariant = NTRK(rho=0.2, schedule="step_invariant", reference_steps=25)
    assert invariant.shares(gradient, 0.3, 1 / 50).item() == pytest.approx(0.1)
    capped = NTRK(rho=0.2, schedule="capped", beta=2.0)
    assert capped.shares(gradient, 0.3, 0.1).item() == pytest.approx(0.09 * 4 / 4)
    assert capped.shares(gradient, 3.0, 0.1).item() == pytest.approx(0.2)


@pytest.mark.parametrize("repeats", [1, 3])
def test_freedom_takes_shifts_of_one_length_and_repeats_a_step(repeats: int) -> None:
    flow, steps = MixtureFlow(), 8
    sigmas = uniform_grid(steps).grid().sigmas
    mean = 0.0
    for j in range(steps):
        kernel = ANCESTRAL.at(sigmas[j], sigmas[j + 1], sigmas[1])
        probe = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
        stepped = kernel.mean(probe, flow.velocity(probe, torch.full((2,), kernel.t), probe))
        zero, one = stepped.flatten().tolist()
        start = mean
        for repeat in range(repeats):
            if repeat:
                start = mean * (1 - kernel.t) / (1 - kernel.s)
            mean = zero + (one - zero) * start + (0.2 * kernel.std if j else 0.0)
    samples, counts = drawn(FreeDoM(scale=0.2, repeats=repeats), linear(2), 2500, steps)
    assert abs(samples.mean() - mean) < SIGMAS * sem(samples)
    assert counts["forwards"].tolist() == [steps * repeats] * 2500


@pytest.mark.parametrize(("potential", "slope"), [("diff", 2.0), ("max", 2.0), ("add", 0.4)])
def test_smc_samples_the_tilted_law(potential: str, slope: float) -> None:
    """N(1, v) tilted by exp(slope x) is N(1 + slope v, v), with v the variance that the grid gives."""
    method = SMC(particles=24, potential=potential, select="sample")  # type: ignore[arg-type]
    samples, counts = drawn(method, linear(slope), 1200)
    variance = recursion(8, ANCESTRAL)[1]
    assert abs(samples.mean() - 1 - slope * variance) < SIGMAS * sem(samples) + 0.04
    assert samples.var().item() == pytest.approx(variance, rel=0.25)
    assert counts["forwards"].tolist() == [8 * 24] * 1200
    assert counts["rewards"].tolist() == [9 * 24] * 1200


def test_das_samples_the_tilted_law_with_fewer_particles() -> None:
    tilt, variance = linear(2), recursion(8, ANCESTRAL)[1]
    samples, counts = drawn(DAS(particles=8, select="sample"), tilt, 2000)
    plain, _ = drawn(SMC(particles=8, select="sample"), tilt, 2000)
    error, other = (abs(s.mean() - 1 - 2 * variance) for s in (samples, plain))
    assert error < SIGMAS * sem(samples) + 0.03
    assert error < other + sem(samples)
    assert samples.var().item() == pytest.approx(variance, rel=0.2)
    assert counts["backwards"].tolist() == [8 * 8] * 2000


def test_exact_tilts_of_the_spec() -> None:
    """N(1, 1/4) at beta 1/2: r = 2x gives N(2, 1/4), r = 2x - x^2/2 gives N(4/3, 1/6)."""
    grid = torch.linspace(-6, 8, 400_001, dtype=torch.float64)
    base = -((grid - 1) ** 2) / (2 * 0.25)
    for log_tilt, mean, variance in (
        (2 * grid / 0.5, 2.0, 0.25),
        ((2 * grid - grid**2 / 2) / 0.5, 4 / 3, 1 / 6),
    ):
        density = (base + log_tilt).exp()
        density = density / torch.trapezoid(density, grid)
        first = torch.trapezoid(grid * density, grid)
        second = torch.trapezoid((grid - first) ** 2 * density, grid)
        assert (first.item(), second.item()) == pytest.approx((mean, variance), abs=1e-6)


def test_smc_and_das_sample_a_tilted_mixture() -> None:
    """Two modes, a reward that is 1 at the right one: weights (.5, .5) become (1, e) / (1 + e)."""
    flow = MixtureFlow((0.5, 0.5), (-2.0, 2.0), 0.25)
    tilt = FunctionTilt(lambda clean: torch.sigmoid(8 * clean.flatten(1)[:, 0]))
    expected = math.e / (1 + math.e)
    for method in (SMC(particles=16, select="sample"), DAS(particles=16, select="sample")):
        samples, _ = drawn(method, tilt, 1200, steps=16, flow=flow)
        right = (samples > 0).double()
        assert abs(right.mean() - expected) < SIGMAS * sem(right) + 0.015
        assert abs(samples[samples > 0].mean() - 2) < 0.05


def test_potentials_telescope_as_in_the_spec() -> None:
    rewards = torch.tensor([[0, 0, 0], [0.2, 0.6, -0.1], [1, 0.4, 0.9]], dtype=torch.float64)
    product = torch.zeros(3, dtype=torch.float64)
    for k in range(1, 4):
        product += 0.5 * log_potential("diff", rewards[:k])
    assert product.exp().tolist() == pytest.approx([1.648721, 1.221403, 1.568312], abs=1e-6)
    assert log_potential("max", rewards).tolist() == [1, 0.6, 0.9]
    assert log_potential("add", rewards).tolist() == pytest.approx([1.2, 1.0, 0.8])


def test_systematic_resampling_takes_each_particle_its_share() -> None:
    weights = torch.tensor([0.5, 0.25, 0.0, 0.25], dtype=torch.float64)
    for u in (0.01, 0.5, 0.99):
        assert systematic(weights, u).tolist() == [0, 0, 1, 3]
    impossible = torch.full((4,), -torch.inf, dtype=torch.float64)
    assert normalised(impossible).tolist() == [0.25] * 4


CHEAP: list[Method] = [
    BestOfN(best_of=3),
    SVDD(candidates=3),
    RBF(quota=3),
    Beam(width=2, children=2),
    SMC(particles=3),
    DAS(particles=3),
    DPS(best_of=2),
    FreeDoM(),
    NTRK(best_of=2),
]


@pytest.mark.parametrize("method", CHEAP, ids=lambda m: m.kind)
def test_a_sample_depends_on_its_draw_alone(method: Method) -> None:
    """The same numbers alone, in company, and a second time; the model is asked as often as counted."""
    flow, tilt = MixtureFlow(shape=(1, 1, 4, 4)), linear(0.5)
    sampler = GuidedSampler(uniform_grid(6), flow, tilt)
    kept: list[Tensor] = []
    flow.decode = lambda x: kept.append(x) or np.zeros((len(x), 1, 1, 1, 1), np.uint8)  # type: ignore[method-assign,assignment]
    together = groups(5, size=2)
    _, counts = sampler.sample(together, method)
    assert flow.rows == counts.columns["forwards"].sum()
    assert tilt.scored <= counts.columns["rewards"].sum()
    sampler.sample(together[3:4], method)
    torch.testing.assert_close(kept[0][6:8], kept[1], rtol=1e-5, atol=1e-5)
    sampler.sample(together, method)
    assert torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("method", CHEAP, ids=lambda m: m.kind)
def test_every_method_raises_the_reward_and_keeps_to_its_budget(method: Method) -> None:
    tilt = linear(2)
    plain, _ = drawn(BestOfN(best_of=1, kernel=ANCESTRAL), tilt, 300)
    for budget in (16, 70):
        samples, counts = drawn(method.at_budget(budget, 8), tilt, 300)
        assert counts["forwards"].max() <= budget
        assert samples.mean() > plain.mean() + 2 * sem(plain)
    assert len(METHODS) == len({m.model_fields["kind"].default for m in METHODS}) == len(CHEAP)


def test_a_gradient_method_without_gradient_names_those_that_work() -> None:
    tilt = FunctionTilt(lambda clean: clean.flatten(1).sum(1), differentiable=False)
    for method in (NTRK(), DPS(), FreeDoM(), DAS()):
        with pytest.raises(GuidanceError, match="best_of_n, svdd, rbf, beam, smc"):
            drawn(method, tilt, 2)
    drawn(SVDD(candidates=2), tilt, 2)


def test_a_reward_that_fails_never_wins() -> None:
    """NaN is worse than any number, for every search."""

    def only_negative(clean: Tensor) -> Tensor:
        value = clean.flatten(1).sum(1)
        return torch.where(value > 1, torch.nan, value)

    tilt = FunctionTilt(only_negative, differentiable=False)
    samples, _ = drawn(BestOfN(best_of=16), tilt, 100)
    assert (samples <= 1).double().mean() > 0.95


def test_a_gradient_that_is_not_finite_falls_back_to_a_plain_step() -> None:
    broken = FunctionTilt(lambda clean: clean.flatten(1).sum(1) * torch.inf)
    plain, _ = drawn(BestOfN(best_of=1, kernel=ANCESTRAL), linear(1), 20)
    for method, calls in ((NTRK(), 7), (DPS(), 8)):
        samples, counts = drawn(method, broken, 20)
        torch.testing.assert_close(samples, plain, rtol=1e-5, atol=1e-5)
        assert counts["fallbacks"].tolist() == [calls] * 20


def test_without_the_network_there_is_no_backward_and_the_gradient_is_the_rewards_own() -> None:
    method = DPS(through_network=False, shift="variance", limit=None)
    samples, counts = drawn(method, linear(2), 1500)
    mean = recursion(8, ANCESTRAL, shift=lambda t, s, std: std**2 * 2)[0]
    assert abs(samples.mean() - mean) < SIGMAS * sem(samples)
    assert counts["backwards"].sum() == 0 and counts["reward_backwards"].tolist() == [8] * 1500
    assert set(counts) == set(COUNTED)


def test_guidance_scale_counts_both_branches() -> None:
    flow = MixtureFlow()
    config = uniform_grid(4).model_copy(update={"guidance_scale": 2.0})
    rollouts, counts = GuidedSampler(config, flow, linear(1)).sample(groups(3), SVDD(candidates=2))
    assert counts.columns["forwards"].tolist() == [2 * (1 + 2 * 3)] * 3
    assert [r.forwards for r in rollouts] == [14] * 3
    assert flow.rows == 3 * 14


def test_shares_of_columns_add_up() -> None:
    _, counts = drawn(NTRK(best_of=2), linear(1), 3)
    assert (counts["forwards"] + 2 * counts["backwards"]).tolist() == [2 * (8 + 2 * 7)] * 3
    assert all(len(column) == 3 for column in itertools.chain(counts.values()))
