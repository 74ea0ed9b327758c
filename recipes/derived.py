"""The numbers that follow from a recipe."""

from __future__ import annotations

import os
from pathlib import Path

from recipes.check_distill import distilled
from recipes.schema import AnyRecipe, DistillRecipe, Recipe
from rewards.catalogue import RewardConfig
from rewards.plugins import FunctionReward
from rl.catalogue import build_algorithm
from rl.grpo import GRPOConfig
from rl.nft import NFTConfig
from rl.sft import SFTConfig
from rl.text import TextAlgorithm, TextSettings
from rollout.flow_sampler import FlowSamplerConfig
from rollout.masked import MaskedSamplerConfig
from rollout.policies.base import forwards_per_sample

EVALUATIONS = "network evaluations per guided step"


def needed(recipe: AnyRecipe, kind: str) -> float:
    """CPUs or GPUs of all actors; colocated workers and ranks take turns on the same."""
    per_worker, per_rank = (recipe.workers.gpus, recipe.learner.gpus)
    if kind == "cpus":
        per_worker, per_rank = recipe.workers.cpus, recipe.learner.cpus
    if recipe.cluster.colocated:
        total = max(recipe.workers.count, recipe.learner.ranks) * max(per_worker, per_rank)
    else:
        total = recipe.workers.count * per_worker + recipe.learner.ranks * per_rank
    shares = ((c.replicas, c.gpus if kind == "gpus" else c.cpus) for c in _rewards(recipe))
    total += sum(replicas * share for replicas, share in shares)
    return round(total, 6)  # 0.8 + 0.1 + 0.1 is one


def derived(recipe: AnyRecipe) -> dict[str, str]:
    """The numbers that a reader of the recipe wants to see, by name."""
    if isinstance(recipe, DistillRecipe):
        return {**distilled(recipe), **_everywhere(recipe)}
    rollout, rl, ranks = recipe.rollout, recipe.rl, recipe.learner.ranks
    stale = recipe.schedule.stale
    samples = rollout.prompts_per_step * rollout.group_size
    steps = rl.epochs * rl.minibatches
    jobs = -(-rollout.prompts_per_step // (rollout.batch_size // rollout.group_size))
    numbers = {
        "samples per step": f"{samples} = {rollout.prompts_per_step} prompts x {rollout.group_size}",
        "optimiser steps": f"{steps} per rollout set, {steps * recipe.steps} in all"
        + (
            " (on-policy: the ratio is 1)"
            if rl.on_policy and not stale and not isinstance(rl, NFTConfig | SFTConfig)
            else ""
        ),
        "groups per optimiser step": f"{rollout.prompts_per_step // rl.minibatches}, "
        f"{rollout.prompts_per_step // rl.minibatches // ranks} per rank",
        "rollout jobs per step": f"{jobs} for {recipe.workers.count} workers",
        **_sampling(recipe),
        **_everywhere(recipe),
    }
    if stale:
        numbers["rollouts of older weights"] = _correction(recipe)
    if rl.dipod is not None and rl.dipod.form == "alternating":
        numbers["distillation"] = (
            f"every {rl.dipod.every}th step, {rl.dipod.steps} optimiser steps instead"
        )
    if jobs % recipe.workers.count:
        numbers["note"] = "rollout jobs do not divide by workers.count: some workers will wait"
    return numbers


def _everywhere(recipe: AnyRecipe) -> dict[str, str]:
    functions = [c.path for c in _rewards(recipe) if isinstance(c, FunctionReward)]
    return {
        **({"code of yours that runs": ", ".join(functions)} if functions else {}),
        "resources": f"{needed(recipe, 'cpus'):g} CPU, {needed(recipe, 'gpus'):g} GPU "
        f"(this machine has {os.cpu_count()} CPU)",
        "run directory": str(Path(recipe.run_dir) / recipe.name),
    }


def _correction(recipe: Recipe) -> str:
    """What the objective does about weights that are newer than those that sampled."""
    if isinstance(recipe.rl, GRPOConfig):
        return "clipped ratio to the weights that sampled, from the rollout's log-probabilities"
    if isinstance(recipe.rl, TextSettings) and text_algorithm(recipe).records_old:
        forwards = text_algorithm(recipe).draws * recipe.rl.epochs
        return (
            "clipped ratio to the weights that sampled, for which workers evaluate a completion "
            f"{forwards} more times"
        )
    return f"not corrected: {recipe.rl.kind} has no ratio"


def _sampling(recipe: Recipe) -> dict[str, str]:
    """What sampling and training cost in network evaluations."""
    rollout, rl = recipe.rollout, recipe.rl
    per_step = str(forwards_per_sample(rollout.guidance_scale))
    if isinstance(rollout, MaskedSamplerConfig) and isinstance(rl, TextSettings):
        algorithm = text_algorithm(recipe)
        until = f"at most {rollout.length}" if rollout.threshold else str(rollout.steps)
        return {
            "completion": f"{rollout.length} tokens in {rollout.blocks} blocks, {until} steps",
            "network evaluations per step": per_step,
            "evaluations per completion and pass": str(algorithm.forwards_per_completion),
        }
    if isinstance(rl, NFTConfig):
        return {"noised states per sample and pass": str(rl.draws), EVALUATIONS: per_step}
    if not isinstance(rollout, FlowSamplerConfig) or not isinstance(rl, GRPOConfig):
        return {}
    grid, indices = rollout.grid(), rl.indices(rollout.steps)
    return {
        "trained timesteps": f"{list(indices)} of {rollout.steps}, sigma "
        f"{grid.sigmas[indices[0]]:.4f} to {grid.sigmas[indices[-1]]:.4f}",
        EVALUATIONS: per_step,
    }


def text_algorithm(recipe: Recipe) -> TextAlgorithm:
    """The algorithm of a recipe on text."""
    stale = recipe.schedule.stale
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed, stale)
    assert isinstance(algorithm, TextAlgorithm)
    return algorithm


def _rewards(recipe: AnyRecipe) -> list[RewardConfig]:
    return [*recipe.rewards, *recipe.evaluation.rewards]
