"""All distillation methods, and what is built for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from distill.compression import Compression, CompressionConfig, prune
from distill.real_data import real_digits
from distill.two_step import TwoStep, TwoStepConfig
from rollout.draws import Group
from rollout.flow import FlowPlan, shifted_sigmas
from rollout.flow_sampler import FlowRollout, FlowSampler, FlowSamplerConfig
from rollout.policies.base import FlowPolicy
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.z_image import ZImageConfig

DistillConfig = Annotated[TwoStepConfig | CompressionConfig, Field(discriminator="kind")]
Method = TwoStep | Compression


def student_sigmas(sampler: FlowSamplerConfig) -> tuple[float, ...]:
    """The student's grid: from 1, two steps of the teacher's shift."""
    return shifted_sigmas(2, sampler.shift, 1.0)


def build_teacher(policy: WanConfig | ZImageConfig, device: str) -> FlowPolicy:
    """The teacher: frozen."""
    teacher = policy.model_copy(update={"lora": None}).build(device)
    teacher.module.requires_grad_(False)
    return teacher


def build_student(
    config: DistillConfig,
    policy: WanConfig | ZImageConfig,
    sampler: FlowSamplerConfig,
    device: str,
    seed: int,
) -> FlowPolicy:
    """The student before training: its teacher, or part of it."""
    if isinstance(config, CompressionConfig):
        return prune(policy.model_copy(update={"lora": None}).build(device), config.layers)
    sigmas, renoise = student_sigmas(sampler), config.noise == "fresh"
    return TwoStepPolicy(policy, config.parameters, sigmas, device, seed, renoise)


def build_method(
    config: DistillConfig, sampler: FlowSamplerConfig, teacher: FlowPolicy, seed: int
) -> Method:
    """The method on a rank."""
    real = real_digits(moving=teacher.latent_shape[1] > 1)
    if isinstance(config, CompressionConfig):
        return Compression(config, teacher, real)
    own = None if config.real == "teacher" else real
    return TwoStep(config, student_sigmas(sampler), teacher, sampler.guidance_scale, seed, own)


class PairSampler:
    """Samples of a teacher or of its student, as a group's plan says."""

    def __init__(self, config: FlowSamplerConfig, teacher: FlowPolicy, student: FlowPolicy) -> None:
        self.config = config
        self.teacher = FlowSampler(config, teacher)
        # What a teacher needs guidance for, its student learns; a two-step student starts at 1.
        changed: dict[str, float] = {"guidance_scale": 1.0}
        if isinstance(student, TwoStepPolicy):
            changed["sigma_max"] = student.sigmas[0]
        self.student = FlowSampler(config.model_copy(update=changed), student)

    def sample(self, groups: Sequence[Group], plans: Sequence[FlowPlan]) -> list[FlowRollout]:
        """Rollouts of ``groups``, all of the teacher or all of the student."""
        if len({plan.teacher for plan in plans}) > 1:
            raise ValueError("a call is of the teacher or of the student, not of both")
        sampler = self.teacher if plans[0].teacher else self.student
        return sampler.sample(groups, plans)


def teacher_plan(steps: int | None = None) -> FlowPlan:
    """How the teacher is drawn: its ODE, final states kept."""
    return FlowPlan(teacher=True, keep_final=True, steps=steps)
