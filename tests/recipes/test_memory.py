"""Memory estimates against what is really counted, saved and alive."""

from __future__ import annotations

import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.engine import ObjectiveModule, TorchEngine
from recipes.memory import ModelSize, learner_memory, state_memory, worker_memory
from recipes.schema import LearnerConfig, OptimizerConfig
from rl.text_batches import TextBatch, token_log_probs
from rollout.draws import Prompt, groups_for
from rollout.masked import DecodePlan, MaskedSampler, MaskedSamplerConfig
from rollout.policies.adapters import set_trainable
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import BLOCK_LINEARS, HEAD, LladaAdapter, LladaConfig
from rollout.policies.llada.pretraining import build_tokenizer
from rollout.policies.llada.tokenizer import BOS, EOS, MASK

RELEASED = ModelSize(4096, 32, 32, 32, 12288, 126464)
SMALL = ModelSize(128, 4, 4, 4, 384, 384)
DEEP = ModelSize(64, 4, 4, 8, 192, 384)
WORDY = ModelSize(64, 4, 2, 2, 128, 8192)
ALL = (8, BLOCK_LINEARS)
ROWS, PROMPT, LENGTH = 6, 40, 24


def config_of(size: ModelSize, **tokens: int) -> LLaDAConfig:
    sizes = vars(size)
    return LLaDAConfig(**sizes, vocab_size=size.embedding_size, max_sequence_length=512, **tokens)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSize], Path]:
    """Directories with random weights of a size, each made once."""
    tokenizer = build_tokenizer("sudoku")
    ids = {"mask": MASK, "eos": EOS, "pad": EOS, "bos": BOS}
    tokens = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in ids.items()}
    made: dict[ModelSize, Path] = {}

    def make(size: ModelSize) -> Path:
        if size not in made:
            made[size] = tmp_path_factory.mktemp("llada")
            LLaDAModelLM(config_of(size, **tokens)).save_pretrained(made[size])
            tokenizer.save_pretrained(made[size])
        return made[size]

    return make


def policy_of(directory: Path, lora: Any, dtype: str, checkpointing: bool = False) -> Any:
    adapter = lora and LladaAdapter(rank=lora[0], alpha=8, targets=lora[1])
    return LladaConfig(
        checkpoint=str(directory), lora=adapter, dtype=dtype, gradient_checkpointing=checkpointing
    ).build()


def batch(scored: int = LENGTH) -> TextBatch:
    """The last places are scored; a row is padded."""
    tokens = torch.arange(ROWS * (PROMPT + LENGTH)).view(ROWS, 1, -1) % 300
    mask = torch.ones(ROWS, PROMPT + LENGTH, dtype=torch.int64)
    mask[0, :3] = 0
    one = torch.ones(ROWS)
    return TextBatch(
        tokens=tokens,
        attention_mask=mask,
        scored=(torch.arange(LENGTH) >= LENGTH - scored).expand(ROWS, 1, -1),
        scale=one[:, None],
        targets=tokens[:, 0, -LENGTH:],
        lengths=one * LENGTH,
        advantages=one,
        weights=one,
        distillation=one,
    )


def estimate(
    size: ModelSize, lora: Any, dtype: str, checkpointing: bool = False, scored: int = LENGTH
) -> dict[str, int]:
    return learner_memory(
        size, lora=lora, dtype=dtype, zero_stage=0, ranks=1, micro_batch=ROWS,
        tokens=PROMPT + LENGTH, gradient_checkpointing=checkpointing, scored_tokens=scored,
    )  # fmt: skip


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; ``known`` ones don't count."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.kept = [tensor.untyped_storage() for tensor in known]
        self.known = {storage._cdata for storage in self.kept}
        self.references: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.references:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.references[key]

        self.now += size
        self.references[key] = weakref.ref(storage, gone)


def test_importing_takes_no_torch():
    code = "import sys, recipes.memory; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


@pytest.mark.parametrize(
    "size",
    [RELEASED, SMALL, WORDY, ModelSize(96, 6, 3, 3, 200, 500)],
    ids=["8B", "small", "wordy", "grouped"],
)
def test_parameters_are_those_of_the_network(size: ModelSize):
    with torch.device("meta"):
        network = LLaDAModelLM(config_of(size))
    assert size.parameters() == sum(p.numel() for p in network.parameters())
    assert ModelSize.of(network.config.to_dict()) == size


def test_the_released_size_has_its_published_counts():
    assert ModelSize.of(LLaDAConfig().to_dict()) == RELEASED
    assert RELEASED.parameters() == 8_015_581_184
    assert RELEASED.lora_parameters(128, BLOCK_LINEARS) == 335_544_320


def test_left_out_sizes_are_the_others():
    sizes = {"d_model": 64, "n_heads": 4, "n_kv_heads": None, "n_layers": 1}
    size = ModelSize.of({**sizes, "mlp_hidden_size": 96, "vocab_size": 50, "embedding_size": None})
    assert (size.n_kv_heads, size.kv_width, size.embedding_size) == (4, 64, 50)


@pytest.mark.parametrize(
    "targets",
    [BLOCK_LINEARS, ("q_proj", "v_proj"), ("ff_out",), ("1.k_proj", "up_proj"), ("proj",)],
)
def test_adapter_parameters_are_those_of_peft(targets: tuple[str, ...]):
    size = ModelSize(96, 6, 3, 12, 200, 500)
    if targets == ("proj",):
        assert size.lora_parameters(4, targets) == 0
        return
    with torch.device("meta"):
        adapter = LladaAdapter(rank=4, targets=targets)
        network = set_trainable(
            LLaDAModelLM(config_of(size)), adapter, "bfloat16", "here", 0, exclude=[HEAD]
        )
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert size.lora_parameters(4, targets) == trained > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lora",
    [None, ALL, (4, ("q_proj", "v_proj")), (4, ("ff_out",))],
    ids=["all", "seven", "qv", "down"],
)
def test_activations_are_what_autograd_saves(checkpoints: Any, lora: Any, dtype: str):
    policy = policy_of(checkpoints(SMALL), lora, dtype)
    own = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = token_log_probs(policy, batch())
    assert result.requires_grad
    memory = estimate(SMALL, lora, dtype)
    # Of the logits' three rows, the log-softmax is there before the backward pass.
    counted = memory["activations"] + memory["logits"] / 3
    assert counted == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.03)


def backward_peak(policy: Any, scored: int) -> int:
    """Bytes alive at the widest place of a forward and backward pass, gradients apart."""
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    with Alive([*parameters, *gradients]) as alive:
        token_log_probs(policy, batch(scored)).sum().backward()
    assert any(gradient.any() for gradient in gradients)
    return alive.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, ALL], ids=["all", "seven"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_is_alive(
    checkpoints: Any, lora: Any, dtype: str, checkpointing: bool
):
    peak = backward_peak(policy_of(checkpoints(SMALL), lora, dtype, checkpointing), scored=2)
    memory = estimate(SMALL, lora, dtype, checkpointing, scored=2)
    assert memory["activations"] + memory["logits"] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_three_rows_of_the_vocabulary(checkpoints: Any, dtype: str):
    peak = backward_peak(policy_of(checkpoints(WORDY), ALL, dtype), scored=LENGTH)
    memory = estimate(WORDY, ALL, dtype)
    assert memory["logits"] == 3 * 4 * ROWS * LENGTH * WORDY.embedding_size > 0.7 * peak
    assert memory["activations"] + memory["logits"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, ALL], ids=["all", "seven"])
@pytest.mark.parametrize(("cache", "guidance"), [("none", 1.0), ("none", 2.0), ("dual", 1.0)])
@pytest.mark.parametrize("size", [DEEP, WORDY], ids=["deep", "wordy"])
def test_decoding_peaks_where_it_is_said_to(
    checkpoints: Any, size: ModelSize, lora: Any, dtype: str, cache: Any, guidance: float
):
    rows, width = 16, 8
    policy = policy_of(checkpoints(size), lora, dtype)
    config = MaskedSamplerConfig(
        length=2 * width, block_length=width, steps=2, cache=cache, guidance_scale=guidance
    )
    group = groups_for([Prompt("0", "solve 12", {})], seed=0, step=0, count=1, size=rows)
    tokens = len(policy.encode([group[0].prompt])[0]) + 2 * width
    with Alive(policy.module.parameters()) as alive:
        MaskedSampler(config, policy).sample(group, [DecodePlan()])
    memory = worker_memory(
        size, lora=lora, dtype=dtype, batch=rows, tokens=tokens, block=width, cache=cache,
        guidance=guidance,
    )  # fmt: skip
    assert ("kv" in memory) == (cache != "none")
    together = max(memory["activations"], memory["logits"]) + memory.get("kv", 0)
    assert together == pytest.approx(alive.peak, rel=0.15)


def test_a_step_holds_what_stage_0_says(checkpoints: Any):
    policy = policy_of(checkpoints(SMALL), ALL, "bfloat16")
    algorithm: Any = SimpleNamespace(
        loss=lambda policy, batch: (token_log_probs(policy, batch).sum(), {})
    )
    engine = TorchEngine(ObjectiveModule(policy, algorithm), OptimizerConfig())
    loss, _ = engine.forward(batch())
    engine.backward(loss, last=True)
    parameters = list(policy.module.parameters())
    memory = estimate(SMALL, ALL, "bfloat16")
    assert memory["parameters"] == sum(p.nbytes for p in parameters)
    assert memory["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    engine.step(1e-4)
    assert memory["optimiser"] == sum(t.nbytes for t in engine.moments().values())
    assert memory["average"] == sum(t.float().nbytes for t in engine.weights().values())


def test_shards_add_up_to_the_whole():
    trained, frozen = 1_000_003, 7_000_001
    for ranks in (1, 2, 8):
        for stage in range(4):
            state = state_memory(frozen, 2, trained, stage, ranks, gpu=False, reference=False)
            at_most = 4 * (ranks - 1)
            if stage == 3:
                whole = ranks * state["parameters"]
                assert 0 <= whole - (2 * frozen + 4 * trained) <= 3 * at_most
            else:
                assert state["parameters"] == 2 * frozen + 4 * trained
            copies = {0: 2 * ranks, 1: 3, 2: 3, 3: 2}[stage]
            assert 0 <= ranks * state["optimiser"] - copies * 4 * trained <= copies * at_most
            gradients = state["gradients"] * (ranks if stage >= 2 else 1)
            assert 0 <= gradients - 4 * trained <= at_most
            assert state["average"] == 4 * trained


def test_a_bucket_has_its_size_on_a_gpu_and_what_is_written_on_a_cpu():
    small = {"width": 2, "trained": 1000, "ranks": 1, "reference": False}
    assert state_memory(5000, **small, zero_stage=1, gpu=True)["buffers"] == 2_000_000_000
    assert state_memory(5000, **small, zero_stage=1, gpu=False)["buffers"] == 4000
    assert state_memory(5000, **small, zero_stage=0, gpu=True)["buffers"] == 0


def test_a_reference_is_a_copy_only_where_all_trains():
    def parameters(frozen: int, reference: bool) -> int:
        return state_memory(frozen, 2, 1000, 1, 2, gpu=True, reference=reference)["parameters"]

    assert parameters(0, True) == 2 * parameters(0, False) == 8000
    assert parameters(5000, True) == parameters(5000, False) == 14000


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def rank_peaks(stage: int, rank: int, ranks: int, port: int) -> tuple[int, int]:
    """Bytes that a real engine holds after two steps, and at the peak of a later backward pass."""
    from cluster.deepspeed_engine import DeepSpeedEngine, join_group

    torch.set_num_threads(1)
    join_group(rank, ranks, "127.0.0.1", port, gpu=False)
    with Alive() as alive:
        network = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(48)])
        for layer in network[:16]:
            layer.requires_grad_(False).bfloat16()
        algorithm: Any = SimpleNamespace(loss=lambda policy, x: (policy(x).square().mean(), {}))

        class Mixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return network(x).float()

        module = ObjectiveModule(SimpleNamespace(module=network), algorithm)  # pyright: ignore
        module._bound = (Mixed(), algorithm)  # pyright: ignore
        learner = LearnerConfig(ranks=ranks, zero_stage=stage)  # pyright: ignore
        engine = DeepSpeedEngine(module, OptimizerConfig(), learner)
