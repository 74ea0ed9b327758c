"""Students that sample in two steps: what the parameters of the steps have in common.

A step has a network of its own (``full_per_step``), an adapter of its own on one base
(``lora_per_step``), or both steps are one network (``shared``). A forward goes to the first step's at
``t`` above a boundary between the two sigmas, else to the second's, which is how Wan2.2 keeps two
transformers in one pipeline; so a student is sampled, trained and saved as that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rollout.policies.base import FlowPolicy
from rollout.policies.pipelines import RENOISING
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy
from rollout.policies.wan_pipeline import WanPipelinePolicy
from rollout.policies.z_image import ZImageConfig, ZImagePolicy

Parameters = Literal["shared", "lora_per_step", "full_per_step"]
StepPolicy = WanPolicy | WanPipelinePolicy | ZImagePolicy
# Names of the steps' networks, first step first; those of Wan2.2's pipeline.
NETWORKS = ("transformer", "transformer_2")


class TwoStepPolicy(FlowPolicy):
    """A two-step student that starts as its teacher.

    Attributes:
        steps: the policy of each step (one, where they share).
        sigmas: (sigma_0, sigma_1, 0). renoise: it was trained with fresh noise between the steps.
    """

    def __init__(
        self,
        teacher: WanConfig | ZImageConfig,
        parameters: Parameters,
        sigmas: Sequence[float],
        device: str = "cpu",
        seed: int = 0,
        renoise: bool = False,
    ) -> None:
        """``teacher.lora`` is what ``lora_per_step`` trains.

        Raises:
            ValueError: the teacher is a pipeline of two transformers.
        """
        adapter = teacher.lora if parameters == "lora_per_step" else None
        first = teacher.model_copy(update={"lora": adapter}).student(device, seed)
        self.steps: list[StepPolicy] = [first]
        if parameters != "shared":
            self.steps.append(_second(first))
        modules = zip(NETWORKS, self.steps, strict=False)
        module = nn.ModuleDict({name: policy.module for name, policy in modules})
        super().__init__(module, adapted=adapter is not None, reference=False)
        self.sigmas, self.renoise = tuple(sigmas), renoise
        self.latent_shape = first.latent_shape
        self.blocks, self.width = first.blocks, first.width

    @classmethod
    def load(cls, config: WanConfig | ZImageConfig, device: str = "cpu") -> TwoStepPolicy:
        """A saved student (not of adapters), all of it trainable.

        Raises:
            ValueError: the checkpoint's directory holds no two-step student.
        """
        directory = config.directory()
        file = directory / "scheduler" / "scheduler_config.json"
        scheduler = json.loads(file.read_text()) if file.is_file() else {}
        if not scheduler.get("shift_terminal"):
            raise ValueError(f"{directory} holds no two-step student: {file.name} names no sigma")
        weights = directory / NETWORKS[1] / "diffusion_pytorch_model.safetensors"
        policy = cls(
            config,
            "full_per_step" if weights.is_file() else "shared",
            (1.0, scheduler["shift_terminal"], 0.0),
            device,
            renoise=scheduler["_class_name"] == RENOISING,
        )
        if weights.is_file():
            policy.steps[1].module.load_state_dict(load_file(weights))
        return policy

    @property
    def boundary(self) -> float:
        """Forwards at ``t`` from here up belong to the first step."""
        return (self.sigmas[0] + self.sigmas[1]) / 2

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See ``FlowPolicy``."""
        return self.steps[0].encode(prompts)

    def encode_null(self, count: int) -> Tensor:
        """See ``FlowPolicy``."""
        return self.steps[0].encode_null(count)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``FlowPolicy``; rows go to their step's network."""
        high = t >= self.boundary
        first, second = self.steps[0], self.steps[-1]
        if high.all() or first is second:
            return first.velocity(x, t, condition)
        if not high.any():
            return second.velocity(x, t, condition)
        velocity = torch.empty_like(x)
        velocity[high] = first.velocity(x[high], t[high], condition[high])
        velocity[~high] = second.velocity(x[~high], t[~high], condition[~high])
        return velocity

    def features(
        self, x: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """Of the first step's network."""
        return self.steps[0].features(x, t, condition, layers)

    def pixels(self, x: Tensor) -> Tensor:
        """See ``FlowPolicy``."""
        return self.steps[0].pixels(x)

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """As a pipeline of stock diffusers, or for adapters a file for each step."""
        parts = {
            name: {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in weights.items()
                if key.startswith(f"{name}.")
            }
            for name in self.module
        }
        for name, policy in zip(self.module, self.steps, strict=True):
            policy.save(directory / name if self._adapted else directory, parts[name], name)
        if not self._adapted:
            self.steps[0].save_pipeline(
                directory, self.sigmas[1], self.boundary, list(self.module), self.renoise
            )


def _second(first: StepPolicy) -> StepPolicy:
    """A copy that trains apart and shares what is frozen."""
    frozen = {id(p): p for p in first.module.parameters() if not p.requires_grad}
    second = copy.copy(first)
    second.module = second.network = copy.deepcopy(first.module, frozen)
    return second
