"""The recipe: one frozen document that describes a run. Defaults live here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from distill.catalogue import DistillConfig
from recipes.comparison import ComparisonConfig, FlowComparison, TextComparison
from rewards.catalogue import RewardConfig
from rl.ahead import ScheduleConfig
from rl.catalogue import AlgorithmConfig
from rl.flash_grpo import FlashGRPOConfig
from rollout.flow_sampler import FlowSamplerConfig
from rollout.masked import MaskedSamplerConfig
from rollout.policies.llada.policy import LladaConfig
from rollout.policies.wan import WanConfig
from rollout.policies.z_image import ZImageConfig
from rollout.prompts import DigitPrompts, PromptsConfig

PolicyConfig = Annotated[WanConfig | ZImageConfig | LladaConfig, Field(discriminator="kind")]
FlowPolicyConfig = Annotated[WanConfig | ZImageConfig, Field(discriminator="kind")]


class GroupsConfig(BaseModel, frozen=True, extra="forbid"):
    """How many samples a step draws."""

    prompts_per_step: int = Field(default=16, ge=1, description="Groups per step.")
    group_size: int = Field(default=8, ge=2, description="Samples of one prompt that are compared.")


class FlowRolloutConfig(GroupsConfig, FlowSamplerConfig, frozen=True, extra="forbid"):
    """Rollouts of a flow policy."""


class MaskedRolloutConfig(GroupsConfig, MaskedSamplerConfig, frozen=True, extra="forbid"):
    """Rollouts of a masked-diffusion language model."""

    group_size: int = Field(
        default=8, ge=1, description="Samples of one prompt that are compared; 1 with rl.kind sft."
    )


RolloutConfig = Annotated[FlowRolloutConfig | MaskedRolloutConfig, Field(discriminator="kind")]


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW, clipping and the average that is evaluated."""

    learning_rate: float = Field(default=1e-4, gt=0, description="AdamW's learning rate.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's moments.")
    clip_norm: float = Field(
        default=1.0, gt=0, description="Global gradient norm is clipped to this."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimiser steps of linear warm-up.")
    decay: Literal["none", "linear", "cosine"] = Field(
        default="none", description="How the learning rate falls to 0 at the last step."
    )
    ema_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Average of the weights, min((1+n)/(10+n), this); it is what is evaluated.",
    )


class LearnerConfig(BaseModel, frozen=True, extra="forbid"):
    """The DeepSpeed learner ranks."""

    ranks: int = Field(default=1, ge=1, description="Data-parallel learner ranks.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="ZeRO stage; 1 or 2 for adapters."
    )
    micro_batch: int = Field(
        default=16, ge=1, description="Network evaluations per forward and backward on a rank."
    )
    gpus: float = Field(default=0.0, ge=0, description="GPUs per rank; 0 trains on CPU.")
    cpus: float = Field(
        default=1.0, gt=0, description="CPU cores per rank (threads, at least one)."
    )


class WorkersConfig(BaseModel, frozen=True, extra="forbid"):
    """The rollout actors."""

    count: int = Field(default=1, ge=1, description="Rollout actors.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs per actor; a fraction shares one.")
    cpus: float = Field(
        default=1.0, gt=0, description="CPU cores per actor (threads, at least one)."
    )


class ClusterConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the actors run and how long anything may take."""

    address: str = Field(
        default="local",
        description="local starts Ray on this machine; auto or host:port joins one.",
    )
    colocated: bool = Field(
        default=False,
        description="Rollout actor i and learner rank i share a bundle: they never work at the "
        "same time in sync mode, so each may count on all of its cores or GPU.",
    )
    start_timeout: float = Field(
        default=300.0, gt=0, description="Seconds until all actors are up."
    )
    job_timeout: float = Field(default=600.0, gt=0, description="Seconds one job may take.")
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Restarts of a rollout actor, and of the learner group, per run.",
    )


class GapConfig(BaseModel, frozen=True, extra="forbid"):
    """The variational gap of evaluation samples, see ``rl/gap.py``."""

    samples: int = Field(default=16, ge=1, description="Evaluation samples it is estimated on.")
    orders: int = Field(default=4, ge=2, description="Orders per sample, beyond exact lengths.")


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """The pinned evaluation: noise-free sampling, fixed seeds, averaged weights, held-out draws."""

    every: int = Field(default=20, ge=1, description="Training steps between evaluations.")
    samples: int = Field(default=200, ge=1, description="Samples, prompts in turn.")
    steps: int | None = Field(
        default=None, ge=1, description="Sampling steps; default the rollout's."
    )
    prompts: PromptsConfig | None = Field(
        default=None, description="Held-out prompts; default the training prompts."
    )
    gap: GapConfig | None = Field(
        default=None, description="Text: follow the variational gap of the samples."
    )
    rewards: tuple[RewardConfig, ...] = Field(
        default=(),
        description="Held-out rewards, scored in evaluation only, never trained against.",
    )


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """When training state is written and how much is kept."""

    every: int = Field(default=20, ge=1, description="Training steps between checkpoints.")
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    keep_best: str | None = Field(
        default=None,
        description="An evaluation metric; the checkpoint where it was highest is kept.",
    )
    storage: str | None = Field(
        default=None,
        description="Copy checkpoints to this s3://, gs://, hdfs:// or file:// URL, in a directory of "
        "the run's name; default: they are in the run directory only.",
    )


class TeacherRolloutConfig(FlowSamplerConfig, frozen=True, extra="forbid"):
    """How the teacher of a distillation is sampled; the student takes two steps of the same shift."""

    steps: int = Field(default=8, ge=2, le=1000, description="Steps of the teacher.")
    sigma_max: float = Field(
        default=1.0, gt=0, le=1, description="Start of the unshifted grid; Wan's pipeline: 0.999."
    )
    prompts_per_step: int = Field(default=32, ge=1, description="Conditions per training step.")
    group_size: int = Field(default=4, ge=1, description="Samples of a condition.")
    store: Path | None = Field(
        default=None,
        description="Take samples from this store, which 'rectify teacher' fills; default: workers "
        "draw them while the learner trains.",
    )
    groups_per_shard: int = Field(default=64, ge=1, description="Conditions in a file of a store.")


class RunRecipe(BaseModel, frozen=True, extra="forbid"):
    """What every run has: a policy, prompts, rewards that look at it, and the cluster that does it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Names the run directory."
    )
    seed: int = Field(default=0, ge=0, description="All randomness of the run.")
    steps: int = Field(default=100, ge=0, description="Training steps.")
    prompts: PromptsConfig = Field(default=DigitPrompts(), description="Where prompts come from.")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW and averaging."
    )
    learner: LearnerConfig = Field(default=LearnerConfig(), description="DeepSpeed ranks.")
    workers: WorkersConfig = Field(default=WorkersConfig(), description="Rollout actors.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="Ray.")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Held-out evaluation."
    )
    checkpoints: CheckpointConfig = Field(default=CheckpointConfig(), description="Saved state.")
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow", "prometheus"], ...] = Field(
        default=(), description="Trackers beside metrics.jsonl, which is always written."
    )
    run_dir: Path = Field(default=Path("runs"), description="Parent of the run directory.")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir / self.name


class Recipe(RunRecipe, frozen=True, extra="forbid"):
    """An alignment run: a policy learns from rewards."""

    policy: PolicyConfig = Field(default=WanConfig(), description="The model that trains.")
    rollout: RolloutConfig = Field(default=FlowRolloutConfig(), description="Sampling.")
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="What is optimised.")
    rl: AlgorithmConfig = Field(default=FlashGRPOConfig(), description="The algorithm.")
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="What may run at the same time."
    )
    compare: ComparisonConfig | None = Field(
        default=None,
        description="What 'rectify compare' runs; default a few methods at three budgets.",
    )

    @property
    def comparison(self) -> FlowComparison | TextComparison:
        """``compare``, or the default for the kind of policy."""
        text = isinstance(self.rollout, MaskedSamplerConfig)
        return self.compare or (TextComparison() if text else FlowComparison())


class DistillRecipe(RunRecipe, frozen=True, extra="forbid"):
    """A distillation: a student learns from the samples of a teacher."""

    policy: FlowPolicyConfig = Field(
        default=WanConfig(), description="The teacher; its lora is what lora_per_step trains."
    )
    rollout: TeacherRolloutConfig = Field(
        default=TeacherRolloutConfig(), description="Sampling of the teacher."
    )
    rewards: tuple[RewardConfig, ...] = Field(
        default=(), description="Scores of samples in evaluation; nothing is optimised."
    )
    distill: DistillConfig = Field(description="The method.")


AnyRecipe = Recipe | DistillRecipe
# What a document with a key describes; None: any other.
KINDS: dict[str | None, type[AnyRecipe]] = {"distill": DistillRecipe, None: Recipe}


def recipe_type(document: Mapping[str, Any]) -> type[AnyRecipe]:
    """What a document describes."""
    return next(kind for key, kind in KINDS.items() if key is None or key in document)


def recipe_from_json(text: str) -> AnyRecipe:
    """A validated recipe that was dumped as JSON."""
    return recipe_type(json.loads(text)).model_validate_json(text)
