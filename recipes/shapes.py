"""The full-size network of a recipe without its weights: built and run on the meta device."""

from __future__ import annotations

from recipes.schema import AnyRecipe


def shapes(recipe: AnyRecipe, prompt_tokens: int = 256) -> dict[str, str]:
    """Parameters, what trains, and the shapes of a learner's forward, by building them.

    Every module, adapter and operation is the one that a run uses; only memory is not. A flow policy
    is left to its own loading.

    Raises:
        ValueError: the checkpoint is neither here nor known, or the network does not fit the recipe.
    """
    policy, rollout = recipe.policy, recipe.rollout
    if policy.kind != "llada" or rollout.kind != "masked":
        return {}
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
