"""Checks of what ``rectify compare`` would run."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.comparison import FlowComparison
from recipes.errors import nearest
from recipes.schema import Recipe
from rollout.guidance.contract import GuidanceError
from rollout.guidance.sampler import check_method
from rollout.policies.llada.policy import LladaConfig


def comparison(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Methods of the policy's kind, that can use the reward."""
    if recipe.compare is None:
        return
    compare = recipe.compare
    text = isinstance(recipe.policy, LladaConfig)
    if isinstance(compare, FlowComparison) == text:
        wanted = "masked" if text else "flow"
        yield "compare.kind", f"policy.kind {recipe.policy.kind} is compared with {wanted}"
        return
    names = [config.name or config.kind for config in recipe.rewards]
    if compare.reward is not None and compare.reward not in names:
        hint = nearest(compare.reward, names)
        yield "compare.reward", f"{compare.reward!r} is none of 'rewards'{hint}"
        return
    yield from unreachable(recipe)
    if isinstance(compare, FlowComparison):
        for index, method in enumerate(compare.methods):
            try:
                check_method(method, gradient_of(recipe))
            except GuidanceError as error:
                yield f"compare.methods.{index}", str(error)


def unreachable(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Rewards that a comparison would build in rollout actors, which have not their libraries."""
    compare = recipe.comparison
    for index, config in enumerate(recipe.rewards):
        followed = compare.reward in (None, config.name or config.kind)
        if followed and config.served_in is not None and not compare.served:
            kind = "masked" if isinstance(recipe.policy, LladaConfig) else "flow"
            yield (
                f"rewards.{index}",
                f"{config.kind} runs in its environment {config.served_in!r}, not in rollout actors: "
                f"say compare: {{kind: {kind}, served: true}}",
            )


def gradient_of(recipe: Recipe) -> bool:
    """Whether the reward that is followed has a gradient where it is asked."""
    compare = recipe.comparison
    followed = [
        c for c in recipe.rewards if compare.reward in (None, c.name or c.kind) and c.weight != 0
    ]
    return not compare.served and all(config.has_gradient() for config in followed)
