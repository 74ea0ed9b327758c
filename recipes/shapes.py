"""The full-size network of a recipe without its weights: built and run on the meta device."""

from __future__ import annotations

from recipes.schema import AnyRecipe, DistillRecipe, FlowPolicyConfig, Recipe


def shapes(recipe: AnyRecipe, prompt_tokens: int = 256) -> dict[str, str]:
    """Parameters, what trains, and the shapes of a learner's forward, by building them.

    Every module, adapter and operation is the one that a run uses; only memory is not.

    Raises:
        ValueError: the checkpoint is neither here nor known, or the network does not fit the recipe.
    """
    if isinstance(recipe, DistillRecipe):
        return _distillation(recipe)
    policy, rollout = recipe.policy, recipe.rollout
    if policy.kind != "llada" or rollout.kind != "masked":
        return {} if policy.kind == "llada" else _flow(recipe, policy)
    import torch

    from rollout.policies.adapters import set_trainable
    from rollout.policies.llada.configuration import LLaDAConfig
    from rollout.policies.llada.modeling import LLaDAModelLM
    from rollout.policies.llada.policy import HEAD

    with torch.device("meta"):
        network = LLaDAModelLM(LLaDAConfig(**policy.sizes()))
        total = sum(p.numel() for p in network.parameters())
        set_trainable(
            network, policy.lora, policy.dtype, policy.checkpoint, recipe.seed, exclude=[HEAD]
        )
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        rows, width = recipe.learner.micro_batch, prompt_tokens + rollout.length
        if width > network.config.max_sequence_length:
            raise ValueError(
                f"rollout.length {rollout.length} and a prompt of {prompt_tokens} tokens are more than "
                f"the model's {network.config.max_sequence_length}"
            )
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        logits = network(tokens, torch.ones(rows, width)).logits
    return {
        "network": f"{total:,} parameters, {trained:,} train",
        "learner's forward": f"tokens {tuple(tokens.shape)} to logits {tuple(logits.shape)}",
    }


def _flow(recipe: Recipe, policy: FlowPolicyConfig) -> dict[str, str]:
    """A flow policy that learns from rewards."""
    import torch

    from rollout.policies.base import forwards_per_sample
    from rollout.policies.pipelines import prepare_transformer

    with torch.device("meta"):
        network = policy.network()
        total = sum(p.numel() for p in network.parameters())
        prepare_transformer(network, policy, seed=0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    branches = forwards_per_sample(recipe.rollout.guidance_scale)
    count = f"{policy.networks} x " if policy.networks > 1 else ""
    return {
        "network": f"{count}{total:,} parameters, {trained:,} train",
        "learner's forward": _forward(policy, branches * recipe.learner.micro_batch),
    }


def _distillation(recipe: DistillRecipe) -> dict[str, str]:
    """The teacher's forward, which is the student's at each step, and what trains."""
    from recipes.memory_distill import networks

    teacher, *trained = networks(recipe).items()
    return {
        "teacher's network": f"{teacher[1].frozen:,} parameters",
        "what trains": ", ".join(f"{name} {count.trained:,}" for name, count in trained),
        "learner's forward": _forward(recipe.policy, recipe.learner.micro_batch),
    }


def _forward(policy: FlowPolicyConfig, rows: int) -> str:
    """Run where there is no memory."""
    import torch

    with torch.device("meta"):
        (velocity,) = policy.network()(**policy.example(rows))
    shape = (len(velocity), *velocity[0].shape)
    return f"latents {(rows, *policy.latent())}, {policy.tokens():,} tokens each, to velocities {shape}"
