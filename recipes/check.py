"""Checks of a whole recipe, and the numbers that follow from it. Nothing is started."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from recipes.check_comparison import comparison
from recipes.check_distill import distillation, distilled, stored_samples
from recipes.errors import RecipeError, nearest
from recipes.schema import AnyRecipe, DistillRecipe, Recipe
from recipes.source import Loaded
from rl.catalogue import FlowAlgorithmConfig, TextAlgorithmConfig, build_algorithm
from rl.flash_grpo import FlashGRPOConfig
from rl.flow_grpo_fast import FlowGRPOFastConfig
from rl.grpo import GRPOConfig
from rl.nft import NFTConfig
from rl.sft import SFTConfig, filled
from rl.text import TextAlgorithm, TextSettings
from rollout.flow import DiffusionConfig
from rollout.flow_sampler import FlowSamplerConfig
from rollout.masked import MaskedSamplerConfig
from rollout.policies.adapters import unmatched_targets
from rollout.policies.base import forwards_per_sample
from rollout.policies.llada.policy import LladaConfig
from rollout.policies.llada.quantization import INSTALL, installed
from rollout.policies.wan import UNDISTILLED
from rollout.rows import RowSource

# Where prompts of a kind come from.
PLACES = {"file": ".path", "math": ".source", "dataset": ".source"}
# What precedes the name of a linear layer of the first block.
FIRST_BLOCK = re.compile(r".*\b(?:blocks|layers)\.0\.")
EVALUATIONS = "network evaluations per guided step"


def check(loaded: Loaded[AnyRecipe], gpus: int, filling: bool = False) -> None:
    """Refuse combinations that cannot run.

    Args:
        loaded: the recipe. gpus: how many this machine has (a local cluster cannot have more).
        filling: a distillation's store need not be there yet.

    Raises:
        RecipeError: with all of them.
    """
    recipe = loaded.value
    problems = [
        loaded.problem(key, message)
        for group in (
            *_own(recipe, filling),
            _policy(recipe),
            _rewards(recipe),
            _resources(recipe, gpus),
        )
        for key, message in group
    ]
    if problems:
        raise RecipeError(problems)


def _own(recipe: AnyRecipe, filling: bool) -> list[Iterator[tuple[str, str]]]:
    """The checks of a recipe's kind."""
    if isinstance(recipe, DistillRecipe):
        return [distillation(recipe), *([] if filling else [stored_samples(recipe)])]
    kinds = [_kinds(recipe), _decoding(recipe), _timesteps(recipe), _noised(recipe), _sizes(recipe)]
    return [*kinds, _answers(recipe), comparison(recipe)]


def _kinds(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Policy, sampler and algorithm are all of flows, or all of text."""
    text = isinstance(recipe.policy, LladaConfig)
    named = f"policy.kind {recipe.policy.kind}"
    if isinstance(recipe.rollout, MaskedSamplerConfig) != text:
        wanted = "masked" if text else "flow"
        yield "rollout.kind", f"{named} is sampled with {wanted}, not {recipe.rollout.kind}"
    if isinstance(recipe.rl, TextSettings) != text:
        family = TextAlgorithmConfig if text else FlowAlgorithmConfig
        kinds = ", ".join(c.model_fields["kind"].default for c in get_args(family))
        yield "rl.kind", f"{named} is trained with one of {kinds}, not {recipe.rl.kind}"
    if recipe.evaluation.gap is not None and not text:
        yield "evaluation.gap", f"{named} has no variational gap; leave it out"


def _decoding(recipe: Recipe) -> Iterator[tuple[str, str]]:
    sampler, rl = recipe.rollout, recipe.rl
    if not isinstance(sampler, MaskedSamplerConfig) or not isinstance(rl, TextSettings):
        return
    if sampler.length % sampler.block_length:
        yield (
            "rollout.block_length",
            f"{sampler.block_length} does not divide rollout.length {sampler.length}",
        )
        return
    for key, steps in (
        ("rollout.steps", sampler.steps),
        ("evaluation.steps", recipe.evaluation.steps),
    ):
        blocks = sampler.blocks
        if steps is not None and (steps % blocks or steps > sampler.length):
            yield (
                key,
                f"{steps} is no multiple of {blocks} blocks (rollout.length / rollout.block_length) "
                f"up to rollout.length {sampler.length}",
            )
    forwards = _text_algorithm(recipe).forwards_per_completion
    if recipe.learner.micro_batch % forwards:
        yield (
            "learner.micro_batch",
            f"{recipe.learner.micro_batch} network evaluations are no whole number of completions: "
            f"each takes {forwards}",
        )


def _timesteps(recipe: Recipe) -> Iterator[tuple[str, str]]:
    steps, rl = recipe.rollout.steps, recipe.rl
    if not isinstance(rl, GRPOConfig):
        return
    if isinstance(rl, FlashGRPOConfig) and rl.pool is not None:
        outside = [k for k in rl.pool if not 0 <= k <= steps - 2]
        if outside:
            yield (
                "rl.pool",
                (
                    f"indices {outside} are outside the grid: with rollout.steps {steps} an SDE step "
                    f"may be 0 to {steps - 2} (the last step takes no noise)"
                ),
            )
        if len(set(rl.pool)) != len(rl.pool):
            yield "rl.pool", "an index stands in it twice"
    if isinstance(rl, FlowGRPOFastConfig) and rl.window > len(rl.indices(steps)):
        yield (
            "rl.window",
            (
                f"{rl.window} steps do not fit the first half of rollout.steps {steps} "
                f"({len(rl.indices(steps))} steps)"
            ),
        )
    if rl.tail is not None and not rl.indices(steps):
        yield "rl.tail", "there is no injected step to end"
    if rl.tail is not None and rl.tail.steps > steps - 1 - max(rl.indices(steps), default=0):
        yield (
            "rl.tail.steps",
            (
                f"after the last injected step {max(rl.indices(steps))} there are only "
                f"{steps - 1 - max(rl.indices(steps))} steps; a tail is at most that"
            ),
        )
    if rl.antithetic and rl.initial_noise != "shared":
        yield (
            "rl.antithetic",
            "needs rl.initial_noise: shared, or the pairs differ in more than sign",
        )
    if rl.antithetic and recipe.rollout.group_size % 2:
        yield (
            "rollout.group_size",
            f"{recipe.rollout.group_size} is odd; antithetic noise needs pairs",
        )


def _noised(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """NFT samples by the ODE."""
    sampler, rl = recipe.rollout, recipe.rl
    if not isinstance(rl, NFTConfig) or not isinstance(sampler, FlowSamplerConfig):
        return
    if sampler.diffusion != DiffusionConfig():
        yield "rollout.diffusion", "rl.kind nft injects no noise when it samples; leave it out"
    if rl.draws > sampler.steps:
        yield "rl.draws", f"{rl.draws} draws are more than the {sampler.steps} sigmas of the grid"


def _answers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every training prompt of SFT has its answer; prompts of the hub are not fetched to see."""
    prompts, rl = recipe.prompts, recipe.rl
    if not isinstance(rl, SFTConfig) or (isinstance(prompts, RowSource) and prompts.on_hub):
        return
    try:
        loaded = prompts.load()
    except ValueError:  # named with the policy's checks
        return
    for prompt in loaded:
        try:
            filled(rl.completion, prompt.columns)
        except ValueError as error:
            yield "rl.completion", f"prompt {prompt.id!r} {error}"
            return


def _sizes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    groups, rl = recipe.rollout.prompts_per_step, recipe.rl
    if groups % rl.minibatches:
        yield (
            "rl.minibatches",
            f"{groups} groups (rollout.prompts_per_step) do not divide by {rl.minibatches}",
        )
    elif (groups // rl.minibatches) % recipe.learner.ranks:
        yield (
            "learner.ranks",
            (
                f"{groups // rl.minibatches} groups per optimiser step do not divide by "
                f"{recipe.learner.ranks} ranks"
            ),
        )
    if recipe.rollout.batch_size < recipe.rollout.group_size:
        yield (
            "rollout.batch_size",
            (
                f"{recipe.rollout.batch_size} holds no group of rollout.group_size "
                f"{recipe.rollout.group_size}"
            ),
        )


def _policy(recipe: AnyRecipe) -> Iterator[tuple[str, str]]:
    try:
        names = recipe.policy.linear_names()
        yield from _pipeline(recipe)
    except (ValueError, KeyError) as error:
        yield "policy.checkpoint", str(error)
        return
    if isinstance(recipe.policy, LladaConfig):
        yield from _loops(recipe.policy)
        yield from _quantization(recipe.policy, recipe.learner.zero_stage)
    if recipe.policy.lora is not None:
        # An ending is checked against the names of the first block; all blocks have the same.
        for target in unmatched_targets(recipe.policy.lora.targets, names):
            first = [FIRST_BLOCK.split(name) for name in names]
            block = [parts[-1] for parts in first if len(parts) > 1]
            hint = nearest(target, [ending.split(".", 1)[-1] for ending in block])
            message = f"{target!r} matches no linear layer{hint}; there are: {', '.join(block)}"
            yield "policy.lora.targets", message
    # A dataset of the hub is fetched when a run starts, not to validate.
    sets = (("prompts", recipe.prompts), ("evaluation.prompts", recipe.evaluation.prompts))
    for key, prompts in sets:
        try:
            if isinstance(prompts, RowSource) and prompts.on_hub:
                prompts.check_hub_reader()
            elif prompts is not None:
                prompts.load()
        except ValueError as error:
            yield f"{key}{PLACES.get(prompts.kind, '') if prompts else ''}", str(error)


def _pipeline(recipe: AnyRecipe) -> Iterator[tuple[str, str]]:
    """What a pipeline cannot do.

    Raises:
        ValueError: its checkpoint is neither here nor known, or its VAE does not fit the size.
    """
    policy = recipe.policy
    if isinstance(policy, LladaConfig) or not policy.pipeline:
        return
    policy.latent()
    if policy.networks > 1 and isinstance(recipe, DistillRecipe):
        yield "policy.checkpoint", f"{policy.checkpoint}: {UNDISTILLED}"
    if policy.networks > 1 and recipe.learner.zero_stage == 3:
        yield "learner.zero_stage", "micro-batches use one of two transformers; give 0, 1 or 2"


def _loops(policy: LladaConfig) -> Iterator[tuple[str, str]]:
    if policy.loops is not None and policy.loops > 1 and policy.sizes().get("loops", 1) == 1:
        yield (
            "policy.loops",
            f"{policy.checkpoint} was not trained with looped blocks; leave it out",
        )


def _quantization(policy: LladaConfig, zero_stage: int) -> Iterator[tuple[str, str]]:
    """What a quantised base needs, and what cannot shard it."""
    if policy.quantization is None:
        return
    if not installed():
        yield "policy.quantization", f"{policy.quantization} {INSTALL}"
    if zero_stage == 3:
        yield (
            "learner.zero_stage",
            f"policy.quantization {policy.quantization} cannot be sharded: its scales and copies stay "
            "whole; give 0, 1 or 2",
        )


def _follows(recipe: Recipe) -> bool:
    """Whether rewards decide what is trained on."""
    return not isinstance(recipe.rl, SFTConfig) or recipe.rl.minimum_reward is not None


def _rewards(recipe: AnyRecipe) -> Iterator[tuple[str, str]]:
    if (
        isinstance(recipe, Recipe)
        and _follows(recipe)
        and not any(c.weight for c in recipe.rewards)
    ):
        yield "rewards", "every weight is 0: there is nothing to train on"
    seen: set[str] = set()
    for part, configs in (
        ("rewards", recipe.rewards),
        ("evaluation.rewards", recipe.evaluation.rewards),
    ):
        for index, config in enumerate(configs):
            name = config.name or config.kind
            if name in seen:
                yield f"{part}.{index}", f"two rewards are called {name!r}; give one a name"
            seen.add(name)
            problem = config.problem()
            if problem is not None:
                yield f"{part}.{index}", problem


def _resources(recipe: AnyRecipe, gpus: int) -> Iterator[tuple[str, str]]:
    if recipe.cluster.address != "local":
        return
    need = needed(recipe, "gpus")
    if need > gpus:
        key = "workers.gpus" if recipe.workers.gpus else "learner.gpus"
        yield key, f"the recipe needs {need:g} GPUs and this machine has {gpus}"


def needed(recipe: AnyRecipe, kind: str) -> float:
    """CPUs or GPUs of all actors; colocated workers and ranks take turns on the same."""
    per_worker, per_rank = (recipe.workers.gpus, recipe.learner.gpus)
    if kind == "cpus":
        per_worker, per_rank = recipe.workers.cpus, recipe.learner.cpus
    if recipe.cluster.colocated:
        total = max(recipe.workers.count, recipe.learner.ranks) * max(per_worker, per_rank)
    else:
        total = recipe.workers.count * per_worker + recipe.learner.ranks * per_rank
    rewards = [*recipe.rewards, *recipe.evaluation.rewards]
    total += sum(c.replicas * (c.gpus if kind == "gpus" else c.cpus) for c in rewards)
    return round(total, 6)  # 0.8 + 0.1 + 0.1 is one


def derived(recipe: AnyRecipe) -> dict[str, str]:
    """The numbers that a reader of the recipe wants to see, by name."""
    if isinstance(recipe, DistillRecipe):
        return {**distilled(recipe), **_everywhere(recipe)}
    rollout, rl, ranks = recipe.rollout, recipe.rl, recipe.learner.ranks
    samples = rollout.prompts_per_step * rollout.group_size
    steps = rl.epochs * rl.minibatches
    jobs = -(-rollout.prompts_per_step // (rollout.batch_size // rollout.group_size))
    numbers = {
        "samples per step": f"{samples} = {rollout.prompts_per_step} prompts x {rollout.group_size}",
        "optimiser steps": f"{steps} per rollout set, {steps * recipe.steps} in all"
        + (
            " (on-policy: the ratio is 1)"
            if rl.on_policy and not isinstance(rl, NFTConfig | SFTConfig)
            else ""
        ),
        "groups per optimiser step": f"{rollout.prompts_per_step // rl.minibatches}, "
        f"{rollout.prompts_per_step // rl.minibatches // ranks} per rank",
        "rollout jobs per step": f"{jobs} for {recipe.workers.count} workers",
        **_sampling(recipe),
        **_everywhere(recipe),
    }
    if rl.dipod is not None and rl.dipod.form == "alternating":
        numbers["distillation"] = (
            f"every {rl.dipod.every}th step, {rl.dipod.steps} optimiser steps instead"
        )
    if jobs % recipe.workers.count:
        numbers["note"] = "rollout jobs do not divide by workers.count: some workers will wait"
    return numbers


def _everywhere(recipe: AnyRecipe) -> dict[str, str]:
    return {
        "resources": f"{needed(recipe, 'cpus'):g} CPU, {needed(recipe, 'gpus'):g} GPU "
        f"(this machine has {os.cpu_count()} CPU)",
        "run directory": str(Path(recipe.run_dir) / recipe.name),
    }


def _sampling(recipe: Recipe) -> dict[str, str]:
    """What sampling and training cost in network evaluations."""
    rollout, rl = recipe.rollout, recipe.rl
    per_step = str(forwards_per_sample(rollout.guidance_scale))
    if isinstance(rollout, MaskedSamplerConfig) and isinstance(rl, TextSettings):
        algorithm = _text_algorithm(recipe)
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


def _text_algorithm(recipe: Recipe) -> TextAlgorithm:
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
    assert isinstance(algorithm, TextAlgorithm)
    return algorithm
