"""A batch of samples on its way down the grid: what every method does to states, counted and keyed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.draws import Draw, Group
from rollout.guidance.contract import Counts, Tilt
from rollout.guidance.kernels import Kernel, KernelConfig, clean_of
from rollout.policies.base import FlowPolicy, forwards_per_sample

# Worse than any reward, and still a number: differences of two of them are.
NOT_SCORED = -1e9


@dataclass(frozen=True)
class Slope:
    """Predictions at states with the reward there and its gradient by the states.

    Attributes:
        velocity, clean: (M, ...). potential: fp64 (M,). gradient: fp32 (M, ...), 0 in a row where it
            was not finite.
    """

    velocity: Tensor
    clean: Tensor
    potential: Tensor
    gradient: Tensor


class Walk:
    """Rows that are walked down one grid together.

    A *row* is a sample that comes out; a method may keep several states a row, in *slots*. States are
    (M, ...) with their ``rows`` (M,), and noise is keyed by (the row's draw, step, slot), so that no
    number depends on what else is in the batch.

    Attributes:
        samples: the group of each row; ``draws``: what its noise is keyed by.
        sigmas: the grid, down to 0.
        counts: work by row.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        tilt: Tilt,
        samples: Sequence[Group],
        draws: Sequence[Draw],
        sigmas: Sequence[float],
        guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        self.policy, self.tilt = policy, tilt
        self.samples, self.draws, self.sigmas = list(samples), list(draws), tuple(sigmas)
        self.guidance_scale, self.batch_size = guidance_scale, batch_size
        self.conditions = policy.encode([group.prompt for group in samples])
        self.counts = Counts(len(self.samples))

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.sigmas) - 1

    def rows(self, slots: int = 1) -> Tensor:
        """The row of each of ``slots`` states a row, those of a row together."""
        return torch.arange(len(self.samples)).repeat_interleave(slots)

    def noise(self, name: str, slots: int = 1, rows: Tensor | None = None) -> Tensor:
        """Standard normal states, one for each of ``slots`` slots of all rows (or of ``rows``)."""
        shape = self.policy.latent_shape
        streams = [name if slot == 0 else f"{name} {slot}" for slot in range(slots)]
        draws = self.draws if rows is None else [self.draws[row] for row in rows.tolist()]
        drawn = [draw.noise(stream, shape) for draw in draws for stream in streams]
        return torch.stack(drawn).to(self.policy.device)

    def start(self, slots: int = 1) -> Tensor:
        """Initial states; the first slot's is that of the plain sampler."""
        return self.noise("initial", slots)

    def kernel(self, config: KernelConfig, step: int) -> Kernel:
        """The transition of ``step``, from one sigma of the grid to the next."""
        return config.at(self.sigmas[step], self.sigmas[step + 1], self.sigmas[1])

    @torch.no_grad()
    def velocity(self, x: Tensor, step: int, rows: Tensor) -> Tensor:
        """The guided velocity of states at sigma ``step``; one forward each, counted."""
        self.counts.add(rows, forwards=forwards_per_sample(self.guidance_scale))
        return torch.cat([self._velocity(x[c], step, rows[c]) for c in self._chunks(x)])

    def clean(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The predictions of x0 of states at sigma ``step``."""
        return clean_of(x, velocity, self.sigmas[step])

    def scores(self, clean: Tensor, rows: Tensor) -> Tensor:
        """fp64 (M,) rewards of predictions or samples, ``NOT_SCORED`` where there is none; counted."""
        self.counts.add(rows, decodes=1, rewards=1)
        scored = self.tilt.scores(clean, [self.samples[row] for row in rows.tolist()])
        return scored.nan_to_num(nan=NOT_SCORED).clamp(min=NOT_SCORED)

    def slope(self, x: Tensor, step: int, rows: Tensor, through_network: bool = True) -> Slope:
        """Velocity, prediction, reward and its gradient at states of sigma ``step``.

        Args:
            through_network: differentiate x0_hat by the state; else take its Jacobian as the identity,
                which costs no backward of the network.
        """
        scale = forwards_per_sample(self.guidance_scale)
        self.counts.add(rows, forwards=scale, decodes=1, rewards=1, reward_backwards=1)
        if through_network:
            self.counts.add(rows, backwards=scale)
        parts = [self._slope(x[c], step, rows[c], through_network) for c in self._chunks(x)]
        velocity, clean, potential, gradient = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        finite = gradient.flatten(1).isfinite().all(1) & (gradient.flatten(1) != 0).any(1)
        if not finite.all():
            self.counts.add(rows[~finite.cpu()], fallbacks=1)
            gradient[~finite] = 0
        return Slope(velocity, clean, potential.double().cpu(), gradient)

    def _slope(
        self, x: Tensor, step: int, rows: Tensor, through_network: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = self.sigmas[step]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with torch.set_grad_enabled(through_network):
                velocity = self._velocity(x, step, rows)
            clean = clean_of(x, velocity, t)
            chosen = [self.samples[row] for row in rows.tolist()]
            potential = self.tilt.potential(x, t, clean, chosen)
            (gradient,) = torch.autograd.grad(potential.sum(), x)
        return velocity.detach(), clean.detach(), potential.detach(), gradient

    def _velocity(self, x: Tensor, step: int, rows: Tensor) -> Tensor:
        t = torch.full((len(x),), self.sigmas[step], dtype=x.dtype, device=x.device)
        condition = self.conditions[rows.to(self.conditions.device)]
        return self.policy.guided_velocity(x, t, condition, self.guidance_scale)

    def _chunks(self, x: Tensor) -> list[slice]:
        return [slice(i, i + self.batch_size) for i in range(0, len(x), self.batch_size)]
