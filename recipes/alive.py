"""Bytes that live tensors hold, counted while the real network runs on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; ``known`` ones don't count.

    Attributes:
        now, peak: of this moment, and the most so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._known = {storage._cdata for storage in self._kept}  # pyright: ignore[reportPrivateUsage]
        self._references: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._references:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._references[key]

        self.now += size
        self._references[key] = weakref.ref(storage, gone)


@dataclass(frozen=True)
class Bytes:
    """What a run holds beyond weights, their gradients and its inputs.

    Attributes:
        kept: after the forward: for the backward pass.
        peak: the most, in the forward or in the backward pass.
    """

    kept: int
    peak: int


def count(
    network: nn.Module, inputs: Callable[[], Any], run: Callable[[nn.Module, Any], Tensor]
) -> Bytes:
    """Of ``run(network, inputs())`` and, where its result has a graph, of its backward pass.

    Args:
        network: built on the meta device; it is no use after this.
        inputs: makes the inputs, tensors of any values.
        run: the forward.
    """
    with FakeTensorMode():
        _give_fakes(network)
        given = inputs()
        leaves = [*network.parameters(), *network.buffers()]
        leaves += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf) if leaf.requires_grad else None
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        with Alive([*leaves, *gradients]) as alive:
            result = run(network, given)
            kept = alive.now
            if result.requires_grad:
                result.backward()
    return Bytes(kept, alive.peak)


def _give_fakes(network: nn.Module) -> None:
    """Put a tensor that claims to be in memory in the place of each on the meta device."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
