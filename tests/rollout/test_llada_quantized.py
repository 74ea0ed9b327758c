"""An 8-bit or 4-bit base: what is quantised, that only its adapter trains, and how far off it is."""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from test_llada_policy import batch, fill, logits, stock_logits
from torch import Tensor, nn

from cluster.engine import ObjectiveModule, TorchEngine
from cluster.weights import bind, pack, to_arrays
from recipes.check import check
from recipes.errors import RecipeError
from recipes.schema import LearnerConfig, OptimizerConfig, recipe_type
from recipes.source import load
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import BLOCK_LINEARS, LladaAdapter, LladaConfig, LladaPolicy
from rollout.policies.llada.pretraining import build_tokenizer, model_sizes
from rollout.policies.llada.quantization import Quantization, installed, quantized_bytes
from rollout.policies.llada.tokenizer import BOS, EOS, MASK

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
needs_package = pytest.mark.skipif(not installed(), reason="bitsandbytes is not installed")
without_package = pytest.mark.skipif(installed(), reason="bitsandbytes is installed")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of an embedded model's size, in bfloat16 and several files."""
    directory = tmp_path_factory.mktemp("llada")
    tokenizer = build_tokenizer("sudoku")
    ids = {"mask": MASK, "eos": EOS, "pad": EOS, "bos": BOS}
    tokens = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in ids.items()}
    model = LLaDAModelLM(LLaDAConfig(**model_sizes("sudoku"), **tokens))
    fill(dict(model.named_parameters()))
    model.bfloat16().save_pretrained(directory, max_shard_size="500KB")
    tokenizer.save_pretrained(directory)
    return directory


def build(checkpoint: Path, quantization: Quantization | None, **options: Any) -> LladaPolicy:
    options = {"dtype": "bfloat16", "lora": LladaAdapter(rank=4, alpha=8)} | options
    return LladaConfig(checkpoint=str(checkpoint), quantization=quantization, **options).build()


def move(policy: LladaPolicy) -> LladaPolicy:
    """Give the adapter a B that is not zero."""
    fill({name: p for name, p in policy.trainable().items() if "lora_B" in name})
    return policy


def linears(policy: LladaPolicy) -> dict[str, Any]:
    """The quantised layers by name, as bitsandbytes made them."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {n: m for n, m in policy.module.named_modules() if isinstance(m, kinds)}


def statistics(module: Any) -> list[Tensor]:
    """What a quantised layer holds beside its weights."""
    if hasattr(module.weight, "SCB"):
        held = [module.weight.SCB, module.state.SCB]
        return [next(tensor for tensor in held if tensor is not None)]
    state = module.weight.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def frozen(module: nn.Module) -> str:
    """A digest of all that does not train."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            data = parameter.detach().flatten().view(torch.uint8)
            digest.update(f"{name}{parameter.dtype}".encode() + data.numpy().tobytes())
    return digest.hexdigest()


def objective(policy: LladaPolicy, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of fixed tokens at the masks."""
    tokens, mask, where = batch(policy)
    targets = torch.arange(int(where.sum()), device=policy.device) + 10
    found = policy.logits(tokens, mask, where)[:, :300]
    return rows.sum() * nn.functional.cross_entropy(found, targets), {}


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative error in the norm."""
    return float((found - exact).norm() / exact.norm())


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_projections_are_quantised_and_nothing_else(
    checkpoint: Path, kind: Quantization
):
    policy = build(checkpoint, kind)
    names = {name.replace(".base_layer", "") for name in linears(policy)}
    blocks = range(model_sizes("sudoku")["n_layers"])
    assert names == {f"model.transformer.blocks.{i}.{n}" for i in blocks for n in BLOCK_LINEARS}
    packed = {"int8": torch.int8, "nf4": torch.uint8}[kind]
    for name, parameter in policy.module.named_parameters():
        own = torch.float32 if "lora_" in name else torch.bfloat16
        assert parameter.dtype == (packed if ".base_layer." in name else own), name
        assert parameter.requires_grad == ("lora_" in name)
    assert all("lora_" in name for name in policy.trainable())
    assert len(policy.trainable()) == 2 * len(names)


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_the_bytes_that_are_counted(checkpoint: Path, kind: Quantization):
    policy = build(checkpoint, kind)
    with torch.no_grad():
        policy.logits(*batch(policy))
    for module in linears(policy).values():
        held = module.weight.nbytes + sum(tensor.nbytes for tensor in statistics(module))
        assert held == quantized_bytes(kind, module.in_features, module.out_features)


def test_bytes_of_the_released_size():
    assert quantized_bytes("int8", 4096, 12288) == 4096 * 12288 + 4 * 12288
    # QLoRA: 4 bits, 8 for 64 weights and 32 for 64 times 256 of them are 4.127 bits a weight.
    assert 8 * quantized_bytes("nf4", 4096, 12288) / (4096 * 12288) == pytest.approx(
        4.127, abs=1e-3
    )


@needs_package
# Relative errors of random weights, whose rounding errors nothing corrects: measured 0.03 and 0.24.
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.005, 0.06), ("nf4", 0.1, 0.4)])
def test_logits_are_those_of_the_base_but_for_the_rounding(
    checkpoint: Path, kind: Quantization, least: float, most: float
):
    exact = logits(move(build(checkpoint, None)))
    found = logits(move(build(checkpoint, kind)))
    assert least < distance(found, exact) < most


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_are_bit_equal(checkpoint: Path, kind: Quantization):
    one, two = build(checkpoint, kind), build(checkpoint, kind)
    assert frozen(one.module) == frozen(two.module)
    assert torch.equal(logits(one), logits(two))


def dequantised(module: Any) -> Tensor:
    """The weights that a quantised layer stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = module.weight
    if hasattr(weight, "SCB"):
        return weight.data.float() * statistics(module)[0][:, None] / 127
    return dequantize_4bit(weight.data, weight.quant_state).float()


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_above_the_dequantised_weights_and_with_checkpointing_too(
    checkpoint: Path, kind: Quantization
):
    def gradient(policy: LladaPolicy) -> Tensor:
        objective(policy, torch.ones(1))[0].backward()
        assert all(p.grad is None for p in policy.module.parameters() if not p.requires_grad)
        found = [p.grad for p in policy.trainable().values()]
        return torch.cat([g.flatten() for g in found if g is not None])

    policy, full = move(build(checkpoint, kind)), build(checkpoint, None)
    recomputed = move(build(checkpoint, kind, gradient_checkpointing=True))
    bind(full.trainable(), pack(to_arrays(policy.trainable()), 1))
    for name, module in linears(policy).items():
        full.module.get_submodule(name).weight.data = dequantised(module).bfloat16()
    plain, exact = gradient(policy), gradient(full)
    assert len(exact) == len(plain) == 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))
    torch.testing.assert_close(plain, gradient(recomputed))
    assert distance(plain, exact) < 0.06
    assert distance(logits(policy), logits(full)) < 0.02


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_steps_train_the_adapter_and_leave_the_base(checkpoint: Path, kind: Quantization):
    policy = build(checkpoint, kind)
    before, base = frozen(policy.module), logits(policy)
    engine = TorchEngine(ObjectiveModule(policy, SimpleNamespace(loss=objective)), OPTIMIZER)  # pyright: ignore[reportArgumentType]
    losses: list[float] = []
    for _ in range(6):
        loss, _ = engine.forward(torch.ones(1))
        engine.backward(loss, last=True)
        engine.step(1e-2)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert frozen(policy.module) == before
    assert not torch.allclose(logits(policy), base, atol=0.1)
    with policy.reference():
        assert torch.equal(logits(policy), base)


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_the_adapter_and_it_binds(checkpoint: Path, kind: Quantization):
    learner, worker = move(build(checkpoint, kind)), build(checkpoint, kind)
    arrays = to_arrays(learner.trainable())
    assert all("lora_" in name for name in arrays)
    assert bind(worker.trainable(), pack(arrays, 1)) == 56
    assert torch.equal(logits(worker), logits(learner))


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_goes_onto_the_stock_base(
    checkpoint: Path, tmp_path: Path, kind: Quantization
):
    policy = move(build(checkpoint, kind))
    policy.save(tmp_path, policy.trainable())
    base = LLaDAModelLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = stock_logits(base, policy)
    adapted = stock_logits(PeftModel.from_pretrained(base, tmp_path), policy)
    full = build(checkpoint, None, dtype="float32")
    bind(full.trainable(), pack(to_arrays(policy.trainable()), 1))
    exact = logits(full)
    torch.testing.assert_close(adapted, exact, rtol=0, atol=1e-3)
    assert distance(plain, exact) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_without_an_adapter_are_refused(kind: Quantization):
    with pytest.raises(ValidationError, match=f"{kind} weights do not train; give lora"):
        LladaConfig(quantization=kind)


def problems(*overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as refused:
        check(load(Path("sudoku/spg_dipod"), recipe_type, overrides), gpus=0)
    return [(problem.key, problem.message) for problem in refused.value.problems]


def test_stage_3_is_refused_above_a_quantised_base():
    found = problems("policy.lora={}", "policy.quantization=nf4", "learner.zero_stage=3")
    assert any(key == "learner.zero_stage" and "cannot be sharded" in m for key, m in found)
    check(load(Path("sudoku/spg_dipod"), recipe_type, ["learner.zero_stage=3"]), gpus=0)


@without_package
def test_a_missing_package_is_named_with_what_installs_it(checkpoint: Path):
    (found,) = problems("policy.lora={}", "policy.quantization=int8")
    assert found[0] == "policy.quantization"
    assert "pip install 'rectify[quantization]'" in found[1]
    with pytest.raises(ValueError, match="quantization int8 needs the package bitsandbytes"):
        build(checkpoint, "int8")


def train_rank(checkpoint: Path, kind: Quantization, stage: int, rank: int, port: int) -> Any:
    """Losses, digests before and after, and names that train, on one of two ranks."""
    from cluster.deepspeed_engine import DeepSpeedEngine, join_group

    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, gpu=False)
    policy = build(checkpoint, kind, gradient_checkpointing=True)
    before = frozen(policy.module)
    module: Any = ObjectiveModule(policy, SimpleNamespace(loss=objective))  # pyright: ignore[reportArgumentType]
    learner = LearnerConfig.model_validate({"ranks": 2, "zero_stage": stage})
    return *train(DeepSpeedEngine(module, OPTIMIZER, learner), 0.5), before, frozen(policy.module)


def train(engine: Any, share: float) -> tuple[list[float], list[str]]:
    """Whole losses of four steps with this share of them, and the names that train."""
    losses: list[float] = []
    for _ in range(4):
        loss, _ = engine.forward(torch.full((1,), share))
        losses.append(float(loss.detach()) / share)
        engine.backward(loss, last=True)
        engine.step(1e-2)
    return losses, list(engine.weights())


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_leaves_the_base_and_trains_as_the_plain_engine(
    checkpoint: Path, kind: Quantization, stage: int
):
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(train_rank, checkpoint, kind, stage, rank, port) for rank in range(2)]
        found = [rank.result(timeout=240) for rank in ranks]
    policy = build(checkpoint, kind, gradient_checkpointing=True)
    module: Any = ObjectiveModule(policy, SimpleNamespace(loss=objective))  # pyright: ignore[reportArgumentType]
    losses, names = train(TorchEngine(module, OPTIMIZER), 1.0)
    for own, trained, before, after in found:
        assert own == pytest.approx(losses, rel=2e-2)
        assert trained == names == list(policy.trainable())
        assert before == after == frozen(policy.module)
