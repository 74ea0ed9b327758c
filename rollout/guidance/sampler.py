"""The sampler under guidance: groups and a method in, the best samples and their cost out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rollout.draws import Draw, Group, keyed_seed
from rollout.flow_sampler import FlowRollout, FlowSamplerConfig, no_transitions
from rollout.guidance.contract import COUNTED, Counts, GuidanceError, Tilt
from rollout.guidance.gradient import DPS, NTRK, FreeDoM
from rollout.guidance.particles import DAS, SMC
from rollout.guidance.search import RBF, SVDD, Beam, BestOfN
from rollout.guidance.walk import Walk
from rollout.policies.base import FlowPolicy

Method = BestOfN | SVDD | RBF | Beam | SMC | DAS | DPS | FreeDoM | NTRK
GuidanceMethod = Annotated[Method, Field(discriminator="kind")]
METHODS: tuple[type[Method], ...] = (BestOfN, SVDD, RBF, Beam, SMC, DAS, DPS, FreeDoM, NTRK)


class GuidedSampler:
    """Draws groups by methods that tilt them towards a reward."""

    def __init__(self, config: FlowSamplerConfig, policy: FlowPolicy, tilt: Tilt) -> None:
        self.config, self.policy, self.tilt = config, policy, tilt
        self.sigmas = config.grid().sigmas

    @torch.no_grad()
    def sample(self, groups: Sequence[Group], method: Method) -> tuple[list[FlowRollout], Counts]:
        """One rollout for each group, in order, and what each of its members cost.

        Raises:
            GuidanceError: the method needs a gradient that the reward has not.
        """
        check_method(method, self.tilt.differentiable)
        owners = [(g, j) for g, group in enumerate(groups) for j in range(group.size)]
        copies = [(g, j, k) for g, j in owners for k in range(method.best_of)]
        walk = Walk(
            self.policy,
            self.tilt,
            [groups[g] for g, _, _ in copies],
            [_copy(groups[g].draw(j), k) for g, j, k in copies],
            self.sigmas,
            self.config.guidance_scale,
            self.config.batch_size,
        )
        final = method.draw(walk)
        if method.best_of > 1:
            scores = walk.scores(final, walk.rows()).view(len(owners), -1)
            final = final[scores.argmax(1) + torch.arange(len(owners)) * method.best_of]
        counts = Counts(len(owners))
        for name in COUNTED:
            counts.columns[name] = walk.counts.columns[name].view(len(owners), -1).sum(1)
        return self._rollouts(groups, final, counts), counts

    def _rollouts(
        self, groups: Sequence[Group], final: Tensor, counts: Counts
    ) -> list[FlowRollout]:
        media = self.policy.decode(final)
        rollouts: list[FlowRollout] = []
        start = 0
        for group in groups:
            span = slice(start, start + group.size)
            start += group.size
            spent = int(counts.columns["forwards"][span].sum())
            empty = no_transitions(self.policy.latent_shape)
            rollouts.append(FlowRollout(group, empty, media[span], spent))
        return rollouts


def check_method(method: Method, differentiable: bool) -> None:
    """Refuse a method that needs a gradient where there is none.

    Raises:
        GuidanceError: with the methods that can be used.
    """
    if type(method).differentiable and not differentiable:
        usable = ", ".join(m.model_fields["kind"].default for m in METHODS if not m.differentiable)
        raise GuidanceError(
            f"{method.kind} follows the gradient of the reward, and this reward has none; "
            f"methods that can use it: {usable}"
        )


def _copy(draw: Draw, copy: int) -> Draw:
    """The draw of an independent copy of a sample; the first is the sample itself."""
    if copy == 0:
        return draw
    seed = keyed_seed(draw.seed, "copy", copy)
    return Draw(draw.step, draw.group, draw.prompt_id, draw.index, seed)
