r"""Jeffrey guidance (arXiv 2606.13240): a model's class marginal set to a target, its conditionals kept.

By Jeffrey's rule, ``p'(x) = sum_y p*(y) p(x|y) = p(x) sum_y w(y) p(y|x)`` with ``w = p* / p``: the
law with marginal ``p*`` that is nearest to ``p``. It is a tilt of ``p``, so noised to ``t`` it has

    score'(x_t) = score(x_t) + c(x_t),    c = grad log sum_y w(y) p(y|x_t),

exactly, with the posterior of the *noised* state. Of classifier logits l that is
``grad [lse(l + log w) - lse(l)]``. A point mass as target is classifier guidance; ``w = 1`` changes
nothing.

A classifier of noised states must be right about how little it can know near ``t = 1``: what its
gradient is wrong by, the velocity is wrong by ``t / (1 - t)`` times. Logits of the form
``(1 - t) / (t^2 + (1 - t)^2 s^2)^(1/2) f(x_t, t)`` keep that bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def jeffrey_potential(logits: Tensor, log_ratio: Tensor) -> Tensor:
    """log sum_y w(y) p(y|x) for each row: (n,).

    Args:
        logits: (n, classes), up to a constant a row.
        log_ratio: (classes,) log w; minus infinity where the target is 0.
    """
    return (logits + log_ratio).logsumexp(-1) - logits.logsumexp(-1)


def log_ratio(target: Tensor, base: Tensor) -> Tensor:
    """log w = log p*/p of two distributions (classes,); minus infinity where the target is 0.

    Raises:
        ValueError: different shapes, or a class that is asked for and that the base never has.
    """
    if target.shape != base.shape or target.ndim != 1:
        raise ValueError(f"target {tuple(target.shape)} and base {tuple(base.shape)} must be (n,)")
    asked = target > 0
    unseen = (asked & (base <= 0)).nonzero().flatten().tolist()
    if unseen:
        raise ValueError(f"the base never has classes {unseen}: no tilt of it can")
    ratio = target / torch.where(asked, base, torch.ones_like(base))
    return ratio.log()


def marginal_of(logits: Tensor, concentration: float = 0.5) -> Tensor:
    """The class marginal of a model from logits (n, classes) of n of its samples: fp64 (classes,).

    The mean posterior, not the share of each winner: the weights multiply p(y|x), and only with
    ``p(y) = E p(y|x)`` is the tilt normalised and its marginal the target. ``concentration`` is that
    of a symmetric Dirichlet prior, half a sample of each class (Jeffreys' prior) by default, so that
    a class that a pilot never drew has a finite weight.

    Raises:
        ValueError: no sample.
    """
    if not len(logits):
        raise ValueError("a marginal needs at least one sample")
    seen = logits.double().softmax(-1).sum(0) + concentration
    return seen / seen.sum()


def corrected_velocity(velocity: Tensor, correction: Tensor, t: float) -> Tensor:
    """The velocity whose score at ``t`` is that of ``velocity`` plus ``correction``.

    The score is ``s = -eps_hat / t``. With ``x = (1 - t) x0_hat + t eps_hat`` this makes
    ``x0_hat = (x + t^2 s) / (1 - t)`` and ``v = eps_hat - x0_hat``, so
    ``dv/ds = -t - t^2 / (1 - t) = -t / (1 - t)``.

    Raises:
        ValueError: ``t`` outside [0, 1): at 1 the state says nothing about x0.
    """
    if not 0 <= t < 1:
        raise ValueError(f"a score correction has no velocity at t = {t}: take t in [0, 1)")
    return velocity - t / (1 - t) * correction
