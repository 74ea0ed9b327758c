"""The networks of a distillation as modules that an engine wraps: a forward is the whole forward.

``network`` is what trains; what else a forward needs is bound beside it, where ``nn.Module`` does not
register it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.discriminator import Heads
from rollout.flow import ode_step, renoised
from rollout.policies.base import FlowPolicy


class StudentModule(nn.Module):
    """Both steps as one forward, which is what an engine wraps."""

    def __init__(self, policy: FlowPolicy, sigmas: Sequence[float], end_to_end: bool) -> None:
        super().__init__()
        self.network = policy.module
        self._bound = (policy, tuple(sigmas), end_to_end)

    def forward(self, z: Tensor, noise: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(y1, y2), both (n, C, F, H, W)."""
        policy, sigmas, end_to_end = self._bound
        return generate(policy.velocity, z, noise, condition, sigmas, end_to_end)


class VelocityModule(nn.Module):
    """A policy's velocity as a forward (the fake-score network)."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.network = policy.module
        self._bound = (policy,)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity (n, C, F, H, W)."""
        return self._bound[0].velocity(x, t, condition)


class HeadsModule(nn.Module):
    """Heads as what an engine wraps."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.network = heads

    def forward(self, name: str, features: Sequence[Tensor]) -> Tensor:
        """Logits (n,)."""
        return self.network(name, features)


def generate(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    noise: Tensor,
    condition: Tensor,
    sigmas: Sequence[float],
    end_to_end: bool,
) -> tuple[Tensor, Tensor]:
    """The two steps from ``z``: y1 and y2. Without ``end_to_end`` y2's gradient stops before step 1."""
    first, second, end = (torch.full((len(z),), s, device=z.device) for s in sigmas)
    y1 = ode_step(z, velocity(z, first, condition), first, end)
    x = renoised(y1 if end_to_end else y1.detach(), sigmas[1], noise)
    return y1, ode_step(x, velocity(x, second, condition), second, end)
