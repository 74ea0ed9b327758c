r"""Search without gradients: Best-of-N, SVDD, RBF and beam search.

They need a reward's number only, so any served reward can be used. A candidate is judged by the reward of
its prediction ``x0_hat``, whose network evaluation is kept for the next step if the candidate is.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.guidance.kernels import KernelConfig
from rollout.guidance.walk import Walk


class Search(BaseModel, frozen=True, extra="forbid"):
    """Options of all methods that only compare rewards."""

    differentiable: ClassVar[bool] = False
    # A method that is not Best-of-N itself gives one sample a row.
    best_of: ClassVar[int] = 1

    kernel: KernelConfig = Field(default=KernelConfig(), description="The law of a plain step.")


class BestOfN(BaseModel, frozen=True, extra="forbid"):
    """Independent samples, of which the best stays; KL to the policy ln N - (N - 1)/N."""

    differentiable: ClassVar[bool] = False

    kind: Literal["best_of_n"] = "best_of_n"
    best_of: int = Field(default=4, ge=1, description="N.")
    kernel: KernelConfig = Field(
        default=KernelConfig(kind="ode"), description="The law of a plain step."
    )

    def at_budget(self, nfe: int, steps: int) -> Self:
        """So many samples as ``nfe`` network evaluations allow, one at least."""
        return self.model_copy(update={"best_of": max(nfe // steps, 1)})

    def draw(self, walk: Walk) -> Tensor:
        """Plain samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        for step in range(walk.steps):
            kernel = walk.kernel(self.kernel, step)
            x = kernel.mean(x, walk.velocity(x, step, rows))
            if kernel.std > 0:
                x = x + kernel.std * walk.noise(f"guide {step}")
        return x


class SVDD(Search, frozen=True, extra="forbid"):
    """The best of K noises at every step (arXiv 2408.08252)."""

    kind: Literal["svdd"] = "svdd"
    candidates: int = Field(default=4, ge=1, description="K.")
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Of a draw among candidates by exp(r / temperature); 0: the best.",
    )

    def at_budget(self, nfe: int, steps: int) -> Self:
        """See ``BestOfN``; one evaluation starts, K follow at each step but the last."""
        return self.model_copy(update={"candidates": max((nfe - 1) // max(steps - 1, 1), 1)})

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        velocity = walk.velocity(x, 0, rows)
        count = len(rows)
        spread = walk.rows(self.candidates)
        for step in range(walk.steps - 1):
            kernel = walk.kernel(self.kernel, step)
            noise = walk.noise(f"guide {step}", self.candidates)
            x = kernel.mean(x, velocity)[spread] + kernel.std * noise
            velocity = walk.velocity(x, step + 1, spread)
            scores = walk.scores(walk.clean(x, velocity, step + 1), spread).view(count, -1)
            if self.temperature > 0:
                scores = scores / self.temperature + gumbel(walk, step, self.candidates)
            best = scores.argmax(1) + torch.arange(count) * self.candidates
            x, velocity = x[best], velocity[best]
        return last_step(walk, self.kernel, x, velocity)


class RBF(Search, frozen=True, extra="forbid"):
    """Rollover budget forcing (arXiv 2503.19385): at each step candidates are drawn until one is better
    than the best so far; what a step leaves of its quota rolls over to the next."""

    kind: Literal["rbf"] = "rbf"
    quota: int = Field(default=4, ge=1, description="Candidates a step may take, on average.")

    def at_budget(self, nfe: int, steps: int) -> Self:
        """See ``SVDD``; the budget is an upper bound."""
        return self.model_copy(update={"quota": max((nfe - 1) // max(steps - 1, 1), 1)})

    def draw(self, walk: Walk) -> Tensor:
        """Samples (rows, ...)."""
        x, rows = walk.start(), walk.rows()
        velocity = walk.velocity(x, 0, rows)
        record = walk.scores(walk.clean(x, velocity, 0), rows)
        spare = torch.zeros(len(rows), dtype=torch.int64)
        for step in range(walk.steps - 1):
            kernel = walk.kernel(self.kernel, step)
            allowed = spare + self.quota
            mean = kernel.mean(x, velocity)
            best = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
            used = torch.zeros_like(spare)
            active = rows
            while len(active):
                trial = int(used[active[0]])  # rows that are still open have tried equally often
                name = f"guide {step}" if trial == 0 else f"guide {step} {trial}"
                candidate = mean[active] + kernel.std * walk.noise(name, rows=active)
                ahead = walk.velocity(candidate, step + 1, active)
                scores = walk.scores(walk.clean(candidate, ahead, step + 1), active)
                better = (scores > best[active]) | (used[active] == 0)
                kept = active[better]
                x, velocity = x.clone(), velocity.clone()
                x[kept], velocity[kept] = candidate[better], ahead[better]
                best[kept] = scores[better]
                used[active] += 1
                active = active[(best[active] <= record[active]) & (used[active] < allowed[active])]
            spare = allowed - used
            record = torch.maximum(record, best)
        return last_step(walk, self.kernel, x, velocity)


class Beam(Search, frozen=True, extra="forbid"):
    """The best ``width`` of all children of all states of a row, at every step."""

    kind: Literal["beam"] = "beam"
    width: int = Field(default=2, ge=1, description="States that are kept a row, B.")
    children: int = Field(default=2, ge=1, description="Candidates of each state, K.")

    def at_budget(self, nfe: int, steps: int) -> Self:
        """See ``SVDD``: as many children as fit, of fewer states where even two each do not."""
        total = max((nfe - self.width) // max(steps - 1, 1), 1)
        width = min(self.width, max(total // 2, 1))
        return self.model_copy(update={"width": width, "children": max(total // width, 1)})

    def draw(self, walk: Walk) -> Tensor:
        """The best (rows, ...) of the last beams."""
        count, rows = len(walk.samples), walk.rows(self.width)
        x = walk.start(self.width)
        velocity = walk.velocity(x, 0, rows)
        clean_scores = torch.zeros(len(rows), dtype=torch.float64)
        children = self.width * self.children
        spread = walk.rows(children)
        parents = torch.arange(len(rows)).repeat_interleave(self.children)
        for step in range(walk.steps - 1):
            kernel = walk.kernel(self.kernel, step)
            x = kernel.mean(x, velocity)[parents] + kernel.std * walk.noise(
                f"guide {step}", children
            )
            velocity = walk.velocity(x, step + 1, spread)
            scores = walk.scores(walk.clean(x, velocity, step + 1), spread).view(count, -1)
            top = scores.topk(self.width, dim=1)
            chosen = (top.indices + torch.arange(count)[:, None] * children).flatten()
            x, velocity, clean_scores = x[chosen], velocity[chosen], top.values.flatten()
        x = last_step(walk, self.kernel, x, velocity, self.width)
        return x[clean_scores.view(count, -1).argmax(1) + torch.arange(count) * self.width]


def last_step(
    walk: Walk, config: KernelConfig, x: Tensor, velocity: Tensor, slots: int = 1
) -> Tensor:
    """The step to 0, where there is nothing left to choose."""
    kernel = walk.kernel(config, walk.steps - 1)
    return kernel.mean(x, velocity) + kernel.std * walk.noise(f"guide {walk.steps - 1}", slots)


def gumbel(walk: Walk, step: int, slots: int) -> Tensor:
    """Keyed standard Gumbel noise fp64 (rows, slots)."""
    drawn = [
        torch.rand(slots, generator=draw.generator(f"choose {step}"), dtype=torch.float64)
        for draw in walk.draws
    ]
    return -(-torch.stack(drawn).clamp(min=1e-300).log()).log()
