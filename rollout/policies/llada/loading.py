"""Weights from a directory in the released layout, one tensor at a time.

The layout: ``model.safetensors``, or ``model.safetensors.index.json`` whose ``weight_map`` names the
file of each tensor. Beside the weights in their final form, loading holds no more than the tensors it
is at, as they are stored: one, or up to four where nothing is quantised. Files are not mapped: the
pages of a mapped one stay as long as anything of it, which would be a second copy of all weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rollout.policies.llada.quantization import Quantization, bitsandbytes_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The head is called like the down projection of a block: as an adapter's target, "ff_out" means the
# blocks' only.
HEAD = "transformer.ff_out"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; indexing reads it, as with the slices that transformers itself makes."""

    file: Path
    name: str

    def __getitem__(self, where: Any) -> Tensor:
        with safe_open(self.file, "pt", backend="pread") as opened:
            return opened.get_tensor(self.name)[where]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name; of the files, only their headers are read.

    Raises:
        ValueError: no weights, a file that is not there or not whole, an index that cannot be read or
            names a tensor that is not in its file.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
        names = _names(directory / WEIGHTS)
        return {name: StoredTensor(directory / WEIGHTS, name) for name in names}
    files = _weight_map(index)
    shards = sorted(set(files.values()))
    if lost := [shard for shard in shards if not (directory / shard).is_file()]:
        raise ValueError(
            f"{directory}: {len(lost)} of {len(shards)} files that {INDEX} names are missing: "
            f"{', '.join(lost[:4])}; fetch them again"
        )
    there = {shard: _names(directory / shard) for shard in shards}
    if lost := sorted(name for name, shard in files.items() if name not in there[shard]):
        raise ValueError(
            f"{directory}: {INDEX} names tensors that are not in their file: "
            f"{', '.join(f'{name} in {files[name]}' for name in lost[:4])}; fetch both again"
        )
    return {name: StoredTensor(directory / shard, name) for name, shard in files.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index} is no index of weights: {error!r}") from error


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is not whole ({error}); fetch it again") from error


def load_network(
    directory: Path, dtype: torch.dtype, device: str, quantization: Quantization | None
) -> Any:
    """The network on ``device``, its floating-point parameters in ``dtype``.

    Args:
        quantization: of the blocks' projections; their products are computed in ``dtype``.

    Raises:
        ValueError: see ``stored_tensors``; the tensors are not exactly the model's; quantisation is
            asked for and not installed.
    """
    from rollout.policies.llada.configuration import LLaDAConfig
    from rollout.policies.llada.modeling import LLaDAModelLM

    options: dict[str, Any] = {}
    if quantization is not None:
        kept = [f"model.{HEAD}"]
        options["quantization_config"] = bitsandbytes_config(quantization, dtype, kept)
    tensors: Any = stored_tensors(directory)
    loaded: Any = LLaDAModelLM.from_pretrained(
        None,
        config=LLaDAConfig.from_pretrained(directory),
        state_dict=tensors,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        **options,
    )
    network, report = loaded
    network.name_or_path = network.config.name_or_path = str(directory)
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise ValueError(f"{directory}: tensors missing or left over: {', '.join(wrong[:4])}")
    return network
