"""Memory and shapes of distillations against what is really counted, saved and alive."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from cluster.distill_rank import DistillRank
from cluster.workers import sampler_of
from distill.catalogue import teacher_plan
from distill.compression import ConditionedBatch
from distill.two_step import TwoStepBatch
from recipes import memory_flow
from recipes.alive import Alive
from recipes.memory import plan, readable
from recipes.memory_distill import distillation_memory, networks
from recipes.memory_flow import Forward
from recipes.memory_state import state_memory
from recipes.schema import DistillRecipe
from recipes.shapes import shapes
from recipes.source import load
from rollout.draws import groups_for
from rollout.policies.adapters import LoraAdapter
from rollout.policies.wan import WanConfig

RECIPE = Path("wan-1.3b/two_step")
SMALL, LARGE = (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in ("1.3B", "14B"))
# 160 tokens of a sample; the ratio of ffn to width is that of the published model.
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 140,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
LATENT, ROWS, WORDS = (3, 2, 20, 16), 4, 2
ATTENTION = LoraAdapter(rank=5, alpha=4)
OTHERS = LoraAdapter(
    rank=5, alpha=4, targets=("attn1.to_q", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DistillRecipe]:
    """The packaged two-step recipe on a small random Wan, with ``--set`` overrides."""
    directory = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    WanTransformer3DModel(**CONFIG).save_pretrained(directory / "transformer")
    words = [[str(n) for n in range(10)], ["left", "right", "up", "down"]]
    conditions = {"latent_shape": LATENT, "vocabulary": words}
    (directory / "conditions.json").write_text(json.dumps(conditions))
    common = [
        f"policy.checkpoint={directory}",
        "prompts={kind: digits, moving: true}",
        f"learner.micro_batch={ROWS}",
        "learner.zero_stage=0",
        "tracking=[]",
    ]
    two_step = [
        "distill.warmup_steps=0",
        "distill.discriminator.channels=8",
        "distill.discriminator.updates=1",
        "distill.fake_score.updates=1",
    ]

    def make(*overrides: str) -> DistillRecipe:
        small = [*common, *two_step, *overrides]
        return load(Path("digits/two_step"), DistillRecipe, small).value

    return make


def published(*overrides: str) -> Any:
    return load(RECIPE, DistillRecipe, overrides)


def rank_of(recipe: DistillRecipe) -> DistillRank:
    return DistillRank(recipe.model_dump_json(), 0, "cpu", 1, "torch")


def batch() -> TwoStepBatch:
    x = torch.randn(ROWS, *LATENT)
    condition = torch.randn(ROWS, WORDS, CONFIG["text_dim"])
    return TwoStepBatch(condition, x, x + 1, x - 1, torch.ones(ROWS) / ROWS, tuple(range(ROWS)))


@cache
def built(directory: str, trains: str, lora: LoraAdapter | None, dtype: Any, again: bool) -> Any:
    policy = WanConfig(
        checkpoint=directory, lora=lora, dtype=dtype, gradient_checkpointing=again
    ).build()
    if trains == "input":
        policy.module.requires_grad_(False)
    return policy


KINDS = pytest.mark.parametrize(
    ("trains", "lora"),
    [("all", None), ("input", None), ("adapter", ATTENTION), ("adapter", OTHERS)],
    ids=["all", "input", "attention", "others"],
)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@DTYPES
@KINDS
@pytest.mark.parametrize("again", [False, True])
def test_a_backward_pass_peaks_where_it_is_said_to(
    recipe: Any, trains: str, lora: Any, dtype: str, again: bool
):
    policy = built(recipe().policy.checkpoint, trains, lora, dtype, again)
    rows = batch()
    x = rows.z.requires_grad_(trains == "input")
    leaves = [x, *policy.module.parameters()]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    with Alive([*leaves, *gradients, rows.condition]) as alive:
        loss = policy.velocity(x, torch.full((ROWS,), 0.5), rows.condition).square().mean()
        kept = alive.now
        loss.backward()
    said = Forward(policy.config, trains != "input").graph(ROWS)
    assert said.kept == pytest.approx(kept, rel=0.02)
    assert said.peak == pytest.approx(alive.peak, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "again", "lora"),
    [("float32", False, None), ("bfloat16", True, None), ("bfloat16", True, ATTENTION)],
)
def test_a_deep_network_grows_by_the_layer(
    tmp_path: Path, monkeypatch: Any, dtype: Any, again: bool, lora: Any
):
    WanTransformer3DModel(**CONFIG | {"num_layers": 7}).save_pretrained(tmp_path / "transformer")
    conditions = {"vocabulary": [["a", "b"]] * WORDS, "latent_shape": LATENT}
    (tmp_path / "conditions.json").write_text(json.dumps(conditions))
    policy = WanConfig(
        checkpoint=str(tmp_path), lora=lora, dtype=dtype, gradient_checkpointing=again
    )

    def counted() -> tuple[int, int, int]:
        memory_flow._bytes.cache_clear()
        graph = Forward(policy, True).graph(ROWS)
        return graph.kept, graph.peak, Forward(policy, True).inference(ROWS)

    grown = counted()
    monkeypatch.setattr("recipes.memory_flow.DEPTHS", (2, 7))
    assert grown == pytest.approx(counted(), rel=0.05)


@DTYPES
@KINDS
def test_inference_peaks_where_it_is_said_to(recipe: Any, trains: str, lora: Any, dtype: str):
    policy = built(recipe().policy.checkpoint, trains, lora, dtype, False)
    rows = batch()
    peaks: list[int] = []
    for _ in range(2):  # the first may also see what a library makes once
        with Alive([rows.z, rows.condition, *policy.module.parameters()]) as alive, torch.no_grad():
            policy.velocity(rows.z, torch.full((ROWS,), 0.5), rows.condition)
        peaks.append(alive.peak)
    expected = Forward(policy.config, trains != "input").inference(ROWS)
    assert expected == pytest.approx(min(peaks), rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("policy.dtype=bfloat16", "policy.gradient_checkpointing=true"),
        ("policy.dtype=bfloat16", "distill.step1.weight=0", "distill.discriminator.depths=[0.5]"),
        ("distill.adversarial=0", "distill.dmd=0.5", "policy.gradient_checkpointing=true"),
        ("distill.parameters=lora_per_step", "policy.lora={rank: 4, alpha: 8}"),
        ("distill={kind: random_conditioning, layers: 2}",),
    ],
    ids=["plain", "again", "half-depth", "dmd", "adapters", "smaller"],
)
def test_a_step_holds_what_a_plan_says(recipe: Any, overrides: tuple[str, ...]):
    described = recipe(*overrides)
    rank, rows = rank_of(described), batch()
    if described.distill.kind == "random_conditioning":
        x, one = rows.z, torch.ones(ROWS)
        rows = ConditionedBatch(rows.condition, x, -x, one / 2, one > 0, one, one.long())
    trained = {name: network.engine for name, network in rank.networks.items()}
    modules = [rank.teacher.module, *(engine.module for engine in trained.values())]
    averages = [t for network in rank.networks.values() for t in network.averaged.values()]
    known = [*averages, *(p for module in modules for p in module.parameters())]
    with Alive([*known, *(t for t in vars(rows).values() if isinstance(t, Tensor))]) as alive:
        rank.method.update(rank.networks, [rows], 1)
    memory = distillation_memory(described)["learner rank"]
    # This engine lets go of gradients after each step, so only the largest ones are there at once.
    weights = [sum(t.nbytes for t in engine.weights().values()) for engine in trained.values()]
    assert memory["gradients"] == sum(weights)
    assert memory["activations"] + max(weights) == pytest.approx(alive.peak, rel=0.2)
    assert memory["teacher"] == sum(p.nbytes for p in rank.teacher.module.parameters())
    whole = {id(p): p.nbytes for module in modules[1:] for p in module.parameters()}
    assert memory["parameters"] == sum(whole.values())
    moments = [t for engine in trained.values() for t in engine.moments().values()]
    assert memory["optimiser"] == sum(t.nbytes for t in moments)
    assert memory["average"] == sum(t.nbytes for t in averages)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_networks_take_turns_where_a_stage_lets_go(recipe: Any, stage: int):
    described = recipe("distill.dmd=1", f"learner.zero_stage={stage}", "learner.ranks=8")
    memory = distillation_memory(described)["learner rank"]
    counts = networks(described)
    assert list(counts) == ["teacher", "student", "heads", "fake_score"]
    states = [
        state_memory(c.frozen, c.width, c.trained, stage, 8, False, False)
        for name, c in counts.items()
        if name != "teacher"
    ]
    for part in ("gradients", "buffers"):
        taken = [state[part] for state in states]
        assert memory[part] == (max(taken) if stage in (1, 2) else sum(taken))
    for part in ("parameters", "optimiser"):
        assert memory[part] == sum(state[part] for state in states)
    assert memory["average"] == states[0]["average"]
    assert memory["teacher"] == 4 * counts["teacher"].frozen


@DTYPES
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_actor_holds_teacher_and_student(recipe: Any, dtype: str, guidance: float):
    described = recipe(
        f"policy.dtype={dtype}",
        f"rollout.guidance_scale={guidance}",
        "rollout.steps=2",
        "rollout.batch_size=4",
    )
    student, sampler = sampler_of(described, "cpu")
    parameters = [
        *student.module.parameters(),
        *sampler.teacher.policy.module.parameters(),
    ]
    groups = groups_for(described.prompts.load(), seed=0, step=0, count=1, size=4)
    peaks: list[int] = []
    for drawn in (teacher_plan(), described.distill.evaluation_plan()):
        with Alive(parameters) as alive:
            sampler.sample(groups, [drawn])
        peaks.append(alive.peak)
    actor = distillation_memory(described)["rollout actor"]
    assert actor["teacher"] + actor["parameters"] == sum(p.nbytes for p in parameters)
    # The sampler's own latents, not counted, are half as wide as the states of this small network.
    assert actor["activations"] == pytest.approx(max(peaks), rel=0.2)


def test_the_published_sizes_are_known_without_their_weights(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = {SMALL: (1_418_996_800, 30), LARGE: (14_288_491_584, 40)}
    for name, (count, layers) in expected.items():
        policy = WanConfig(checkpoint=name)
        with torch.device("meta"):
            network: Any = WanTransformer3DModel.from_config(policy.sizes())
        assert sum(p.numel() for p in network.parameters()) == count
        linears = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
        assert sorted(policy.linear_names()) == sorted(linears)
        assert len(network.blocks) == layers
        with pytest.raises(ValueError, match=f"run 'hf download {name}' where the hub"):
            policy.directory()
    with pytest.raises(ValueError, match=r"has no transformer/config\.json"):
        WanConfig(checkpoint="Wan-AI/another").sizes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMALL / "transformer").mkdir(parents=True)
    (tmp_path / SMALL / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / SMALL / "conditions.json").write_text("{}")
    assert WanConfig(checkpoint=SMALL).sizes() == CONFIG


def test_a_full_size_plan_is_its_arithmetic_in_words():
    described = published().value
    memory, shown = distillation_memory(described), plan(described)
    rank, actor = shown["learner rank"], shown["rollout actor"]
    assert rank.pop("total") == readable(sum(memory["learner rank"].values()))
    assert rank == {k: readable(v) for k, v in memory["learner rank"].items()}
    assert rank["teacher"] == actor["teacher"] == readable(4 * 1_418_996_800) == "5.29 GiB"
    assert actor["parameters"] == readable(8 * 1_418_996_800)
    # On 80 GB.
    assert sum(memory["learner rank"].values()) < 70 * 2**30
    # Two student steps and two judged forwards of the teacher keep a row of bfloat16 a layer.
    assert memory["learner rank"]["activations"] > 4 * 30 * 32_760 * 1536 * 2
    rows = shapes(described)
    assert rows["teacher's network"] == "1,418,996,800 parameters"
    assert rows["what trains"].startswith("student 2,837,993,600, heads 12,")
    assert "(1, 16, 21, 60, 104), 32,760 tokens" in (rows["learner's forward"])


def test_shapes_are_those_of_the_checkpoint(recipe: Any):
    rows = shapes(recipe("distill.parameters=lora_per_step", "policy.lora={rank: 4, alpha: 8}"))
    assert rows["learner's forward"] == (
        "latents (4, 3, 2, 20, 16), 160 tokens each, to velocities (4, 3, 2, 20, 16)"
    )
    # Of both attentions' four layers, 24 in and 24 out, in four blocks, for two steps.
    assert rows["what trains"].startswith(f"student {2 * 4 * 8 * 4 * (24 + 24):,}, heads ")


@pytest.mark.parametrize("name", ["digits", pytest.param("moving-digits", marks=pytest.mark.slow)])
def test_an_embedded_sample_is_the_model_s_own(name: str):
    policy = WanConfig(checkpoint=name).build()
    assert policy.config.latent() == policy.latent_shape
    words = policy.config.example(2)["encoder_hidden_states"].shape[1]
    assert words == len(policy.conditions["vocabulary"])
