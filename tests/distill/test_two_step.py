"""The two-step method: golden numbers on Gaussians, exact gradients, one result whatever the cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.discriminator import DiscriminatorConfig
from distill.networks import generate
from distill.noise import gaussians, logit_normals, uniforms
from distill.two_step import DMD_RANGE, FakeScoreConfig, StepOneConfig, TwoStep, TwoStepBatch
from distill.two_step import TwoStepConfig as Config
from rollout.flow import per_sample
from rollout.policies.base import FlowPolicy

SIGMAS = (1.0, 0.75, 0.0)
# Slopes of the 8-step teacher, and of the second step of the affine student that equals it (n = z).
TEACHER, SAME = 0.3401512, 0.4073483


class Toy(FlowPolicy):
    """A flow in fp64 whose features are the sample itself; ``rows`` counts network evaluations."""

    latent_shape = (1, 1, 16, 16)
    blocks = width = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.double(), adapted=False, reference=False)
        self.rows = 0

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def encode_null(self, count: int) -> Tensor:
        return torch.ones(count, 1, 1)

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        return [x for _ in layers]

    def pixels(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1, 1, 1, 1)

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


def scalars(*values: float) -> nn.ParameterDict:
    tensors = torch.tensor(values, dtype=torch.float64)
    return nn.ParameterDict({str(k): v.clone() for k, v in enumerate(tensors)})


class Gaussian(Toy):
    """The exact velocity of data N(1, std^2); ln std trains."""

    def __init__(self, std: float) -> None:
        super().__init__(scalars(math.log(std)))

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t, variance = per_sample(t, x), torch.exp(2 * self.network["0"])
        total = (1 - t) ** 2 * variance + t**2
        return (t - (1 - t) * variance) / total * (x - (1 - t)) - 1


class Affine(Toy):
    """Step k estimates ``x0 = 1 + A_k (x - E x)``; one slope is shared."""

    def __init__(self, *slopes: float) -> None:
        super().__init__(scalars(*slopes))

    @property
    def slopes(self) -> list[float]:
        return [slope.item() for slope in self.network.values()]

    @property
    def std(self) -> float:
        """Of the sample for n = z, in units of z."""
        first, last = self.slopes[0], self.slopes[-1]
        return last * (0.25 * first + 0.75)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        first, *others = self.network.values()
        slope = torch.where(t > 0.9, first, others[0] if others else first)
        t = per_sample(t, x)
        return (x - 1 - per_sample(slope, x) * (x - (1 - t))) / t


class Layers(nn.Module):
    """Two hidden layers of 8 channels under the velocity, so that nothing is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, (1, 3, 3), padding=(0, 1, 1))
        self.second = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))
        self.last = nn.Conv3d(8, 1, 1)
        self.told = nn.Linear(2, 8)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> list[Tensor]:
        told = self.told(torch.stack([t.double(), condition.double().mean((1, 2))], 1))
        first = torch.tanh(self.first(x) + told[:, :, None, None, None])
        second = torch.tanh(self.second(first))
        return [first, second, self.last(second)]


class Small(Toy):
    """A copy of ``Layers`` for each step."""

    latent_shape = (1, 2, 8, 8)
    blocks, width = 2, 8

    def __init__(self, copies: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(nn.ModuleList(Layers() for _ in range(copies)))

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.rows += len(x)
        return self.network[0 if bool((t > 0.9).all()) else -1](x, t, condition)[-1]

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        self.rows += len(x)
        return [self.network[0](x, t, condition)[layer] for layer in layers]


class Plain:
    """A network in plain PyTorch.

    Attributes:
        gradient: of the last step, flat. ``seen``: is told of each step before it is taken.
    """

    def __init__(self, module: Any, optimizer: Any, seen: Callable[[], None]) -> None:
        self.module, self.optimizer, self.seen = module, optimizer, seen
        self.parameters: list[Tensor] = list(module.network.parameters())
        self.gradient = torch.zeros(0)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    apply = __call__

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        self.seen()
        held = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradient = torch.cat([gradient.flatten() for gradient in held])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.gradient.norm())


class Setup:
    """A method with its networks; ``held`` lists which networks had gradients at each step."""

    def __init__(
        self, config: Config, teacher: Toy, student: Toy, rates: dict[str, float], guidance: float
    ) -> None:
        self.teacher, self.student = teacher, student
        teacher.module.requires_grad_(False)
        self.method = TwoStep(config, SIGMAS, teacher, guidance, seed=0)
        self.copies: list[Toy] = []
        modules = self.method.modules(student, self._copy)
        self.held: list[tuple[str, set[str]]] = []
        self.networks: dict[str, Plain] = {}
        for name, module in modules.items():
            module.double()
            optimizer = torch.optim.SGD(module.parameters(), rates.get(name, 0.0))
            self.networks[name] = Plain(module, optimizer, lambda n=name: self._note(n))

    def _copy(self) -> Toy:
        made = copy.deepcopy(self.teacher)
        made.module.requires_grad_(True)
        self.copies.append(made)
        return made

    def _note(self, stepping: str) -> None:
        everyone = {name: net.parameters for name, net in self.networks.items()}
        everyone["teacher"] = list(self.teacher.module.parameters())
        held = {name for name, ps in everyone.items() if any(p.grad is not None for p in ps)}
        self.held.append((stepping, held))

    def update(self, *batches: TwoStepBatch, step: int = 0) -> dict[str, Tensor]:
        """One step; the columns of all tables, end to end."""
        tables, _ = self.method.update(self.networks, batches, step)
        names = {name for table in tables for name in table}
        return {name: torch.cat([t[name] for t in tables if name in t]) for name in names}


def batch_of(
    policy: Toy, rows: int, seed: int = 0, teacher: float = TEACHER, data: float | None = None
) -> TwoStepBatch:
    """Equal weights. The teacher is ``1 + slope z``; ``data``: real samples N(1, data^2) instead."""
    seeds, shape = tuple(range(seed, seed + rows)), policy.latent_shape
    z = gaussians(seeds, shape, "initial").double()
    x0 = 1 + teacher * z
    real = x0 if data is None else 1 + data * gaussians(seeds, shape, "real").double()
    weights = torch.full((rows,), 1 / rows, dtype=torch.float64)
    return TwoStepBatch(torch.zeros(rows, 1, 1), z, x0, real, weights, seeds)


def part(batch: TwoStepBatch, rows: Sequence[int]) -> TwoStepBatch:
    tensors = {n: t[rows] for n, t in vars(batch).items() if isinstance(t, Tensor)}
    return replace(batch, **tensors, seeds=tuple(batch.seeds[row] for row in rows))


def regressed(student: Affine, weight: float, end_to_end: bool = True) -> Tensor:
    """Trains to the end on paired regression; the loss then, in units of z^2."""
    config = Config(
        adversarial=0, regression=1, warmup_steps=0, end_to_end=end_to_end,
        step1=StepOneConfig(weight=weight),
    )  # fmt: skip
    setup = Setup(config, Gaussian(0.5), student, {"student": 0.35}, 1.0)
    batch = batch_of(student, 1)
    table: dict[str, Tensor] = {}
    for step in range(150):
        table = setup.update(batch, step=step)
    return table["loss/student"].mean() / batch.z.square().mean()


@pytest.mark.parametrize("start", [(0.9, 0.1), (0.1, 0.9)])
def test_a_loss_on_step_1_identifies_both_steps(start: tuple[float, float]):
    student = Affine(*start)
    assert regressed(student, weight=1.0).item() < 1e-12
    assert student.slopes == pytest.approx([TEACHER, SAME], abs=1e-6)


def test_without_it_step_1_depends_on_the_start_and_the_sample_is_right():
    students = [Affine(0.9, 0.1), Affine(0.1, 0.9)]
    for student in students:
        regressed(student, weight=0.0)
        assert student.std == pytest.approx(TEACHER, abs=1e-6)
    assert abs(students[0].slopes[0] - students[1].slopes[0]) > 0.3
    assert all(abs(student.slopes[0] - TEACHER) > 0.1 for student in students)


def test_without_it_and_with_a_stopped_gradient_step_1_never_moves():
    student = Affine(0.9, 0.1)
    regressed(student, weight=0.0, end_to_end=False)
    assert student.slopes[0] == 0.9
    assert student.std == pytest.approx(TEACHER, abs=1e-6)


def test_shared_parameters_cannot_be_both_steps():
    student = Affine(0.9)
    assert regressed(student, weight=1.0).item() == pytest.approx(1.693247e-3, abs=1e-8)
    assert student.slopes == pytest.approx([0.3682414], abs=1e-6)


def settings(**changes: Any) -> Config:
    """Every term at once."""
    fake = FakeScoreConfig(updates=2)
    heads = DiscriminatorConfig(depths=(0.5, 1.0), channels=8, r1_weight=0.5)
    given: dict[str, Any] = {"adversarial": 0.7, "regression": 0.3, "dmd": 0.2, "warmup_steps": 1}
    given |= {"step1": StepOneConfig(weight=0.6, regression=0.8)}
    return Config(**(given | {"discriminator": heads, "fake_score": fake} | changes))


def small(config: Config, guidance: float = 1.0, **rates: float) -> tuple[Setup, TwoStepBatch]:
    """Small networks, and six samples of unequal weights and random teachers."""
    student = Small(1 if config.parameters == "shared" else 2, seed=1)
    setup = Setup(config, Small(1, seed=2), student, rates, guidance)
    batch = batch_of(student, 6)
    generator = torch.Generator().manual_seed(3)
    x0, real = torch.randn(2, *batch.x0.shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    condition = torch.randn(6, 1, 1, generator=generator)
    return setup, replace(batch, x0=x0, real=real, weights=weights, condition=condition)


def through_everything(setup: Setup, batch: TwoStepBatch, step: int) -> Tensor:
    """The student's gradient by plain autograd of the formulas, critics in the graph."""
    config, student, teacher = setup.method.config, setup.student, setup.teacher
    shape, seeds, condition = student.latent_shape, batch.seeds, batch.condition
    n = batch.z if config.noise == "same" else gaussians(seeds, shape, "inject 0").double()
    y1, y2 = generate(student.velocity, batch.z, n, condition, SIGMAS, config.end_to_end)
    total = torch.zeros(len(seeds), dtype=torch.float64)
    terms = {"final": (y2, 1.0, config.regression)}
    if config.step1.weight:
        terms["first"] = (y1, config.step1.weight, config.step1.regression)
    for name, (y, weight, regression) in terms.items():
        tau = logit_normals(seeds, "student", step, name, "tau").double()
        noise = gaussians(seeds, shape, "student", step, name, "noise").double()
        noised = per_sample(1 - tau, y) * y + per_sample(tau, y) * noise
        logits = setup.networks["heads"](name, teacher.features(noised, tau, condition, [0, 1]))
        hinge = config.discriminator.loss == "hinge"
        loss = config.adversarial * (-logits if hinge else softplus(-logits))
        t = uniforms(seeds, *DMD_RANGE, "dmd", step, name, "t").double()
        noise = gaussians(seeds, shape, "dmd", step, name).double()
        noised = per_sample(1 - t, y) * y + per_sample(t, y) * noise
        fake = noised - per_sample(t, y) * setup.networks["fake_score"](noised, t, condition)
        real = noised - per_sample(t, y) * teacher.velocity(noised, t, condition)
        scale = (y - real).abs().mean((1, 2, 3, 4), keepdim=True)
        loss = loss + config.dmd * (y * ((fake - real) / scale).detach()).mean((1, 2, 3, 4))
        loss = loss + regression * (y - batch.x0).square().mean((1, 2, 3, 4))
        total = total + weight * loss
    parameters = list(student.module.parameters())
    found = torch.autograd.grad((batch.weights * total).sum(), parameters)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": "fresh", "parameters": "shared"},
        {"end_to_end": False},
        {"step1": StepOneConfig(weight=0)},
        {"discriminator": DiscriminatorConfig(depths=(0.5, 1.0), loss="hinge", updates=1)},
    ],
    ids=str,
)
def test_the_student_s_gradient_is_that_of_autograd_through_everything(changes: dict[str, Any]):
    setup, batch = small(settings(**changes))
    expected = through_everything(setup, batch, step=1)
    setup.update(batch, step=1)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(setup.networks["student"].gradient, expected, rtol=0, atol=1e-12)


def test_an_update_leaves_gradients_on_the_network_that_steps_and_no_other():
    setup, batch = small(settings())
    setup.update(batch, step=1)
    assert setup.held == [
        (name, {name}) for name in ["heads"] * 2 + ["fake_score"] * 2 + ["student"]
    ]
    parameters = [p for network in setup.networks.values() for p in network.parameters]
    assert all(p.grad is None for p in [*parameters, *setup.teacher.module.parameters()])


def test_warm_up_is_regression_alone():
    setup, batch = small(settings(regression=0.0), heads=0.1, fake_score=0.1)
    before = copy.deepcopy(setup.networks["heads"].module.state_dict())
    table = setup.update(batch, step=0)
    assert not any(name.startswith(("discriminator", "dmd", "loss/adv")) for name in table)
    torch.testing.assert_close(
        table["loss/student"], table["error/final"] + 0.6 * table["error/first"]
    )
    assert [name for name, _ in setup.held] == ["student"]
    after = setup.networks["heads"].module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


RATES = {"student": 0.1, "heads": 1e-3, "fake_score": 0.1}


def trained(*cuts: Sequence[int], weightless: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """All weights, and the second step's table, after two steps with micro-batches of these rows."""
    setup, batch = small(settings(noise="fresh"), **RATES)
    batch.weights[6 - weightless :] = 0
    batches = [part(batch, rows) for rows in cuts]
    setup.update(*batches, step=1)
    table = setup.update(*batches, step=2)
    weights = [p.detach().flatten() for n in setup.networks.values() for p in n.parameters]
    return torch.cat(weights), table


def test_equal_steps_are_equal_to_the_last_bit():
    (weights, table), (again, same) = trained(range(6)), trained(range(6))
    assert torch.equal(weights, again)
    assert all(torch.equal(column, same[name]) for name, column in table.items())


@pytest.mark.parametrize("cuts", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4], [5]]], ids=str)
def test_micro_batches_change_nothing(cuts: list[list[int]]):
    (weights, table), (cut, columns) = trained(range(6)), trained(*cuts)
    torch.testing.assert_close(cut, weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns, table, rtol=0, atol=1e-10)


def test_rows_of_weight_0_change_nothing_and_leave_no_row():
    weights, table = trained([0, 1, 2, 3])
    padded, columns = trained([0, 1, 2], [3, 4, 5], weightless=2)
    torch.testing.assert_close(padded, weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns, table, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("step", [0, 1])
def test_evaluations_are_those_of_the_networks(step: int, guidance: float):
    setup, batch = small(settings(), guidance)
    setup.update(batch, step=step)
    rows = sum(policy.rows for policy in (setup.student, setup.teacher, *setup.copies))
    assert rows == 6 * setup.method.evaluations(step)[0]
