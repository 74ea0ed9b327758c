"""Two-step students in the style of Z-Image Turbo++ (arXiv 2606.12575).

The paper names three ingredients: the discriminator's real samples are the teacher's, the steps have
parameters of their own, and the final sample's gradient flows back through step 1 while a loss on
step 1 regularises it. It gives no code and no hyper-parameters; what is not in those sentences is ours.

    y1   = z - s0 G1(z, s0, c)                              estimate of x0 after step 1
    x_s1 = (1 - s1) y1 + s1 n                               n = z (one Euler step) or fresh noise
    y2   = x_s1 - s1 G2(x_s1, s1, c)                        the sample

    L_D  = E softplus(-D(real_tau)) + E softplus(D(fake_tau)) + (r / 2) aR1
    L_G  = adv softplus(-D(y2_tau)) + reg |y2 - x0|^2 + dmd DMD(y2) + step1 * l(y1)
    l(y) = adv softplus(-D1(y_tau)) + reg1 |y - x0|^2 + dmd DMD(y)

Real and fake share condition, noise level tau (logit-normal) and noise; x0 is the teacher's sample from
the *same* z, paired in the regressions and unpaired for D, whose fakes come from other noise. All means
are over elements of a sample. DMD's gradient is that of DMD2 (arXiv 2405.14867), (x0_fake - x0_real) /
mean|y - x0_real|, with a fake-score network that learns the student's samples by flow matching. Switches
of the configuration give the neighbours: ``shared`` with DMD alone is DMD2, ``adversarial`` alone is
LADD (arXiv 2403.12015), ``regression`` alone is trajectory regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from distill.batches import TwoStepBatch, two_step_batches
from distill.contracts import Network, Table, TeacherItem
from distill.discriminator import (
    DiscriminatorConfig,
    Heads,
    approximate_r1,
    discriminator_losses,
    generator_losses,
    layers_at,
)
from distill.networks import HeadsModule, StudentModule, VelocityModule
from distill.noise import gaussians, logit_normals, uniforms
from distill.real_data import RealSamples
from distill.regions import RegionsConfig
from rollout.flow import FlowPlan, per_sample
from rollout.policies.base import FlowPolicy, forwards_per_sample
from rollout.policies.two_step import Parameters

# The range of noise levels that DMD2 and its fake score use.
DMD_RANGE = (0.02, 0.98)
# The stream of a sample's second noise; the sampler's own, so that training sees what it draws.
FRESH = "inject 0"


class StepOneConfig(BaseModel, frozen=True, extra="forbid"):
    """The loss on the first step's estimate, l(y1)."""

    weight: float = Field(default=1.0, ge=0, description="Of the whole loss on y1; 0: none.")
    regression: float = Field(default=1.0, ge=0, description="Of |y1 - x0|^2 inside it.")


class FakeScoreConfig(BaseModel, frozen=True, extra="forbid"):
    """The network that follows the student's distribution, for DMD."""

    updates: int = Field(default=5, ge=1, description="Its steps per student step.")
    learning_rate: float = Field(default=2e-6, gt=0, description="AdamW's.")
    betas: tuple[float, float] = Field(default=(0.0, 0.999), description="AdamW's moments.")


class TwoStepConfig(BaseModel, frozen=True, extra="forbid"):
    """A two-step student; the paper's ablations and its neighbours are values of these."""

    kind: Literal["two_step"] = "two_step"
    parameters: Parameters = Field(
        default="full_per_step", description="What the two steps have of their own."
    )
    noise: Literal["same", "fresh"] = Field(
        default="same", description="n between the steps: z again (an Euler step), or fresh."
    )
    end_to_end: bool = Field(
        default=True, description="The final sample's gradient flows through step 1."
    )
    real: Literal["teacher", "data"] = Field(
        default="teacher", description="The discriminator's real class."
    )
    adversarial: float = Field(default=1.0, ge=0, description="Weight of the adversarial terms.")
    regression: float = Field(default=0.0, ge=0, description="Weight of |y2 - x0|^2, paired.")
    dmd: float = Field(default=0.0, ge=0, description="Weight of the DMD terms.")
    step1: StepOneConfig = Field(default=StepOneConfig(), description="The loss on step 1.")
    warmup_steps: int = Field(
        default=50, ge=0, description="Steps of paired regression alone, before the rest begins."
    )
    regions: RegionsConfig | None = Field(
        default=None, description="ARIA's allocation of conditions; null: all evenly."
    )
    discriminator: DiscriminatorConfig = Field(
        default=DiscriminatorConfig(), description="Heads on the teacher's features."
    )
    fake_score: FakeScoreConfig = Field(
        default=FakeScoreConfig(), description="DMD's fake-score network."
    )

    def evaluation_plan(self, steps: int | None = None, orders: int = 0) -> FlowPlan:
        """How the sampler draws from the student."""
        return FlowPlan(
            steps=2 if steps is None else steps, renoise=self.noise == "fresh", keep_final=True
        )


Key = tuple[int | str, ...]
Losses = Callable[[TwoStepBatch], tuple[Tensor, Table]]


class TwoStep:
    """The method on one rank: its networks, and the updates of a step.

    Args:
        config: its options. sigmas: (s0, s1, 0).
        teacher: frozen; its features feed the heads, its velocity is DMD's real score.
        guidance_scale: the teacher's.
        seed: keys all noise.
        real: draws the discriminator's real samples; None: they are the teacher's.
    """

    def __init__(
        self,
        config: TwoStepConfig,
        sigmas: Sequence[float],
        teacher: FlowPolicy,
        guidance_scale: float,
        seed: int,
        real: RealSamples | None = None,
    ) -> None:
        self.config, self.sigmas, self.teacher = config, tuple(sigmas), teacher
        self.guidance_scale, self.seed, self.real = guidance_scale, seed, real
        self.layers = layers_at(config.discriminator.depths, teacher.blocks)

    @property
    def judged(self) -> tuple[str, ...]:
        """Which of y1 and y2 the terms of distributions (adversarial, DMD) look at."""
        return ("final", "first") if self.config.step1.weight else ("final",)

    def modules(
        self, student: FlowPolicy, copy_of_teacher: Callable[[], FlowPolicy]
    ) -> dict[str, nn.Module]:
        """The networks that train, by name; each belongs in an engine of its own."""
        config = self.config
        modules: dict[str, nn.Module] = {
            "student": StudentModule(student, self.sigmas, config.end_to_end)
        }
        if config.adversarial:
            widths = [self.teacher.width] * len(self.layers)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                heads = Heads(widths, config.discriminator.channels, self.judged)
            modules["heads"] = HeadsModule(heads.to(self.teacher.device))
        if config.dmd:
            modules["fake_score"] = VelocityModule(copy_of_teacher())
        return modules

    def batches(
        self,
        items: Sequence[TeacherItem],
        fetch: Callable[[Any], Any],
        size: int,
        count: int,
    ) -> Iterator[TwoStepBatch]:
        """Exactly ``count`` micro-batches."""
        return two_step_batches(self.teacher, items, fetch, size, count, self.real)

    def evaluations(self, step: int) -> tuple[int, int]:
        """Network evaluations and backward passes a sample takes in ``step``; heads count as none."""
        judged, config = len(self.judged), self.config
        forwards = backwards = 2
        if step < config.warmup_steps:
            return forwards, backwards
        if config.adversarial:
            forwards += config.discriminator.updates * (2 + 3 * judged) + judged
            backwards += judged
        if config.dmd:
            scores = 1 + forwards_per_sample(self.guidance_scale)
            forwards += config.fake_score.updates * (2 + judged) + scores * judged
            backwards += config.fake_score.updates * judged
        return forwards, backwards

    def empty_loss(self, networks: Mapping[str, Network], name: str, batch: TwoStepBatch) -> Tensor:
        """A loss of 0 in which every parameter of a network takes part."""
        half = torch.full_like(batch.weights, 0.5)
        if name == "student":
            y1, y2 = networks[name](batch.z, batch.z, batch.condition)
            return 0 * (y1.sum() + y2.sum())
        if name == "fake_score":
            return 0 * networks[name](batch.z, half, batch.condition).sum()
        with torch.no_grad():
            features = self.teacher.features(batch.z, half, batch.condition, self.layers)
        return 0 * sum((networks[name](part, features).sum() for part in self.judged), half.sum())

    def update(
        self, networks: Mapping[str, Network], batches: Sequence[TwoStepBatch], step: int
    ) -> tuple[list[Table], dict[str, float]]:
        """One step: discriminator and fake score first, then the student; tables and norms.

        The micro-batches are the same samples in each of these updates. A student's sample that a
        critic learns from starts from noise of its own.
        """
        tables: list[Table] = []
        norms: dict[str, float] = {}
        begun = step >= self.config.warmup_steps
        if begun and "heads" in networks:
            for number in range(self.config.discriminator.updates):
                losses = self._discriminator_losses(networks, ("heads", step, number))
                norms["heads"] = _optimise(networks["heads"], batches, losses, tables)
        if begun and "fake_score" in networks:
            for number in range(self.config.fake_score.updates):
                losses = self._fake_score_losses(networks, ("fake", step, number))
                norms["fake_score"] = _optimise(networks["fake_score"], batches, losses, tables)
        losses = self._student_losses(networks, step, begun)
        norms["student"] = _optimise(networks["student"], batches, losses, tables)
        return tables, norms

    def _discriminator_losses(self, networks: Mapping[str, Network], key: Key) -> Losses:
        """L_D of a micro-batch, over all that is judged."""
        config, heads = self.config.discriminator, networks["heads"]

        def losses(batch: TwoStepBatch) -> tuple[Tensor, Table]:
            fakes = self._fresh(networks, batch, key)
            total = torch.zeros_like(batch.weights)
            table: Table = {}
            for name in self.judged:
                tau, noise = self._noise(batch, *key, name)
                delta = gaussians(batch.seeds, batch.x0.shape[1:], *key, name, "r1").to(noise)
                real_tau = renoised_at(batch.real, tau, noise)
                with torch.no_grad():
                    real, moved, fake = (
                        self.teacher.features(x, tau, batch.condition, self.layers)
                        for x in (
                            real_tau,
                            real_tau + config.r1_sigma * delta,
                            renoised_at(fakes[name], tau, noise),
                        )
                    )
                on_real, on_fake = heads(name, real), heads(name, fake)
                penalty = approximate_r1(on_real, heads(name, moved), config.r1_sigma)
                total = total + discriminator_losses(on_real, on_fake, config.loss)
                total = total + config.r1_weight / 2 * penalty
                table |= {
                    f"discriminator/{name}/real": on_real.detach(),
                    f"discriminator/{name}/fake": on_fake.detach(),
                    f"discriminator/{name}/r1": penalty.detach(),
                }
            return total, table | {"loss/discriminator": total.detach()}

        return losses

    def _fake_score_losses(self, networks: Mapping[str, Network], key: Key) -> Losses:
        """Flow matching on the student's samples: |v - (eps - y)|^2."""

        def losses(batch: TwoStepBatch) -> tuple[Tensor, Table]:
            fakes = self._fresh(networks, batch, key)
            total = torch.zeros_like(batch.weights)
            for name in self.judged:
                t = uniforms(batch.seeds, *DMD_RANGE, *key, name, "t").to(batch.z)
                noise = gaussians(batch.seeds, batch.z.shape[1:], *key, name).to(batch.z)
                x = renoised_at(fakes[name], t, noise)
                velocity = networks["fake_score"](x, t, batch.condition)
                total = total + mean_square(velocity - (noise - fakes[name]))
            return total, {"loss/fake_score": total.detach()}

        return losses

    def _student_losses(self, networks: Mapping[str, Network], step: int, begun: bool) -> Losses:
        """L_G by vector-Jacobian product: the critics see leaves, the student their gradient."""
        config = self.config

        def losses(batch: TwoStepBatch) -> tuple[Tensor, Table]:
            y1, y2 = networks["student"](batch.z, self.second_noise(batch), batch.condition)
            leaves = {"first": y1.detach().requires_grad_(), "final": y2.detach().requires_grad_()}
            table: Table = {
                "seed": torch.tensor(batch.seeds),
                "error/first": mean_square(leaves["first"] - batch.x0).detach(),
                "error/final": mean_square(leaves["final"] - batch.x0).detach(),
            }
            paired = {"final": config.regression, "first": config.step1.regression}
            outer = {"final": 1.0, "first": config.step1.weight}
            total = torch.zeros_like(batch.weights)
            for name in self.judged:
                coefficient = paired[name] if begun else 1.0
                term = coefficient * mean_square(leaves[name] - batch.x0)
                if begun:
                    distributional, columns = self._distributional(
                        networks, leaves[name], name, batch, step
                    )
                    term = term + distributional
                    table |= columns
                total = total + outer[name] * term
            wanted = list(leaves.values())
            # Unweighted here: the caller's weights enter once, on the product.
            gradients = torch.autograd.grad(total.sum(), wanted, materialize_grads=True)
            product = torch.zeros_like(batch.weights)
            for y, gradient in zip((y1, y2), gradients, strict=True):
                product = product + (y * gradient).flatten(1).sum(1)
            return product, table | {"loss/student": total.detach()}

        return losses

    def _distributional(
        self,
        networks: Mapping[str, Network],
        leaf: Tensor,
        name: str,
        batch: TwoStepBatch,
        step: int,
    ) -> tuple[Tensor, Table]:
        """The adversarial and DMD terms (n,) of ``leaf``, differentiable in it."""
        config = self.config
        term, table = torch.zeros_like(batch.weights), dict[str, Tensor]()
        if config.adversarial:
            tau, noise = self._noise(batch, "student", step, name)
            x = renoised_at(leaf, tau, noise)
            features = self.teacher.features(x, tau, batch.condition, self.layers)
            adversarial = generator_losses(
                networks["heads"].apply(name, features), config.discriminator.loss
            )
            term = term + config.adversarial * adversarial
            table[f"loss/adversarial/{name}"] = adversarial.detach()
        if config.dmd:
            direction = self._dmd(networks, leaf.detach(), name, batch, step)
            term = term + config.dmd * (leaf * direction).flatten(1).mean(1)
            table[f"dmd/{name}"] = direction.square().flatten(1).mean(1)
        return term, table

    @torch.no_grad()
    def _dmd(
        self,
        networks: Mapping[str, Network],
        y: Tensor,
        name: str,
        batch: TwoStepBatch,
        step: int,
    ) -> Tensor:
        """DMD2's direction (n, C, F, H, W): (x0_fake - x0_real) / mean|y - x0_real|."""
        t = uniforms(batch.seeds, *DMD_RANGE, "dmd", step, name, "t").to(y)
        noise = gaussians(batch.seeds, y.shape[1:], "dmd", step, name).to(y)
        x = renoised_at(y, t, noise)
        fake = x - per_sample(t, x) * networks["fake_score"].apply(x, t, batch.condition)
        velocity = self.teacher.guided_velocity(x, t, batch.condition, self.guidance_scale)
        real = x - per_sample(t, x) * velocity
        scale = (y - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        return (fake - real) / per_sample(scale, x)

    @torch.no_grad()
    def _fresh(
        self, networks: Mapping[str, Network], batch: TwoStepBatch, key: Key
    ) -> dict[str, Tensor]:
        """The student's samples from noise that only this update sees."""
        shape = batch.z.shape[1:]
        z = gaussians(batch.seeds, shape, *key, "z").to(batch.z)
        fresh = self.config.noise == "fresh"
        noise = gaussians(batch.seeds, shape, *key, "n").to(z) if fresh else z
        y1, y2 = networks["student"].apply(z, noise, batch.condition)
        return {"first": y1, "final": y2}

    def _noise(self, batch: TwoStepBatch, *key: int | str) -> tuple[Tensor, Tensor]:
        """tau (n,) and the noise (n, C, F, H, W) that real and fake have in common."""
        tau = logit_normals(batch.seeds, *key, "tau").to(batch.z)
        return tau, gaussians(batch.seeds, batch.z.shape[1:], *key, "noise").to(batch.z)

    def second_noise(self, batch: TwoStepBatch) -> Tensor:
        """n between the steps, the one that the sampler takes for the same draw."""
        if self.config.noise == "same":
            return batch.z
        return gaussians(batch.seeds, batch.z.shape[1:], FRESH).to(batch.z)


def renoised_at(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """``(1 - t) x + t noise`` with a level t (n,) for each sample."""
    return per_sample(1 - t, x) * x + per_sample(t, x) * noise


def mean_square(x: Tensor) -> Tensor:
    """(n,), over the elements of each sample."""
    return x.square().flatten(1).mean(1)


def _optimise(
    network: Network, batches: Sequence[TwoStepBatch], losses: Losses, tables: list[Any]
) -> float:
    """One optimiser step of ``network`` over all micro-batches; rows of weight 0 leave the table."""
    for i, batch in enumerate(batches):
        values, table = losses(batch)
        network.backward((batch.weights * values).sum(), last=i == len(batches) - 1)
        kept = (batch.weights != 0).cpu()
        tables.append({name: column.cpu()[kept] for name, column in table.items()})
    return network.step()
