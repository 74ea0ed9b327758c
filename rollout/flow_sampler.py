"""The sampler: groups and plans in, rollouts out, batched over groups with different plans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rollout.draws import Group
from rollout.flow import (
    WAN_SIGMA_MAX,
    DiffusionConfig,
    FlowGrid,
    FlowPlan,
    dpmpp_2m_step,
    log_prob,
    noised_states,
    ode_step,
    renoised,
    sde_step,
    shifted_sigmas,
)
from rollout.policies.base import FlowPolicy, forwards_per_sample


class FlowSamplerConfig(BaseModel, frozen=True, extra="forbid"):
    """How a flow policy is sampled."""

    kind: Literal["flow"] = "flow"
    steps: int = Field(default=20, ge=2, le=1000, description="Steps of the grid.")
    shift: float = Field(default=3.0, gt=0, description="Timestep shift: 3 at 480p, 5 at 720p.")
    sigma_max: float = Field(
        default=WAN_SIGMA_MAX, gt=0, le=1, description="Start of the unshifted grid; Z-Image: 1."
    )
    guidance_scale: float = Field(
        default=1.0, ge=0, description="Classifier-free guidance; 1 needs no unconditional branch."
    )
    diffusion: DiffusionConfig = Field(
        default=DiffusionConfig(), description="Diffusion coefficient of SDE steps."
    )
    batch_size: int = Field(
        default=64,
        gt=0,
        description="Samples that a worker draws together; a job holds whole groups.",
    )

    def build(self, policy: FlowPolicy) -> FlowSampler:
        """The sampler of a policy."""
        return FlowSampler(self, policy)

    def grid(self) -> FlowGrid:
        """The grid with its diffusion coefficient."""
        return FlowGrid(shifted_sigmas(self.steps, self.shift, self.sigma_max), self.diffusion)


@dataclass(frozen=True)
class Transitions:
    """The SDE steps of a group, as what an objective replays. All arrays are numpy.

    A *node* is a state the network is evaluated at; a *branch* is one noisy step out of it. With
    shared noise one node has a branch per member, and training evaluates the network once.

    Attributes:
        x: fp32 (nodes, C, F, H, W); ``index``, ``sigma``, ``sigma_next``, ``g``: (nodes,).
        x_next: fp32 (branches, C, F, H, W); ``log_prob`` fp32 (branches,) when sampled.
        node: int64 (branches,), the node a branch leaves; ``member``: the sample it leads to.
        final: fp32 (size, C, F, H, W), the samples themselves, or no rows where the plan keeps none.
        seeds: int64 (size,), the draws' own, where final states are kept.
        velocity: fp32 (size, noised, C, F, H, W) of the sampling weights, under guidance, at the
            ``noised_states`` of ``final`` on the grid's sigmas; no rows where the plan has none.
    """

    x: np.ndarray
    index: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    g: np.ndarray
    x_next: np.ndarray
    log_prob: np.ndarray
    node: np.ndarray
    member: np.ndarray
    final: np.ndarray
    seeds: np.ndarray
    velocity: np.ndarray


@dataclass(frozen=True)
class FlowSummary:
    """What the driver knows of a group: network evaluations that replaying it takes, and how many
    injected steps a member has."""

    nodes: int
    branches: int


@dataclass(frozen=True)
class FlowRollout:
    """One group of samples.

    Attributes:
        group: its draws.
        replay: the injected steps; no rows for an ODE plan.
        media: uint8 (size, frames, height, width, channels).
        forwards: network evaluations spent (a guided velocity counts 2).
    """

    group: Group
    replay: Transitions
    media: np.ndarray
    forwards: int

    @property
    def summary(self) -> FlowSummary:
        """Its numbers."""
        return FlowSummary(len(self.replay.x), len(self.replay.x_next) // self.group.size)


@dataclass
class _Track:
    """Members of a group that go through the grid together (all of them, but for naive plans)."""

    group: Group
    plan: FlowPlan
    members: list[int]
    schedule: list[tuple[float, float, int | None, str]]
    x: Tensor
    previous: Tensor
    previous_sigma: float = float("nan")
    forwards: int = 0
    recorded: list[dict[str, np.ndarray]] = field(default_factory=list[dict[str, np.ndarray]])


class FlowSampler:
    """Draws groups from a policy by their plans.

    Every number depends on the groups of one call only: which worker runs it, and what ran there
    before, changes nothing.
    """

    def __init__(self, config: FlowSamplerConfig, policy: FlowPolicy) -> None:
        self.config = config
        self.policy = policy
        self.grid = config.grid()

    @torch.no_grad()
    def sample(self, groups: Sequence[Group], plans: Sequence[FlowPlan]) -> list[FlowRollout]:
        """Rollouts of ``groups``, each by its plan, in order."""
        tracks: list[_Track] = []
        for group, plan in zip(groups, plans, strict=True):
            if plan.member_indices:
                singles = zip(range(group.size), plan.member_indices, strict=True)
                tracks += [self._start(group, plan, [j], (k,)) for j, k in singles]
            else:
                members = list(range(group.size))
                tracks.append(self._start(group, plan, members, plan.sde_indices))
        conditions = self.policy.encode([track.group.prompt for track in tracks])
        for phase in range(max(len(track.schedule) for track in tracks)):
            active = [i for i, track in enumerate(tracks) if phase < len(track.schedule)]
            self._advance([tracks[i] for i in active], conditions[active], phase)
        rollouts = self._finish(groups, tracks)
        first = [i for i, track in enumerate(tracks) if track.members[0] == 0]
        return [
            self._noised(rollout, plan.noised, conditions[i : i + 1]) if plan.noised else rollout
            for rollout, plan, i in zip(rollouts, plans, first, strict=True)
        ]

    def _noised(self, rollout: FlowRollout, count: int, condition: Tensor) -> FlowRollout:
        """The rollout with the velocity at ``count`` noised states of each final one."""
        replay, device = rollout.replay, self.policy.device
        final, sigmas = torch.from_numpy(replay.final), self.grid.sigmas[:-1]
        x, t = noised_states(final, replay.seeds.tolist(), sigmas, count)
        conditions = condition.expand(t.numel(), *condition.shape[1:])
        found = self._velocity(x.flatten(0, 1).to(device), t.flatten().to(device), conditions)
        velocity = found.reshape(x.shape).cpu().numpy()
        spent = t.numel() * forwards_per_sample(self.config.guidance_scale)
        kept = replace(replay, velocity=velocity)
        return replace(rollout, replay=kept, forwards=rollout.forwards + spent)

    def _start(
        self, group: Group, plan: FlowPlan, members: list[int], sde: tuple[int, ...]
    ) -> _Track:
        shape = self.policy.latent_shape
        if plan.shared_noise:
            x = group.shared.noise("initial", shape)[None]
        else:
            x = torch.stack([group.draw(j).noise("initial", shape) for j in members])
        x = x.to(self.policy.device)
        return _Track(group, plan, members, self._schedule(plan, sde), x, previous=x)

    def _schedule(
        self, plan: FlowPlan, sde: tuple[int, ...]
    ) -> list[tuple[float, float, int | None, str]]:
        sigmas = self.grid.sigmas
        if plan.steps is not None:
            sigmas = shifted_sigmas(plan.steps, self.config.shift, self.config.sigma_max)
        solver = "renoise" if plan.renoise else "euler"
        steps = [
            (sigmas[i], sigmas[i + 1], i if i in sde else None, solver)
            for i in range(len(sigmas) - 1)
        ]
        if plan.tail is None or not sde:
            return steps
        start = sde[-1] + 1
        tail = plan.tail.steps
        # The tail keeps the grid's own spacing: it is every so-maniest of its sigmas.
        knots = [
            sigmas[start + round(j * (self.grid.steps - start) / tail)] for j in range(tail + 1)
        ]
        solver = plan.tail.solver
        return steps[:start] + [(a, b, None, solver) for a, b in itertools.pairwise(knots) if a > b]

    def _advance(self, tracks: list[_Track], conditions: Tensor, phase: int) -> None:
        """One step of every track; tracks are rows of one batch whatever their plans."""
        counts = [len(track.x) for track in tracks]
        steps = [track.schedule[phase] for track in tracks]
        x = torch.cat([track.x for track in tracks])
        rows = torch.repeat_interleave(torch.tensor(counts))
        sigma = torch.tensor([s[0] for s in steps])[rows].to(x.device)
        sigma_next = torch.tensor([s[1] for s in steps])[rows].to(x.device)
        velocity = self._velocity(x, sigma, conditions[rows.to(conditions.device)])
        stepped = ode_step(x, velocity, sigma, sigma_next)
        if any(s[3] == "dpmpp_2m" for s in steps):
            stepped = self._second_order(tracks, steps, rows, x, velocity, stepped)
        offset = 0
        for track, count, (_, after, index, solver) in zip(tracks, counts, steps, strict=True):
            span = slice(offset, offset + count)
            offset += count
            track.forwards += count * forwards_per_sample(self.config.guidance_scale)
            if solver == "renoise":
                clean = ode_step(
                    x[span], velocity[span], sigma[span], torch.zeros_like(sigma[span])
                )
                track.x = renoised(clean, after, torch.stack(self._noise(track, phase)).to(x))
            elif index is None:
                track.x = stepped[span]
            else:
                self._inject(track, index, x[span], velocity[span], sigma[span], sigma_next[span])

    def _velocity(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        size, scale = self.config.batch_size, self.config.guidance_scale
        chunks = [
            self.policy.guided_velocity(
                x[i : i + size], sigma[i : i + size], condition[i : i + size], scale
            )
            for i in range(0, len(x), size)
        ]
        return torch.cat(chunks)

    def _second_order(
        self,
        tracks: list[_Track],
        steps: list[tuple[float, float, int | None, str]],
        rows: Tensor,
        x: Tensor,
        velocity: Tensor,
        stepped: Tensor,
    ) -> Tensor:
        sigma = torch.tensor([s[0] for s in steps])[rows].to(x.device)
        sigma_next = torch.tensor([s[1] for s in steps])[rows].to(x.device)
        denoised = x - velocity * sigma.reshape(-1, *[1] * (x.ndim - 1))
        second = dpmpp_2m_step(
            x,
            denoised,
            torch.cat([track.previous for track in tracks]),
            torch.tensor([track.previous_sigma for track in tracks])[rows].to(x.device),
            sigma,
            sigma_next,
        )
        chosen = torch.tensor([s[3] == "dpmpp_2m" for s in steps])[rows].to(x.device)
        offset = 0
        for track, step in zip(tracks, steps, strict=True):
            count = len(track.x)
            if step[3] == "dpmpp_2m":
                track.previous, track.previous_sigma = denoised[offset : offset + count], step[0]
            offset += count
        return torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), second, stepped)

    def _inject(
        self,
        track: _Track,
        index: int,
        x: Tensor,
        velocity: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
    ) -> None:
        """The SDE step of one track; a shared prefix splits into the group's members here."""
        node = torch.arange(len(x)).repeat_interleave(len(track.members) // len(x)).to(x.device)
        g = torch.full_like(sigma, self.grid.coefficient(index))
        mean, std = sde_step(x, velocity, sigma, sigma_next, g)
        mean, std = mean[node], std[node]
        noise = torch.stack(self._noise(track, index)).to(x)
        x_next = mean + std.reshape(-1, *[1] * (x.ndim - 1)) * noise
        track.recorded.append(
            {
                "x": x.cpu().numpy(),
                "index": np.full(len(x), index, np.int64),
                "sigma": sigma.cpu().numpy(),
                "sigma_next": sigma_next.cpu().numpy(),
                "g": g.cpu().numpy(),
                "x_next": x_next.cpu().numpy(),
                "log_prob": log_prob(x_next, mean, std).cpu().numpy(),
                "node": node.cpu().numpy(),
                "member": np.asarray(track.members, np.int64),
            }
        )
        track.x = track.previous = x_next

    def _noise(self, track: _Track, index: int) -> list[Tensor]:
        group, shape, stream = track.group, self.policy.latent_shape, f"inject {index}"
        if not track.plan.antithetic:
            return [group.draw(j).noise(stream, shape) for j in track.members]
        half = [group.draw(j).noise(stream, shape) for j in track.members[::2]]
        return [signed for noise in half for signed in (noise, -noise)]

    def _finish(self, groups: Sequence[Group], tracks: list[_Track]) -> list[FlowRollout]:
        final = torch.cat([t.x.expand(len(t.members), *t.x.shape[1:]) for t in tracks])
        media = self.policy.decode(final)
        rollouts: list[FlowRollout] = []
        offset = 0
        remaining = iter(tracks)
        for group in groups:
            own: list[_Track] = []
            while sum(len(track.members) for track in own) < group.size:
                own.append(next(remaining))
            transitions = _join([r for t in own for r in t.recorded], self.policy.latent_shape)
            forwards = sum(track.forwards for track in own)
            span = slice(offset, offset + group.size)
            if own[0].plan.keep_final or own[0].plan.noised:
                seeds = np.array([group.draw(j).seed for j in range(group.size)], np.int64)
                kept = final[span].cpu().numpy()
                transitions = replace(transitions, final=kept, seeds=seeds)
            rollouts.append(FlowRollout(group, transitions, media[span], forwards))
            offset += group.size
        return rollouts


def no_transitions(shape: tuple[int, ...]) -> Transitions:
    """Of a group that no objective replays."""
    states, numbers = np.zeros((0, *shape), np.float32), np.zeros(0, np.float32)
    ids, none = np.zeros(0, np.int64), states[:, None]
    return Transitions(
        states, ids, numbers, numbers, numbers, states, numbers, ids, ids, states, ids, none
    )


def _join(recorded: list[dict[str, np.ndarray]], shape: tuple[int, ...]) -> Transitions:
    empty = no_transitions(shape)
    if not recorded:
        return empty
    offsets = np.cumsum([0, *[len(record["x"]) for record in recorded[:-1]]])
    shifted = [
        {**record, "node": record["node"] + offset}
        for record, offset in zip(recorded, offsets, strict=True)
    ]
    joined = {key: np.concatenate([r[key] for r in shifted]) for key in recorded[0]}
    return replace(empty, **joined)
