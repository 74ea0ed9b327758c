"""A target for the class marginal of what a model draws: Jeffrey guidance (arXiv 2606.13240).

``r(x) = log sum_y w(y) p(y|x)`` with ``w = target / base``: the law tilted by exp(r), that is with
beta = 1, has the marginal ``target`` where the model has ``base``, and the model's conditionals p(x|y).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from rewards.contract import ClassifierReward, RewardFunction, RewardSettings
from rewards.digits import DigitLogProb

if TYPE_CHECKING:
    from torch import Tensor

# Classifiers by the reward that stands on them, with their number of classes.
CLASSIFIERS = {"digit_log_prob": (DigitLogProb, 10)}
TOLERANCE = 1e-6


class Marginal(RewardSettings, frozen=True, extra="forbid"):
    """How much more often samples like this one are wanted: log sum_y target(y)/base(y) p(y|x)."""

    differentiable: ClassVar[bool] = True

    kind: Literal["marginal"] = "marginal"
    classifier: Literal["digit_log_prob"] = Field(
        default="digit_log_prob", description="The reward whose classifier names the classes."
    )
    target: tuple[float, ...] = Field(
        description="Wanted probability of each class; they sum to 1."
    )
    base: tuple[float, ...] = Field(
        description="The model's own, as marginal/CLASS of its unguided samples; positive where the "
        "target is."
    )

    @model_validator(mode="after")
    def _distributions(self) -> Self:
        classes = CLASSIFIERS[self.classifier][1]
        for name, values in (("target", self.target), ("base", self.base)):
            if len(values) != classes:
                raise ValueError(
                    f"{name} has {len(values)} entries; {self.classifier} knows {classes} classes"
                )
            wrong = [v for v in values if not 0 <= v <= 1]
            if wrong:
                raise ValueError(f"{name} has {wrong[0]}: probabilities are from 0 to 1")
            if abs(math.fsum(values) - 1) > TOLERANCE:
                raise ValueError(f"{name} sums to {math.fsum(values):.9g}, not to 1")
        for label, (wanted, own) in enumerate(zip(self.target, self.base, strict=True)):
            if wanted > 0 and own == 0:
                raise ValueError(
                    f"target wants class {label}, which base never has (0): no tilt can make it"
                )
        return self

    def build(self) -> RewardFunction:
        """With its classifier."""
        classifier: Any = CLASSIFIERS[self.classifier][0]().build()
        return MarginalReward(classifier, self.target, self.base)


class MarginalReward:
    """See ``Marginal``; served of uint8 media, and differentiable of pixels.

    ``target`` and ``base`` are distributions over the classes of ``classifier``.
    """

    def __init__(
        self, classifier: ClassifierReward, target: tuple[float, ...], base: tuple[float, ...]
    ) -> None:
        self.classifier = classifier
        self.target = np.array(target)
        self._log_ratio = [
            math.log(wanted / own) if wanted > 0 else -math.inf
            for wanted, own in zip(target, base, strict=True)
        ]

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> list[float | None]:
        """Scores of media uint8 (frames, height, width, channels), all of one shape.

        Raises:
            ValueError: other media.
        """
        import torch

        with torch.no_grad():
            return self.differentiable(prompts, _pixels(completions)).tolist()

    def differentiable(self, prompts: list[str], pixels: Tensor, **columns: Any) -> Tensor:
        """lse(l + log w) - lse(l) of the logits l of pixels; whatever the prompts ask for.

        See ``rewards.contract.DifferentiableReward``.
        """
        logits = self.classifier.logits(pixels)
        weighted = logits + logits.new_tensor(self._log_ratio)
        return weighted.logsumexp(-1) - logits.logsumexp(-1)

    def describe_set(
        self, prompts: list[str], completions: list[np.ndarray], **columns: Any
    ) -> dict[str, float]:
        """marginal/<class>, the mean posterior, and its total_variation distance to the target.

        Raises:
            ValueError: see ``__call__``.
        """
        import torch

        with torch.no_grad():
            logits = self.classifier.logits(_pixels(completions))
        marginal = logits.double().softmax(-1).mean(0).cpu().numpy()
        metrics = {f"marginal/{label}": float(share) for label, share in enumerate(marginal)}
        return metrics | {"total_variation": float(np.abs(marginal - self.target).sum() / 2)}


def _pixels(completions: list[np.ndarray]) -> Tensor:
    """fp32 (n, frames, height, width, channels) in [0, 1]."""
    import torch

    shapes = sorted({(str(media.dtype), media.shape) for media in completions})
    if len(shapes) != 1 or shapes[0][0] != "uint8" or len(shapes[0][1]) != 4:
        raise ValueError(
            f"media must be uint8 (frames, height, width, channels) of one shape, not {shapes}"
        )
    return torch.from_numpy(np.stack(completions)).float() / 255
