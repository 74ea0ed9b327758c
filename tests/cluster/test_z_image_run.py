"""Text-to-image and text-to-video pipelines through whole local runs: aligned, and distilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel, ZImageTransformer2DModel
from rich.console import Console

from cluster.launch import run_locally
from cluster.run import describe
from cluster.sample import SampleError, draw, open_checkpoint
from recipes.check import check
from recipes.errors import RecipeError
from recipes.memory import plan
from recipes.schema import DistillRecipe, Recipe
from recipes.shapes import shapes
from recipes.source import load
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.z_image import ZImageConfig
from tests.rollout import tiny_wan, tiny_z_image

ADAPTER = "policy.lora={rank: 4, alpha: 8}"
ALIGNED = [
    "steps=1",
    "rewards=[{kind: function, path: 'tests.cluster.test_z_image_run:redness', name: red}]",
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
DISTILLED = [
    "steps=2",
    "rollout.steps=3",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.batch_size=4",
    "rollout.guidance_scale=3.0",
    "rewards=[]",
    "learner.micro_batch=4",
    "evaluation.every=2",
    "evaluation.samples=2",
    "evaluation.rewards=[]",
    "checkpoints.every=2",
    "checkpoints.keep_best=null",
    "distill.warmup_steps=1",
    "distill.discriminator.channels=8",
    "tracking=[]",
]


def redness(prompts: list[str], completions: list[np.ndarray], **columns: Any) -> list[float]:
    """Mean red of images uint8 (1, height, width, 3)."""
    assert all(media.shape == (1, 32, 16, 3) for media in completions)
    return [float(media[..., 0].mean()) for media in completions]


def own(tmp_path: Path, kind: str, height: int = 32, width: int = 16) -> tuple[Path, list[str]]:
    """A small pipeline, and what a recipe says of it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat runs over grass\na dog walks\nsnow\nthe dog runs .\n")
    if kind == "wan":
        directory = tiny_wan.write_pipeline(tmp_path / kind)
        sizes = f"height: {height}, width: {width}, frames: 5"
    else:
        directory = tiny_z_image.write_pipeline(tmp_path / kind)
        sizes = f"height: {height}, width: {width}"
    return directory, [
        f"policy={{kind: {kind}, checkpoint: '{directory}', {sizes}}}",
        f"prompts={{kind: file, path: '{prompts}'}}",
        f"run_dir={tmp_path}",
    ]


def run(loaded: Any, directory: Path) -> list[dict[str, Any]]:
    check(loaded, gpus=0)
    directory.mkdir()
    describe(directory, loaded.value, loaded.value.prompts.load())
    run_locally(loaded.value, directory, Console(quiet=True))
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def test_flash_grpo_trains_a_z_image_and_its_adapter_loads_in_stock(tmp_path: Path):
    directory, settings = own(tmp_path, "z_image")
    loaded = load(Path("digits/flash_grpo"), Recipe, [*ALIGNED, *settings, ADAPTER])
    rows = run(loaded, tmp_path / "run")
    assert {"train", "evaluation"} <= {row["kind"] for row in rows}
    saved = tmp_path / "run" / "checkpoints" / "step_000001"
    pipeline = tiny_z_image.stock(directory)
    pipeline.load_lora_weights(saved / "policy")
    networks: Any = open_checkpoint(saved).policy.module
    theirs = {k: v for k, v in pipeline.transformer.named_parameters() if "lora_B" in k}
    mine = {k: v for k, v in networks.named_parameters() if "lora_B" in k}
    # Four layers of attention: two main blocks, a refiner of noise and one of the text.
    values = list(zip(theirs.values(), mine.values(), strict=True))
    assert len(values) == 16 and all(torch.equal(a, b) for a, b in values)
    assert all(value.abs().max() > 0 for value in mine.values())


@pytest.mark.parametrize(
    ("kind", "network"), [("wan", WanTransformer3DModel), ("z_image", ZImageTransformer2DModel)]
)
def test_a_pipeline_is_distilled_to_two_steps(tmp_path: Path, kind: str, network: Any):
    # The discriminator's heads want four patches a side.
    _, settings = own(tmp_path, kind, 64, 64)
    loaded = load(Path("digits/two_step"), DistillRecipe, [*DISTILLED, *settings])
    rows = run(loaded, tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    saved = tmp_path / "run" / "checkpoints" / "step_000002"
    student: Any = open_checkpoint(saved).policy
    for part, policy in zip(("transformer", "transformer_2"), student.steps, strict=True):
        alone = network.from_pretrained(saved / "policy" / part)
        for name, value in policy.trainable().items():
            assert torch.equal(value, alone.get_parameter(name))
    pipeline = (tiny_wan if kind == "wan" else tiny_z_image).stock(saved / "policy")
    pipeline.scheduler.set_timesteps(2, sigmas=None if kind == "wan" else np.array([1.0, 0.5]))
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx(student.sigmas)


@pytest.mark.parametrize("kind", ["wan", "z_image"])
def test_a_pipeline_s_directory_and_its_student_are_sampled_as_they_are(tmp_path: Path, kind: str):
    directory, _ = own(tmp_path, kind)
    source = open_checkpoint(directory)
    assert source.sampler.config.steps == 50 and source.sampler.config.shift == 3.0
    with pytest.raises(SampleError, match="give --prompt TEXT"):
        draw(source, count=1)
    config: Any = {"wan": WanConfig, "z_image": ZImageConfig}[kind]
    teacher = config(checkpoint=str(directory), height=32, width=32)
    student = TwoStepPolicy(teacher, "full_per_step", (1.0, 0.75, 0.0), renoise=True)
    student.save(tmp_path / "student", student.trainable())
    source = open_checkpoint(tmp_path / "student")
    assert (source.sampler.config.steps, source.plan.renoise) == (2, True)
    assert source.sampler.grid.sigmas == pytest.approx((1.0, 0.75, 0.0))
    assert sum(p.numel() for p in source.policy.module.parameters()) == sum(
        p.numel() for p in student.module.parameters()
    )


def test_adapters_of_steps_are_planned_and_two_transformers_refused(tmp_path: Path):
    _, settings = own(tmp_path, "z_image")
    adapters = ["distill.parameters=lora_per_step", ADAPTER]
    loaded = load(Path("digits/two_step"), DistillRecipe, [*DISTILLED, *settings, *adapters])
    check(loaded, gpus=0)
    assert plan(loaded.value)["learner rank"]["teacher"] and shapes(loaded.value)
    two = tiny_wan.write_pipeline(tmp_path / "two", two=True)
    other = f"policy={{kind: wan, checkpoint: '{two}', height: 32, width: 16, frames: 5}}"
    refused = load(Path("digits/two_step"), DistillRecipe, [*DISTILLED, *settings, other])
    with pytest.raises(RecipeError, match="a pipeline of two transformers has no student"):
        check(refused, gpus=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[]", "no JSON object"), ('{"_class_name": "X"}', "is a X; there")],
)
def test_a_pipeline_s_damaged_index_is_one_message(tmp_path: Path, text: str, words: str):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(SampleError, match=words):
        open_checkpoint(tmp_path)
