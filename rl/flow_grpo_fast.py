"""Flow-GRPO-Fast: SDE steps only inside a short window, and only the window is trained.

    for each prompt: a window of w consecutive steps, its start drawn from a pool
    steps inside the window are SDE steps, all others ODE steps
    L = mean over rollouts and window steps of max(-A rho, -A clip(rho, 1 +- c)) + beta KL

Windows are dealt to prompts stratified over their possible starts and keyed by (seed, step), as
Flash-GRPO's indices are; the release draws one window for all prompts of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rl.flash_grpo import stratified_indices
from rl.grpo import GRPO, GRPOConfig, first_half
from rollout.draws import Group
from rollout.flow import FlowGrid, FlowPlan


class FlowGRPOFastConfig(GRPOConfig, frozen=True, extra="forbid"):
    """Flow-GRPO-Fast: a random window of consecutive SDE steps per prompt."""

    kind: Literal["flow_grpo_fast"] = "flow_grpo_fast"
    window: int = Field(default=2, ge=1, description="Consecutive SDE steps.")

    def indices(self, steps: int) -> tuple[int, ...]:
        """The grid indices that a window may cover."""
        return first_half(steps)


class FlowGRPOFast(GRPO):
    """See the module."""

    def __init__(
        self, config: FlowGRPOFastConfig, grid: FlowGrid, guidance_scale: float, seed: int
    ) -> None:
        super().__init__(config, grid, guidance_scale, seed)
        covered = config.indices(grid.steps)
        self.window = config.window
        self.starts = covered[: len(covered) - config.window + 1]

    def plans(self, step: int, groups: Sequence[Group]) -> list[FlowPlan]:
        """One window a group."""
        starts = stratified_indices(self.starts, self.seed, step, len(groups))
        return [self.plan(range(k, k + self.window)) for k in starts]
