"""Memory of a distillation's processes: what a learner rank and a rollout actor hold at their peak.

State is that of ``recipes/memory_state.py``, for each network that trains. They step one after another:
ZeRO stages 1 and 2 release gradients and buffers in between, so those of the largest count; stages 0
and 3 keep all (DeepSpeed 0.19, measured on one rank). The teacher is frozen, whole and fp32 on every
rank and actor. Activations are those of ``recipes/memory_flow.py``.

A student's update holds two forwards of its own and, until the samples have their gradient, for each
sample judged one of the teacher, whose features are there in fp32 for the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.memory_flow import Forward
from recipes.memory_state import BF16, FP32, state_memory

if TYPE_CHECKING:
    from distill.two_step import TwoStepConfig
    from recipes.schema import DistillRecipe, FlowPolicyConfig
    from rollout.policies.adapters import LoraAdapter


@dataclass(frozen=True)
class Count:
    """Parameters of a network: ``frozen`` of ``width`` bytes each, and ``trained`` in fp32."""

    frozen: int
    trained: int
    width: int = FP32

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.width * self.frozen + FP32 * self.trained


def networks(recipe: DistillRecipe) -> dict[str, Count]:
    """The networks of a rank, counted where they have no storage: the teacher, then those that train.

    Raises:
        ValueError: the checkpoint is neither here nor known, or an adapter fits no layer.
    """
    distill, policy = recipe.distill, recipe.policy
    whole = _count(policy, None).trained
    found = {"teacher": Count(whole, 0)}
    if distill.kind == "random_conditioning":
        return found | {"student": _count(policy, None, distill.layers)}
    lora = policy.lora if distill.parameters == "lora_per_step" else None
    own = _count(policy, lora)
    steps = 1 if distill.parameters == "shared" else 2
    found["student"] = Count(own.frozen, steps * own.trained, own.width)
    if distill.adversarial:
        found["heads"] = Count(0, _heads(distill, policy.channels))
    if distill.dmd:
        found["fake_score"] = Count(0, whole)
    return found


def _count(policy: FlowPolicyConfig, lora: LoraAdapter | None, layers: int | None = None) -> Count:
    """Of the checkpoint's transformer with ``lora``, or all of it trained; of ``layers`` blocks."""
    import torch

    from rollout.policies.pipelines import prepare_transformer

    with torch.device("meta"):
        network = policy.network(layers)
        prepare_transformer(network, policy.model_copy(update={"lora": lora}), seed=0)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    width = BF16 if lora and policy.dtype == "bfloat16" else FP32
    return Count(sum(p.numel() for p in parameters) - trained, trained, width)


def _heads(distill: TwoStepConfig, width: int) -> int:
    import torch

    from distill.discriminator import Heads

    config = distill.discriminator
    with torch.device("meta"):
        heads = Heads(
            [width] * len(config.depths),
            config.channels,
            [str(number) for number in range(_judged(distill))],
        )
    return sum(p.numel() for p in heads.parameters())


def _judged(distill: TwoStepConfig) -> int:
    """How many of y1 and y2 the critics look at."""
    return 2 if distill.step1.weight else 1


def distillation_memory(recipe: DistillRecipe) -> dict[str, dict[str, int]]:
    """Bytes that a ``learner rank`` (rank 0) and a ``rollout actor`` hold at their peak.

    A rank's ``activations`` are those of the widest of its updates, beginning their backward pass; an
    optimiser step comes when they are gone, and at stage 3 the average then gathers all weights.

    Raises:
        ValueError: see ``networks``.
    """
    counts, learner = networks(recipe), recipe.learner
    teacher = counts.pop("teacher").bytes
    states = [
        state_memory(
            c.frozen, c.width, c.trained, learner.zero_stage, learner.ranks, learner.gpus > 0, False
        )
        for c in counts.values()
    ]
    for name, state in zip(counts, states, strict=True):
        if name != "student":
            state["average"] = 0
    passing = ("gradients", "buffers") if learner.zero_stage in (1, 2) else ()
    rank = {
        part: (max if part in passing else sum)(state[part] for state in states)
        for part in states[0]
    }
    beside = {"text encoder, VAE": recipe.policy.frozen_bytes()}
    return {
        "learner rank": {
            "teacher": teacher,
            **rank,
            **beside,
            "activations": learner_activations(recipe),
        },
        "rollout actor": {
            "teacher": teacher,
            "parameters": counts["student"].bytes,
            **beside,
            "activations": actor_activations(recipe),
        },
    }


def _forwards(recipe: DistillRecipe) -> tuple[Forward, Forward]:
    """The student's, of one step, and the teacher's, which has a gradient to its input."""
    policy, distill = recipe.policy, recipe.distill
    frozen = policy.model_copy(update={"lora": None})
    teacher = Forward(frozen, trains=False)
    if distill.kind == "random_conditioning":
        return Forward(frozen, trains=True, layers=distill.layers), teacher
    adapted = distill.parameters == "lora_per_step"
    return Forward(policy if adapted else frozen, trains=True), teacher


def learner_activations(recipe: DistillRecipe) -> int:
    """Bytes alive in the widest of a rank's updates, after the warm-up."""
    distill, policy = recipe.distill, recipe.policy
    student, teacher = _forwards(recipe)
    rows, d = recipe.learner.micro_batch, policy.channels
    if distill.kind == "random_conditioning":
        return max(student.graph(rows).peak, teacher.inference(rows))
    own, judged = student.graph(rows), _judged(distill)
    graph = 2 * own.kept
    updates = [student.inference(rows), own.kept + own.peak]
    if distill.adversarial:
        depths, tokens = len(distill.discriminator.depths), rows * policy.tokens()
        # Of a head on a token: conv, norm and activation, each a quarter of the places in fp32.
        head = 3 * distill.discriminator.channels
        seen = 3 * judged * tokens * depths * (FP32 * d + head)
        updates.append(seen + teacher.inference(rows))
        half = policy.dtype == "bfloat16"
        features = tokens * depths * ((FP32 * d if half else 0) + head)
        critic = teacher.graph(rows)
        graph += judged * (critic.kept + features)
        updates.append(graph + critic.peak - critic.kept)
    if distill.dmd:
        updates.append(graph + teacher.inference(_guided(recipe) * rows))
        score = Forward(teacher.policy, trains=True).graph(rows)
        updates.append((judged - 1) * score.kept + score.peak)
    return max(updates)


def actor_activations(recipe: DistillRecipe) -> int:
    """Bytes alive while an actor draws a batch, the teacher's guided or the student's."""
    student, teacher = _forwards(recipe)
    rows = recipe.rollout.batch_size
    return max(teacher.inference(_guided(recipe) * rows), student.inference(rows))


def _guided(recipe: DistillRecipe) -> int:
    from rollout.policies.base import forwards_per_sample

    return forwards_per_sample(recipe.rollout.guidance_scale)
