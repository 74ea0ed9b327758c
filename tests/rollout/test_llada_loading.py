"""A sharded checkpoint is read a tensor at a time, in its final type, and refused if it is not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llada_model import RELEASED, SMALL, small

from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.loading import INDEX, StoredTensor, load_network, stored_tensors
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import LladaConfig

LOST = "model.transformer.blocks.1.up_proj.weight"
MIB = 2**20


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small bfloat16 weights in the released layout, in several files; treat as read-only."""
    directory = tmp_path_factory.mktemp("released")
    small().bfloat16().save_pretrained(directory, max_shard_size="20KB")
    (directory / "config.json").write_text(json.dumps(RELEASED | SMALL))
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    return directory


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Path:
    """One that may be broken."""
    return shutil.copytree(released, tmp_path / "copied")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_file_is_read_into_the_type_asked_for(released: Path, dtype: torch.dtype):
    network = load_network(released, dtype, "cpu", None)
    assert type(network) is LLaDAModelLM
    stored = {name: value[...] for name, value in stored_tensors(released).items()}
    assert len(stored) == len(network.state_dict()) == 21
    for name, value in network.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, stored[name].to(dtype)), name
    assert network.name_or_path == str(released)


def test_a_bfloat16_base_is_never_in_fp32(released: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[torch.Tensor] = []
    index = StoredTensor.__getitem__

    def spy(self: StoredTensor, where: Any) -> torch.Tensor:
        read.append(index(self, where))
        return read[-1]

    monkeypatch.setattr(StoredTensor, "__getitem__", spy)
    network = load_network(released, torch.bfloat16, "cpu", None)
    assert len(read) == 21
    # What was read is what the network holds: there was nothing in between.
    held = {p.data_ptr() for p in network.parameters()}
    assert {tensor.data_ptr() for tensor in read} == held
    assert {tensor.dtype for tensor in read} == {torch.bfloat16}


def test_a_missing_file_is_named(copied: Path):
    files = sorted(copied.glob("*.safetensors"))
    files[1].unlink()
    expected = rf"1 of {len(files)} files that {INDEX} names are missing: {files[1].name}; fetch"
    with pytest.raises(ValueError, match=expected):
        load_network(copied, torch.bfloat16, "cpu", None)
    with pytest.raises(ValueError, match=expected):
        LladaConfig(checkpoint=str(copied)).linear_names()


def test_an_index_that_names_what_its_file_has_not_is_refused(copied: Path):
    file = json.loads((copied / INDEX).read_text())["weight_map"][LOST]
    tensors = load_file(copied / file)
    del tensors[LOST]
    save_file(tensors, copied / file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"not in their file: {LOST} in {file}; fetch both"):
        stored_tensors(copied)


def test_an_index_that_leaves_a_tensor_out_is_not_the_model(copied: Path):
    index = json.loads((copied / INDEX).read_text())
    del index["weight_map"][LOST]
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"tensors missing or left over: {LOST}"):
        load_network(copied, torch.bfloat16, "cpu", None)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_an_index_that_cannot_be_read_is_refused(copied: Path, text: str):
    (copied / INDEX).write_text(text)
    with pytest.raises(ValueError, match="is no index of weights"):
        stored_tensors(copied)


def test_a_file_that_was_cut_short_is_named(copied: Path):
    file = sorted(copied.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{file.name} is not whole .*; fetch it again"):
        stored_tensors(copied)


def test_a_directory_without_weights_is_refused(released: Path, tmp_path: Path):
    shutil.copy(released / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        stored_tensors(tmp_path)


MEASURE = """
import sys
from pathlib import Path
import torch
import peft, transformers
from rollout.policies.llada.loading import load_network
from rollout.policies.llada.modeling import LLaDAModelLM

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

directory, small, dtype = sys.argv[1:]
load_network(Path(small), torch.bfloat16, "cpu", None)  # what a first call keeps for ever
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
network = load_network(Path(directory), getattr(torch, dtype), "cpu", None)
print(sum(p.nbytes for p in network.parameters()), status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_beside_the_weights_there_is_no_more_than_a_shard(
    released: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
):
    sizes = {"d_model": 1024, "n_layers": 8, "mlp_hidden_size": 3072, "embedding_size": 4096}
    config = LLaDAConfig(**(SMALL | sizes | {"n_heads": 8, "n_kv_heads": 8}))
    network = LLaDAModelLM(config).to(stored)
    network.save_pretrained(tmp_path, max_shard_size="60MB")
    count = sum(p.numel() for p in network.parameters())
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 4 and max(shards) < 60e6
    command = [sys.executable, "-c", MEASURE, tmp_path, released, str(dtype).split(".")[1]]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    weights, grown = map(int, result.stdout.split()[-2:])
    assert weights == torch.finfo(dtype).bits // 8 * count
    assert weights - MIB < grown < weights + 1.5 * max(shards)
