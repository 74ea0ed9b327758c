"""What a distillation method needs from the processes around it; ``cluster`` implements these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Per sample, as in RL: the driver makes metrics from whole columns.
Table = dict[str, Tensor]


class Network(Protocol):
    """A network under training in a group of ranks. Collective: all ranks call everything alike.

    A loss that leads *through* another network's parameters must not be sent backward through that
    network's engine: at some ZeRO stages its gradients would be silently wrong. Such a loss is
    differentiated down to the samples (``torch.autograd.grad``), and only the product of samples and
    that gradient goes backward (a vector-Jacobian product).
    """

    def __call__(self, *inputs: Any) -> Any:
        """The forward of its module, of which ``backward`` will follow."""
        ...

    def apply(self, *inputs: Any) -> Any:
        """The same forward when no gradient of it will reach the parameters."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of the sum over micro-batches and ranks; ``last``: the step's end."""
        ...

    def step(self) -> float:
        """An optimiser step; returns the gradient norm before clipping."""
        ...


@dataclass(frozen=True)
class TeacherItem:
    """A group of teacher samples on its way to a learner rank.

    Attributes:
        replay: ``Transitions`` with final states and seeds, a stored group's reference, or a
            reference to one of these.
        evaluations: samples of the group.
        weight: share of each sample in the loss; those of a step sum to 1.
        prompt: condition text, None where the stored group knows it; ``columns`` what the prompt set
            says of it.
    """

    replay: Any
    evaluations: int
    weight: float
    prompt: str | None
    columns: Mapping[str, Any]
