"""Checks of a whole recipe. Nothing is started."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import get_args

from recipes.check_comparison import comparison
from recipes.check_distill import distillation, stored_samples
from recipes.derived import needed, text_algorithm
from recipes.errors import RecipeError, nearest
from recipes.schema import AnyRecipe, DistillRecipe, Recipe
from recipes.source import Loaded
from recipes.storage_url import storage_problem
from rl.catalogue import FlowAlgorithmConfig, TextAlgorithmConfig
from rl.flash_grpo import FlashGRPOConfig
from rl.flow_grpo_fast import FlowGRPOFastConfig
from rl.grpo import GRPOConfig
from rl.nft import NFTConfig
from rl.sft import SFTConfig, follows_rewards, unanswered
from rl.text import TextSettings
from rollout.flow import DiffusionConfig
from rollout.flow_sampler import FlowSamplerConfig
from rollout.masked import MaskedSamplerConfig
from rollout.policies.adapters import unmatched_targets
from rollout.policies.llada.policy import LladaConfig
from rollout.policies.llada.quantization import INSTALL, installed
from rollout.policies.wan import UNDISTILLED
from rollout.rows import RowSource

# Where prompts of a kind come from.
PLACES = {"file": ".path", "math": ".source", "dataset": ".source"}
# What precedes the name of a linear layer of the first block.
FIRST_BLOCK = re.compile(r".*\b(?:blocks|layers)\.0\.")


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
            _storage(recipe),
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
    return [*kinds, _overlap(recipe), _answers(recipe), comparison(recipe)]


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
    forwards = text_algorithm(recipe).forwards_per_completion
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
    with suppress(ValueError):  # prompts that cannot be read are named with the policy's checks
        if problem := unanswered(prompts.load(), rl.completion):
            yield "rl.completion", problem


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
    if recipe.rollout.group_size == 1 and not isinstance(rl, SFTConfig):
        yield (
            "rollout.group_size",
            f"rl.kind {rl.kind} compares samples of a prompt: give one greater than or equal to 2",
        )
    if recipe.rollout.batch_size < recipe.rollout.group_size:
        yield (
            "rollout.batch_size",
            (
                f"{recipe.rollout.batch_size} holds no group of rollout.group_size "
                f"{recipe.rollout.group_size}"
            ),
        )


def _overlap(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What trains while samples are drawn has a place of its own; parts do not depend on others."""
    parts, rl, key = recipe.schedule.parts, recipe.rl, "schedule.parts"
    overlaps = recipe.schedule.stale or parts > 1
    if recipe.cluster.colocated and recipe.learner.gpus and overlaps:
        yield (
            "cluster.colocated",
            "rollout actors and learner ranks would work on the same GPUs at the same time; false, or "
            "schedule.mode sync without parts",
        )
    groups, ranks = recipe.rollout.prompts_per_step, recipe.learner.ranks
    if parts == 1:
        return
    if recipe.schedule.stale:
        yield key, f"schedule.mode {recipe.schedule.mode} draws whole sets ahead; leave it out"
    if groups % parts or (groups // parts) % ranks:
        yield (
            key,
            f"{groups} groups (rollout.prompts_per_step) do not divide into {parts} parts for "
            f"{ranks} ranks",
        )
    if not rl.on_policy or rl.dipod is not None:
        yield key, "rl.minibatches, rl.epochs and rl.dipod take the whole set; leave it out"
    if rl.advantages.std == "global":
        yield (
            "rl.advantages.std",
            f"global is the whole set's, which schedule.parts {parts} does not wait for; give group or "
            "none",
        )
    if isinstance(rl, TextSettings) and text_algorithm(recipe).per_token:
        yield (
            key,
            f"rl.kind {rl.kind} weighs completions by the whole set's tokens; leave it out",
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
            taught = isinstance(recipe, Recipe) and isinstance(recipe.rl, SFTConfig)
            hint = "; 'rectify answer' writes such rows" if taught and key == "prompts" else ""
            yield f"{key}{PLACES.get(prompts.kind, '') if prompts else ''}", f"{error}{hint}"


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


def _rewards(recipe: AnyRecipe) -> Iterator[tuple[str, str]]:
    if (
        isinstance(recipe, Recipe)
        and follows_rewards(recipe.rl)
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


def _storage(recipe: AnyRecipe) -> Iterator[tuple[str, str]]:
    url = recipe.checkpoints.storage
    if url is not None and (problem := storage_problem(url)):
        yield "checkpoints.storage", problem
