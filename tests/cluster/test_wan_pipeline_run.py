"""A text-to-video pipeline through a whole local run: prompts from a file, a reward, a checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cluster.engine import ObjectiveModule
from cluster.launch import run_locally
from cluster.run import describe
from cluster.sample import open_checkpoint
from recipes.check import check
from recipes.errors import RecipeError
from recipes.memory import plan
from recipes.schema import LearnerConfig, OptimizerConfig, Recipe
from recipes.source import load
from rollout.policies.adapters import LoraAdapter
from rollout.policies.wan import WanConfig
from tests.rollout.tiny_wan import stock, write_pipeline

SIZES = "height: 32, width: 16, frames: 5, lora: {rank: 4, alpha: 8}"
OPTIMIZER = OptimizerConfig(weight_decay=0.0, clip_norm=1e9)
SETTINGS = [
    "steps=1",
    "rewards=[{kind: function, path: 'tests.cluster.test_wan_pipeline_run:redness', name: red}]",
    "rollout.steps=4",
    "rollout.guidance_scale=5.0",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "rollout.batch_size=8",
    "learner.micro_batch=4",
    "optimizer.learning_rate=0.01",
    "evaluation.every=1",
    "evaluation.samples=2",
    "evaluation.rewards=[]",
    "checkpoints.every=1",
    "checkpoints.keep_best=null",
    "tracking=[]",
]


def redness(prompts: list[str], completions: list[np.ndarray], **columns: Any) -> list[float]:
    """Mean red of videos uint8 (frames, height, width, 3)."""
    assert all(media.shape == (5, 32, 16, 3) for media in completions)
    return [float(media[..., 0].mean()) for media in completions]


def recipe(tmp_path: Path, directory: Path, *overrides: str) -> Any:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat runs over grass\na dog walks\nsnow\nthe dog runs .\n")
    own = [
        f"policy={{kind: wan, checkpoint: '{directory}', {SIZES}}}",
        f"prompts={{kind: file, path: '{prompts}'}}",
        f"run_dir={tmp_path}",
    ]
    return load(Path("digits/flash_grpo"), Recipe, [*SETTINGS, *own, *overrides])


def test_a_pipeline_trains_on_prompts_of_a_file(tmp_path: Path):
    directory = write_pipeline(tmp_path / "wan", two=True)
    loaded = recipe(tmp_path, directory)
    check(loaded, gpus=0)
    (tmp_path / "run").mkdir()
    describe(tmp_path / "run", loaded.value, loaded.value.prompts.load())
    run_locally(loaded.value, tmp_path / "run", Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    kinds = [row["kind"] for row in rows]
    assert "train" in kinds and "evaluation" in kinds
    saved = tmp_path / "run" / "checkpoints" / "step_000001" / "policy"
    pipeline = stock(directory)
    pipeline.load_lora_weights(saved)
    pipeline.load_lora_weights(saved / "transformer_2", load_into_transformer_2=True)
    source = open_checkpoint(saved.parent)
    networks: Any = source.policy.module
    for name in ("transformer", "transformer_2"):
        theirs = {k: v for k, v in getattr(pipeline, name).named_parameters() if "lora_B" in k}
        mine = {k: v for k, v in networks[name].named_parameters() if "lora_B" in k}
        values = list(zip(theirs.values(), mine.values(), strict=True))
        assert len(values) == 16 and all(torch.equal(a, b) for a, b in values)
    assert max(p.abs().max() for k, p in networks.named_parameters() if "lora_B" in k) > 0


def test_a_published_pipeline_is_allowed_before_it_is_here(tmp_path: Path):
    loaded = recipe(tmp_path, Path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    check(loaded, gpus=0)
    assert plan(loaded.value)["rollout actor"]["parameters"].startswith("5.30 GiB")


def test_a_plan_counts_both_transformers_and_stage_three_is_refused(tmp_path: Path):
    rows = {}
    for two in (False, True):
        directory = write_pipeline(tmp_path / str(two), two=two)
        loaded = recipe(tmp_path, directory, "learner.zero_stage=3", "rl.kl_coefficient=0")
        rows[two] = float(plan(loaded.value)["rollout actor"]["parameters"].split()[0])
        try:
            check(loaded, gpus=0)
        except RecipeError as error:
            assert two and "learner.zero_stage: micro-batches use one of two" in str(error)
        else:
            assert not two
    assert abs(rows[True] - 2 * rows[False]) < 0.02


def perturbed(directory: Path, checkpointing: bool) -> Any:
    """Two transformers whose adapters change something."""
    policy = WanConfig(
        checkpoint=str(directory),
        height=32,
        width=16,
        frames=5,
        lora=LoraAdapter(rank=4),
        gradient_checkpointing=checkpointing,
    ).build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def one_sided(policy: Any, rank: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """A loss of which rank 0 needs the first transformer only, and rank 1 the second."""
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(rank))
    t = torch.full((2,), (0.9, 0.2)[rank])
    return policy.velocity(x, t, policy.encode(["a cat", "a dog"])).square().mean(), {}


def rank_step(directory: Path, rank: int, port: int) -> tuple[float, dict[str, np.ndarray]]:
    """Gradient norm and weights of a rank of the real engine after a step at ZeRO stage 2."""
    from cluster.deepspeed_engine import DeepSpeedEngine, join_group

    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, gpu=False)
    algorithm: Any = SimpleNamespace(loss=one_sided)
    module = ObjectiveModule(perturbed(directory, checkpointing=True), algorithm)
    engine = DeepSpeedEngine(module, OPTIMIZER, LearnerConfig(ranks=2, zero_stage=2))
    loss, _ = engine.forward(rank)
    engine.backward(loss / 2, True)
    norm = engine.step(1e-3)
    return norm, {name: weight.numpy() for name, weight in engine.weights().items()}


@pytest.mark.slow
def test_ranks_that_use_another_transformer_each_add_up_right(tmp_path: Path):
    directory = write_pipeline(tmp_path / "wan", two=True)
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(rank_step, directory, rank, port) for rank in range(2)]
        found = [rank.result(timeout=120) for rank in ranks]
    whole = perturbed(directory, checkpointing=False)
    trained = whole.trainable()
    for rank in range(2):
        (one_sided(whole, rank)[0] / 2).backward()
    gradients = [p.grad for p in trained.values()]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    optimizer.step()
    for norm, weights in found:
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-5)
        for mine, theirs in zip(trained.values(), weights.values(), strict=True):
            np.testing.assert_allclose(theirs, mine.detach().numpy(), rtol=0, atol=1e-5)
