"""Flow-GRPO (arXiv 2505.05470): every step is an SDE step and every step is trained.

    for each prompt: G rollouts, all steps ``x' = mean + std eps``
    L = mean over rollouts and steps of max(-A rho, -A clip(rho, 1 +- c)) + beta KL

Deviation from the release: the last step takes no noise and is not trained (the release injects
noise there too, leaves it in the image, and does not train it either).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rl.grpo import GRPO, GRPOConfig
from rollout.draws import Group
from rollout.flow import FlowPlan


class FlowGRPOConfig(GRPOConfig, frozen=True, extra="forbid"):
    """Flow-GRPO: the full trajectory is sampled by SDE and trained."""

    kind: Literal["flow_grpo"] = "flow_grpo"

    def indices(self, steps: int) -> tuple[int, ...]:
        """The trained grid indices."""
        return tuple(range(steps - 1))


class FlowGRPO(GRPO):
    """See the module."""

    def plans(self, step: int, groups: Sequence[Group]) -> list[FlowPlan]:
        """All steps but the last."""
        return [self.plan(range(self.grid.steps - 1)) for _ in groups]
