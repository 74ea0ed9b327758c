"""The clipped surrogate on a flow transition, shared by the GRPO family.

One branch contributes ``w max(-A rho, -A clip(rho, 1 +- c)) + beta KL``, with
``rho = exp(log_prob - log_prob_old)`` and ``KL = mean_D[(mean - mean_ref)^2] / 2 std^2`` between the
two Gaussian steps. The KL carries the step's own variance (with dt), so that beta means the same on
every grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl.flow_batches import FlowBatch
from rollout.flow import log_prob, per_sample, sde_step

if TYPE_CHECKING:
    from rollout.policies.base import FlowPolicy

Table = dict[str, Tensor]


def clipped_surrogate(
    policy: FlowPolicy,
    batch: FlowBatch,
    velocity: Tensor,
    timestep_weights: Tensor,
    *,
    guidance_scale: float,
    clip_range: float,
    kl_coefficient: float,
    on_policy: bool,
) -> tuple[Tensor, Table]:
    """The loss (scalar: weighted sum over branches) and the table of its branches.

    Args:
        policy: evaluated for the KL's reference only.
        batch: n nodes, m branches.
        velocity: of the nodes, under guidance, gradient through both branches.
        timestep_weights: (m,) the algorithm's weight of each branch, e.g. TGR's w_k.
        guidance_scale: the rollout's.
        clip_range: c, on the scale of a log-probability averaged over elements.
        kl_coefficient: beta; 0 computes no reference.
        on_policy: nothing was updated since sampling, hence rho is 1 by definition and only its
            gradient matters; the table still reports the ratio against the stored log-probability.
            Else rho is that ratio, to the weights that sampled, however old they are.
    """
    node_mean, node_std = sde_step(batch.x, velocity, batch.sigma, batch.sigma_next, batch.g)
    mean, std = node_mean[batch.node], node_std[batch.node]
    new = log_prob(batch.x_next, mean, std)
    old = new.detach() if on_policy else batch.log_prob
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
    losses = timestep_weights * policy_loss
    table: Table = {}
    if kl_coefficient:
        with torch.no_grad(), policy.reference():
            anchor = policy.guided_velocity(batch.x, batch.sigma, batch.condition, guidance_scale)
            anchor, _ = sde_step(batch.x, anchor, batch.sigma, batch.sigma_next, batch.g)
        kl = (mean - anchor[batch.node]).square().flatten(1).mean(1) / (2 * std**2)
        losses = losses + kl_coefficient * kl
        table["kl"] = kl.detach()
    with torch.no_grad():
        table |= _table(batch, new, mean, std, losses, timestep_weights, clip_range, on_policy)
    return (batch.weights * losses).sum(), table


def _table(
    batch: FlowBatch,
    new: Tensor,
    mean: Tensor,
    std: Tensor,
    losses: Tensor,
    timestep_weights: Tensor,
    clip_range: float,
    on_policy: bool,
) -> Table:
    ratio = (new - batch.log_prob).exp()
    advantages = batch.advantages
    outside = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    clipped = outside & (advantages != 0)
    active = torch.ones_like(ratio) if on_policy else (~clipped).float() * ratio
    sigma, g = batch.sigma[batch.node], batch.g[batch.node]
    dt = (batch.sigma - batch.sigma_next)[batch.node]
    scale = dt.sqrt() / g + g * dt.sqrt() * (1 - sigma) / (2 * sigma)
    noise = ((batch.x_next - mean) / per_sample(std, mean)).flatten(1).norm(dim=1)
    gradient = (batch.weights * timestep_weights * advantages * active).abs() * scale * noise
    return {
        "index": batch.index[batch.node],
        "weight": batch.weights,
        "loss": losses.detach(),
        "ratio": ratio,
        "log_ratio": new - batch.log_prob,
        "clipped": clipped.float(),
        "gradient": gradient / batch.x[0].numel(),
    }
