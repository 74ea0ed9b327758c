"""The contract of a training engine, and the plain PyTorch one (one process, no DeepSpeed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recipes.schema import OptimizerConfig
from rl.algorithm import Algorithm
from rollout.policies.base import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")


class ObjectiveModule(nn.Module):
    """Network and objective as one module, so that an engine's forward is the whole forward."""

    def __init__(self, policy: Policy, algorithm: Algorithm[Any]) -> None:
        super().__init__()
        self.network = policy.module
        # Not a submodule, and not a name that nn.Module would try to register.
        self._bound = (policy, algorithm)

    def forward(self, batch: Any, scores: bool = False) -> Any:
        """The micro-batch's loss and its table, or only the scores that the loss compares with."""
        policy, algorithm = self._bound
        return algorithm.scores(policy, batch) if scores else algorithm.loss(policy, batch)


class Wrapped(Protocol):
    """A module that an engine takes: ``network`` holds what trains, under the names it is saved by."""

    network: nn.Module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The whole forward."""
        ...


class Engine(Protocol):
    """Runs a module and steps its parameters. Collective: all ranks call everything."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's forward, of which ``backward`` may follow."""
        ...

    def apply(self, *inputs: Any) -> Any:
        """The module's forward when no gradient of it will reach the parameters."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of the *sum* of losses over micro-batches and ranks."""
        ...

    def step(self, learning_rate: float) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole and fp32, by the network's own names."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state as ``<name>.exp_avg`` and ``<name>.exp_avg_sq``; empty before a step."""
        ...

    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int
    ) -> None:
        """Set parameters, moments and the step count, after a step that made the optimiser's state."""
        ...


def adamw(parameters: Any, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimiser both engines use. A client optimiser: DeepSpeed's own compiles at start."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        foreach=True,
    )


class TorchEngine:
    """One process, plain PyTorch: the reference that the DeepSpeed engine is tested against."""

    def __init__(self, module: Wrapped, config: OptimizerConfig) -> None:
        self.module = module
        self.config = config
        self.parameters = {n: p for n, p in module.network.named_parameters() if p.requires_grad}
        self.optimizer = adamw(list(self.parameters.values()), config)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """See ``Engine``."""
        return self.module(*inputs, **options)

    def apply(self, *inputs: Any) -> Any:
        """See ``Engine``."""
        return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See ``Engine``."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return {
            f"{name}.{key}": self.optimizer.state[p][key]
            for name, p in self.parameters.items()
            if p in self.optimizer.state
            for key in MOMENTS
        }

    @torch.no_grad()
    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int
    ) -> None:
        """See ``Engine``."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            if moments:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    **{key: moments[f"{name}.{key}"].clone().to(parameter) for key in MOMENTS},
                }
