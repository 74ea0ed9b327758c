"""Checks of a distillation recipe, and the numbers that follow from it."""

from __future__ import annotations

from collections.abc import Iterator

from distill.catalogue import student_sigmas
from distill.compression import CompressionConfig
from distill.store import StoreError, TeacherStore
from distill.two_step import TwoStepConfig
from recipes.errors import nearest
from recipes.schema import DistillRecipe
from rollout.policies.wan import EMBEDDED


def distillation(recipe: DistillRecipe) -> Iterator[tuple[str, str]]:
    """Combinations that cannot run: key and message."""
    if isinstance(recipe.distill, CompressionConfig):
        yield from _compression(recipe, recipe.distill)
    else:
        yield from _two_step(recipe, recipe.distill)
    rollout = recipe.rollout
    if rollout.batch_size < rollout.group_size:
        yield (
            "rollout.batch_size",
            f"{rollout.batch_size} holds no group of rollout.group_size {rollout.group_size}",
        )
    if recipe.evaluation.gap is not None:
        yield "evaluation.gap", "a flow has no variational gap; leave it out"


def _two_step(recipe: DistillRecipe, distill: TwoStepConfig) -> Iterator[tuple[str, str]]:
    policy = recipe.policy
    adapters = distill.parameters == "lora_per_step"
    if adapters and policy.lora is None:
        yield "policy.lora", "distill.parameters lora_per_step trains it; give rank and targets"
    if policy.lora is not None and not adapters:
        yield (
            "distill.parameters",
            f"{distill.parameters} trains whole networks; leave out policy.lora, or say lora_per_step",
        )
    if adapters and recipe.learner.zero_stage == 3:
        yield "learner.zero_stage", "adapters of two steps share a frozen base; give 0, 1 or 2"
    if not (distill.adversarial or distill.regression or distill.dmd):
        yield "distill", "adversarial, regression and dmd are all 0: nothing trains the sample"
    if distill.real == "data" and policy.checkpoint not in EMBEDDED:
        yield (
            "distill.real",
            f"real data is known for {' and '.join(EMBEDDED)}; give real: teacher",
        )
    if distill.regions is not None and recipe.rollout.store is not None:
        yield (
            "distill.regions",
            "a store's conditions are fixed; leave out regions or rollout.store",
        )
    if recipe.evaluation.steps not in (None, 2):
        yield "evaluation.steps", "the student takes 2 steps; leave it out"


def _compression(recipe: DistillRecipe, distill: CompressionConfig) -> Iterator[tuple[str, str]]:
    policy = recipe.policy
    if policy.checkpoint not in EMBEDDED:
        yield "policy.checkpoint", f"pictures are known for {' and '.join(EMBEDDED)} only"
    if policy.lora is not None:
        yield "policy.lora", "all of the smaller student trains; leave it out"
    if recipe.rollout.store is not None:
        yield "rollout.store", "random conditioning takes no teacher samples; leave it out"
    blocks = len({name.split(".")[1] for name in policy.linear_names() if "blocks." in name})
    if distill.layers > blocks:
        yield "distill.layers", f"the teacher has {blocks} blocks, the student cannot have more"
    ids = [prompt.id for prompt in recipe.prompts.load()]
    unknown = [name for name in distill.pairs.held_out if name not in ids]
    if unknown:
        yield (
            "distill.pairs.held_out",
            f"{', '.join(unknown)}: no prompt has this id{nearest(unknown[0], ids)}",
        )
    if set(ids) <= set(distill.pairs.held_out):
        yield "distill.pairs.held_out", "every prompt is held out: there is no pair to learn from"
    regions = distill.regions
    if regions is not None and regions.count is not None and regions.count > len(ids):
        yield "distill.regions.count", f"{regions.count} regions of {len(ids)} prompts"


def stored_samples(recipe: DistillRecipe) -> Iterator[tuple[str, str]]:
    """Whether the store is there and whole."""
    if recipe.rollout.store is not None:
        try:
            TeacherStore.open(recipe.rollout.store)
        except StoreError as error:
            yield "rollout.store", str(error)


def distilled(recipe: DistillRecipe) -> dict[str, str]:
    """The numbers that a reader of the recipe wants to see, by name."""
    rollout, distill = recipe.rollout, recipe.distill
    samples = rollout.prompts_per_step * rollout.group_size
    numbers = {
        "samples per step": f"{samples} = {rollout.prompts_per_step} prompts x {rollout.group_size}"
    }
    if isinstance(distill, CompressionConfig):
        allocation = "by their masses" if distill.regions is None else "by discrepancy"
        switch = "never switched" if distill.conditioning is None else "switched at random"
        return numbers | {
            "student": f"{distill.layers} blocks, sampled in {rollout.steps} steps as its teacher",
            "conditions": f"{switch}, drawn {allocation}",
        }
    first, second, _ = student_sigmas(rollout)
    critics = [f"{distill.discriminator.updates} of the heads"] if distill.adversarial else []
    critics += [f"{distill.fake_score.updates} of the fake score"] if distill.dmd else []
    source = f"from {rollout.store}" if rollout.store else "drawn while the learner trains"
    return numbers | {
        "teacher": f"{rollout.steps} steps, guidance {rollout.guidance_scale:g}, {source}",
        "student": f"2 steps, sigma {first:.4f} and {second:.4f}, {distill.parameters}",
        "updates per student step": ", ".join(critics) or "none of a critic",
    }
