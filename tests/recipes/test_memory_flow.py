"""The plan of a flow policy that learns from rewards, against what its processes really hold."""

from __future__ import annotations

import gc
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.rank import LearnerRank
from recipes.alive import Alive
from recipes.memory import plan, readable
from recipes.memory_flow import flow_memory
from recipes.memory_state import REDUCE_BUCKET
from recipes.schema import Recipe
from recipes.source import load
from rl.catalogue import build_algorithm
from rl.items import Item
from rollout.draws import groups_for
from rollout.flow_sampler import FlowSampler
from tests.rollout import tiny_wan, tiny_z_image

SMALL = [
    "steps=2",
    "rollout.steps=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.batch_size=8",
    "learner.micro_batch=8",
    "evaluation.rewards=[]",
    "tracking=[]",
]
LONG = "a dog walks over snow " * 120
LORA = "{rank: 4, alpha: 8}"


def pipelines(directory: Path) -> dict[str, str]:
    """Policies of small pipelines and of the embedded model."""
    wan = tiny_wan.write_pipeline(directory / "wan")
    z_image = tiny_z_image.write_pipeline(directory / "z_image")
    return {
        "digits": "kind: wan, checkpoint: digits",
        "wan": f"kind: wan, checkpoint: '{wan}', height: 64, width: 64, frames: 9",
        "z_image": f"kind: z_image, checkpoint: '{z_image}', height: 128, width: 128",
    }


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pipelines(tmp_path_factory.mktemp("pipelines"))


def recipe_of(policy: str, *overrides: str) -> Recipe:
    prompts = "prompts={kind: digits}"
    if "digits" not in policy:
        # A plan is of the longest text.
        file = Path(policy.split("'")[1]) / "prompts.txt"
        file.write_text("".join(f"{n} {LONG}\n" for n in range(4)))
        prompts = f"prompts={{kind: file, path: '{file}'}}"
    own = [f"policy={{{policy}}}", prompts, "rewards=[{kind: ink}]"]
    return load(Path("digits/flash_grpo"), Recipe, [*SMALL, *own, *overrides]).value


def items(recipe: Recipe, policy: Any) -> list[Item]:
    """An optimiser step of real transitions."""
    algorithm = build_algorithm(recipe.rl, recipe.rollout, recipe.seed)
    groups = groups_for(recipe.prompts.load(), seed=0, step=0, count=2, size=4)
    rollouts = FlowSampler(recipe.rollout, policy).sample(groups, algorithm.plans(0, groups))
    generator = np.random.default_rng(0)
    return [
        Item(r.replay, len(r.replay.x), r.group.prompt, generator.normal(size=4),
             np.full(4, 1 / 8), np.zeros(4), 0)
        for r in rollouts
    ]  # fmt: skip


def placed(found: list[Item]) -> tuple[list[Item], list[Any]]:
    from dataclasses import replace

    return [replace(item, replay=i) for i, item in enumerate(found)], [i.replay for i in found]


CASES = pytest.mark.parametrize(
    ("name", "lora", "again", "dtype", "guidance"),
    [
        ("digits", "null", False, "float32", 1.0),
        ("digits", LORA, True, "float32", 2.0),
        ("wan", "null", True, "float32", 5.0),
        ("wan", LORA, False, "bfloat16", 5.0),
        ("wan", LORA, True, "bfloat16", 1.0),
        ("z_image", "null", False, "float32", 1.0),
        ("z_image", LORA, False, "float32", 5.0),
        ("z_image", LORA, True, "bfloat16", 5.0),
    ],
)


def described(policies: Any, name: str, lora: str, again: bool, dtype: str, guidance: float) -> Any:
    return recipe_of(
        policies[name],
        f"policy.lora={lora}",
        f"policy.gradient_checkpointing={str(again).lower()}",
        f"policy.dtype={dtype}",
        f"rollout.guidance_scale={guidance}",
        "learner.zero_stage=0",
    )


@CASES
def test_a_rank_holds_what_its_plan_says(
    policies: Any, name: str, lora: str, again: bool, dtype: str, guidance: float
):
    recipe = described(policies, name, lora, again, dtype, guidance)
    rank = LearnerRank(recipe.model_dump_json(), 0, "cpu", 1, "torch")
    found, replays = placed(items(recipe, rank.policy))
    trained = rank.policy.trainable()
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    known = [*rank.policy.module.parameters(), *rank.trained.averaged.values()]
    known += [p.grad for p in trained.values() if p.grad is not None]
    with Alive(known) as alive:
        for batch in rank._batches(found, 1, replays):
            rank.engine.forward(batch)[0].backward()
    memory = flow_memory(recipe, recipe.policy)["learner rank"]
    assert memory["activations"] == pytest.approx(alive.peak, rel=0.2)
    assert memory["parameters"] == sum(p.nbytes for p in rank.policy.module.parameters())
    assert memory["gradients"] == memory["average"] == sum(p.nbytes for p in trained.values())
    if name != "digits":
        parts = [rank.policy._embeddings._encoder, rank.policy._vae]  # pyright: ignore
        assert memory["text encoder, VAE"] == sum(
            p.nbytes for part in parts for p in part.parameters()
        )


@CASES
def test_an_actor_holds_what_its_plan_says(
    policies: Any, name: str, lora: str, again: bool, dtype: str, guidance: float
):
    recipe = described(policies, name, lora, again, dtype, guidance)
    policy: Any = recipe.policy.build()
    x, t = torch.randn(8, *policy.latent_shape), torch.full((8,), 0.5)
    # The longest text, as a plan has it; prompts are known beforehand.
    text = LONG if name != "digits" else "a handwritten 3"
    condition = policy.encode([text] * 8)
    policy.encode_null(8)
    peaks: list[int] = []
    for _ in range(2):  # the first may also see what a library makes once
        with Alive([x, t, condition, *policy.module.parameters()]) as alive, torch.no_grad():
            policy.guided_velocity(x, t, condition, guidance)
        peaks.append(alive.peak)
    memory = flow_memory(recipe, recipe.policy)["rollout actor"]
    assert memory["activations"] == pytest.approx(min(peaks), rel=0.2)


def test_a_plan_is_shown_in_words_with_its_total(policies: Any):
    recipe = recipe_of(policies["z_image"], f"policy.lora={LORA}")
    rows, memory = plan(recipe), flow_memory(recipe, recipe.policy)
    for process in ("learner rank", "rollout actor"):
        assert rows[process]["total"] == readable(sum(memory[process].values()))
    kept = recipe_of(policies["z_image"], f"policy.lora={LORA}", "rl={kind: nft}")
    average = flow_memory(kept, kept.policy)["learner rank"]["average"]
    assert average == 2 * memory["learner rank"]["average"]


def rank_bytes(recipe_json: str, rank: int, port: int) -> int:
    """Bytes of a rank of the real engine at its peak, in its second optimiser step."""
    from cluster.deepspeed_engine import join_group

    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, gpu=False)
    learner = LearnerRank(recipe_json, rank, "cpu", 1, "deepspeed")
    policy = learner.recipe.policy.build(seed=0)
    found, replays = placed(items(learner.recipe, policy))
    del policy
    gc.collect()
    held = [o for o in gc.get_objects() if isinstance(o, Tensor) and o.device.type == "cpu"]
    storages = {s._cdata: s.nbytes() for s in map(Tensor.untyped_storage, held)}
    with Alive(held) as alive:
        learner.update([found], [1], *replays)
        alive.peak = alive.now
        learner.update([found], [1], *replays)
    return sum(storages.values()) + alive.peak


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("lora", "again"), [("null", False), ("null", True), (LORA, True)])
def test_deepspeed_ranks_hold_what_their_plan_says(stage: int, lora: str, again: bool):
    recipe = recipe_of(
        "kind: wan, checkpoint: digits",
        f"policy.lora={lora}",
        f"policy.gradient_checkpointing={str(again).lower()}",
        f"learner.zero_stage={stage}",
        "learner.ranks=2",
        "learner.micro_batch=64",
        "rl.kl_coefficient=0",
    )
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    text = recipe.model_dump_json()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(rank_bytes, text, rank, port) for rank in range(2)]
        counted = [rank.result(timeout=240) for rank in ranks]
    memory = flow_memory(recipe, recipe.policy)["learner rank"]
    # On a CPU only the pages of the bucket that gradients were written to are memory.
    trained = memory["average"]
    unwritten = 4 * REDUCE_BUCKET - trained if stage else 0
    assert max(counted) - unwritten == pytest.approx(sum(memory.values()), rel=0.2)
