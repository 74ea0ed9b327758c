"""Trained weights on their way from the learner to the rollout workers: one blob, proved on arrival.

A blob is a safetensors file in memory, so it crosses the object store without a copy per tensor.
The checksum is over names, shapes and values *as bound*: a worker computes it again from the
parameters its network now uses, so that a sync that reaches no module cannot pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import nn


@dataclass(frozen=True)
class Weights:
    """A published version: ``data`` is the blob (uint8) or a reference to it."""

    version: int
    checksum: str
    data: Any


class WeightsMismatch(RuntimeError):
    """The weights that arrived are not the weights that were sent, or bind to nothing."""


def pack(tensors: Mapping[str, np.ndarray], version: int) -> Weights:
    """Published form of fp32 arrays by parameter name."""
    data = np.frombuffer(safetensors.numpy.save(dict(tensors)), dtype=np.uint8)
    return Weights(version, checksum(tensors), data)


def read_weights(path: Path, version: int) -> Weights:
    """Weights from a file that holds a blob."""
    data = np.fromfile(path, np.uint8)
    return Weights(version, checksum(unpack(data)), data)


def unpack(data: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a blob."""
    return safetensors.numpy.load(data.tobytes())


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes, independent of order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def to_arrays(parameters: Mapping[str, nn.Parameter | torch.Tensor]) -> dict[str, np.ndarray]:
    """fp32 CPU views (copies, off the CPU) of parameters by name."""
    return {name: p.detach().float().cpu().numpy() for name, p in parameters.items()}


@torch.no_grad()
def bind(parameters: Mapping[str, nn.Parameter], weights: Weights) -> int:
    """Copy a blob into the network's trained parameters; returns how many were bound.

    Raises:
        WeightsMismatch: other names or shapes than the network trains, nothing to bind, or a
            checksum over the bound parameters that differs from the sender's.
    """
    arrays = unpack(weights.data)
    if not arrays or set(arrays) != set(parameters):
        only_sent, only_here = set(arrays) - set(parameters), set(parameters) - set(arrays)
        raise WeightsMismatch(
            f"weights version {weights.version} bind to {len(set(arrays) & set(parameters))} of "
            f"{len(parameters)} trained parameters; sent only: {sorted(only_sent)[:3]}, here only: "
            f"{sorted(only_here)[:3]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != arrays[name].shape:
            raise WeightsMismatch(f"{name}: {arrays[name].shape} does not fit {parameter.shape}")
        parameter.copy_(torch.from_numpy(arrays[name]))
    if checksum(to_arrays(parameters)) != weights.checksum:
        raise WeightsMismatch(f"weights version {weights.version} arrived changed (checksum)")
    return len(arrays)
