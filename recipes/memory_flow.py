"""Memory of a flow policy's processes: what a learner rank and a rollout actor hold at their peak.

State is that of ``recipes/memory_state.py``. Activations are counted while the network itself runs, at the
recipe's size, on tensors without memory (``recipes/alive.py``), on the CPU's kernels: a GPU's fused ones
should keep less. Not in them: the VAE's while it decodes, one sample at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from recipes.memory_state import BF16, FP32, state_memory

if TYPE_CHECKING:
    from recipes.alive import Bytes
    from recipes.schema import FlowPolicyConfig, Recipe


# Of a network with more layers than the second, these depths are counted: it takes a tenth of the time.
DEPTHS = (2, 4)


@dataclass(frozen=True)
class Forward:
    """Forwards of a policy's network.

    Attributes:
        trains: what the policy says trains; False: nothing does, a graph is for the gradient to the
            input.
        layers: of a network of so many blocks; None: its own.
    """

    policy: FlowPolicyConfig
    trains: bool
    layers: int | None = None

    def graph(self, rows: int) -> Bytes:
        """Of a forward on ``rows`` samples whose graph is kept, and its backward pass."""
        return _bytes(self, rows, graph=True)

    def inference(self, rows: int) -> int:
        """Bytes alive at the widest place of a forward without a graph."""
        return _bytes(self, rows, graph=False).peak


@cache
def _bytes(forward: Forward, rows: int, graph: bool) -> Bytes:
    """Counted; of a deep network at two depths, from which it grows as much with every layer."""
    from recipes.alive import Bytes

    layers = forward.layers or forward.policy.layers
    few, more = DEPTHS
    if layers <= more:
        return _counted(forward.policy, forward.trains, layers, rows, graph)
    low, high = (_counted(forward.policy, forward.trains, n, rows, graph) for n in DEPTHS)

    def grown(first: int, second: int) -> int:
        return first + (second - first) * (layers - few) // (more - few)

    return Bytes(grown(low.kept, high.kept), grown(low.peak, high.peak))


def _counted(policy: FlowPolicyConfig, trains: bool, layers: int, rows: int, graph: bool) -> Bytes:
    import torch

    from recipes.alive import count
    from rollout.policies.pipelines import prepare_transformer

    with torch.device("meta"):
        network = prepare_transformer(policy.network(layers), policy, seed=0)
    if not trains:
        network.requires_grad_(False)

    def inputs() -> dict[str, Any]:
        example = policy.example(rows)
        if not trains:
            noised = next(iter(example.values()))
            for leaf in [noised] if isinstance(noised, torch.Tensor) else noised:
                leaf.requires_grad_(True)
        return example

    def run(network: Any, example: dict[str, Any]) -> torch.Tensor:
        half = policy.dtype == "bfloat16"
        with torch.set_grad_enabled(graph), torch.autocast("cpu", torch.bfloat16, enabled=half):
            (found,) = network(**example)
            return torch.stack(list(found)).float().square().mean()

    return count(network, inputs, run)


def flow_memory(recipe: Recipe, policy: FlowPolicyConfig) -> dict[str, dict[str, int]]:
    """Bytes that a ``learner rank`` (rank 0) and a ``rollout actor`` hold at their peak.

    Raises:
        ValueError: the checkpoint is neither here nor known, or an adapter fits no layer.
    """
    import torch

    from rollout.policies.base import forwards_per_sample
    from rollout.policies.pipelines import prepare_transformer

    with torch.device("meta"):
        network = prepare_transformer(policy.network(), policy, seed=0)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    trained, frozen = policy.networks * trained, policy.networks * frozen
    width = BF16 if frozen and policy.dtype == "bfloat16" else FP32
    learner, reference = recipe.learner, recipe.rl.kl_coefficient > 0
    state = state_memory(
        frozen, width, trained, learner.zero_stage, learner.ranks, learner.gpus > 0, reference
    )
    if recipe.rl.kind == "nft":  # rank 0 keeps the old policy too
        state["average"] *= 2
    forward = Forward(policy, trains=True)
    branches = forwards_per_sample(recipe.rollout.guidance_scale)
    graph = forward.graph(branches * learner.micro_batch).peak
    drawn = forward.inference(branches * recipe.rollout.batch_size)
    weights, beside = width * frozen + FP32 * trained, {"text encoder, VAE": policy.frozen_bytes()}
    return {
        "learner rank": state | beside | {"activations": graph},
        "rollout actor": {"parameters": weights, **beside, "activations": drawn},
    }
