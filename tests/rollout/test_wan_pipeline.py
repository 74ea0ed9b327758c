"""Text-to-video pipelines: stock ``WanPipeline``'s samples, embeddings, pixels and file layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from pydantic import ValidationError
from torch import Tensor

from rollout.draws import Prompt, groups_for
from rollout.flow import FlowPlan, log_prob, sde_step
from rollout.flow_sampler import FlowRollout, FlowSampler, FlowSamplerConfig
from rollout.policies.adapters import LoraAdapter
from rollout.policies.prompt_embeddings import shared_embeddings
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy
from rollout.policies.wan_pipeline import WanPipelinePolicy
from tests.rollout.tiny_wan import FRAMES, HEIGHT, STEPS, WIDTH, stock, write_pipeline

PROMPT, NEGATIVE = "the cat runs  over &amp;lt; grass", "ugly blurred"
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("wan21"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("wan22"), two=True)


def config(directory: Path, **changes: Any) -> WanConfig:
    sizes = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "negative_prompt": NEGATIVE}
    return WanConfig(checkpoint=str(directory), **{**sizes, **changes})


def built(directory: Path, seed: int = 0, reference: bool = False, **changes: Any) -> Any:
    policy = config(directory, **changes).build(seed=seed, reference=reference)
    assert isinstance(policy, WanPipelinePolicy)
    return policy


def sampler_on(pipeline: Any, policy: WanPipelinePolicy, guidance: float) -> FlowSampler:
    """Ours on stock's sigmas."""
    sampler = FlowSamplerConfig(steps=STEPS, guidance_scale=guidance).build(policy)
    pipeline.scheduler.set_timesteps(STEPS)
    sampler.grid = replace(sampler.grid, sigmas=tuple(pipeline.scheduler.sigmas.tolist()))
    return sampler


def ours(pipeline: Any, policy: WanPipelinePolicy, guidance: float) -> FlowRollout:
    groups = groups_for([Prompt("1", PROMPT, {})], seed=0, step=0, count=1, size=2)
    (rollout,) = sampler_on(pipeline, policy, guidance).sample(groups, [FlowPlan(keep_final=True)])
    return rollout


def theirs(
    pipeline: Any, rollout: FlowRollout, guidance: float, kind: str = "latent", steps: int = STEPS
) -> Any:
    """Stock's output from the same noise."""
    shape = rollout.replay.final.shape[1:]
    latents = torch.stack([rollout.group.draw(j).noise("initial", shape) for j in range(2)])
    return pipeline(
        [PROMPT] * 2,
        [NEGATIVE] * 2,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=latents,
        output_type=kind,
    ).frames


def close(rollout: FlowRollout, latents: Tensor) -> None:
    torch.testing.assert_close(
        torch.from_numpy(rollout.replay.final), latents, rtol=1e-5, atol=2e-5
    )


@torch.no_grad()
def perturb(policy: Any, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("euler", [False, True])
def test_samples_are_stock_s(tmp_path: Path, guidance: float, euler: bool):
    directory = write_pipeline(tmp_path, euler=euler)
    pipeline, policy = stock(directory), built(directory)
    rollout = ours(pipeline, policy, guidance)
    latents = theirs(pipeline, rollout, guidance)
    close(rollout, latents)
    frames = theirs(pipeline, rollout, guidance, "np")
    pixels = policy.pixels(torch.from_numpy(rollout.replay.final)).detach().numpy()
    np.testing.assert_allclose(pixels, frames, rtol=0, atol=2e-5)
    assert rollout.media.shape == (2, FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(rollout.media - frames * 255).max() < 0.51
    # Guidance, the prompt and the way timesteps are fed are visible at that tolerance.
    other = theirs(pipeline, rollout, 3.0)
    assert (other - latents).abs().max() > 1e-3
    policy.whole_timesteps = euler
    fed = torch.from_numpy(ours(pipeline, policy, guidance).replay.final)
    assert (fed - latents).abs().max() > 5e-5


def test_embeddings_are_stock_s(one: Path):
    policy, pipeline = built(one), stock(one)
    long = " ".join(["the dog walks over snow"] * 200)
    prompts = [PROMPT, "a dog", "", long, "a dog"]
    with torch.no_grad():
        # Each alone: in a batch of another size stock's own last bits are others.
        pairs = [pipeline.encode_prompt([p], [NEGATIVE], max_sequence_length=512) for p in prompts]
    expected, null = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    found = policy.encode(prompts)
    assert found.shape == (5, 512, 16) and not found.requires_grad
    assert torch.equal(found, expected)
    assert torch.equal(policy.encode_null(5), null)
    assert found[1, 3:].abs().max() == 0 < found[1, :3].abs().min()
    assert found[3].abs().amax(1).min() > 0
    # The entities are resolved, twice: "<" is a word of its own.
    assert torch.equal(found[:1], policy.encode(["the cat runs over < grass"]))
    assert not torch.equal(found[:1], policy.encode(["the cat runs over zebra grass"]))


def test_a_prompt_is_encoded_once_and_by_itself(one: Path, monkeypatch: pytest.MonkeyPatch):
    policy = built(one)
    together = policy.encode([PROMPT, "a dog"])
    monkeypatch.setattr(policy._embeddings, "_encode", lambda prompts: pytest.fail("again"))
    assert torch.equal(policy.encode(["a dog", PROMPT, "a dog"]), together[[1, 0, 1]])
    # Another policy of the pipeline, a student, shares them; alone it would have the same.
    assert torch.equal(built(one).encode(["a dog"]), together[1:])
    shared_embeddings.cache_clear()
    assert torch.equal(built(one).encode(["a dog"]), together[1:])


def replayed(policy: WanPipelinePolicy, rollout: FlowRollout, guidance: float) -> Tensor:
    """The members' log-probabilities of the injected steps, with their graph."""
    replay = rollout.replay
    x, sigma, after, g, x_next = (
        torch.from_numpy(getattr(replay, name))
        for name in ("x", "sigma", "sigma_next", "g", "x_next")
    )
    condition = policy.encode([PROMPT] * len(x))
    velocity = policy.guided_velocity(x, sigma, condition, guidance)
    return log_prob(x_next, *sde_step(x, velocity, sigma, after, g))


def trained_one_step(pipeline: Any, policy: WanPipelinePolicy, indices: list[int]) -> None:
    """A step of Flash-GRPO, each group with one injected step, rewarded by its brightness."""
    groups = groups_for([Prompt("1", PROMPT, {})], seed=0, step=0, count=1, size=4)
    sampler = sampler_on(pipeline, policy, 5.0)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.05, weight_decay=0.0)
    for index in indices:
        (rollout,) = sampler.sample(groups, [FlowPlan(sde_indices=(index,))])
        new, old = replayed(policy, rollout, 5.0), torch.from_numpy(rollout.replay.log_prob)
        assert torch.equal(new.detach(), old)
        rewards = torch.from_numpy(rollout.media.astype(np.float32)).mean((1, 2, 3, 4))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        (-(advantages * (new - old).exp()).mean()).backward()
    optimizer.step()


def test_a_trained_adapter_changes_stock_as_it_changes_ours(one: Path, tmp_path: Path):
    policy, pipeline = built(one, lora=LoraAdapter(rank=4, alpha=8)), stock(one)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    close(ours(pipeline, policy, 5.0), theirs(pipeline, ours(pipeline, policy, 5.0), 5.0))
    trained_one_step(pipeline, policy, [1])
    moved = [n for n, p in policy.trainable().items() if not torch.equal(p, before[n])]
    assert len(moved) == 16 and all("lora_B" in name for name in moved)
    rollout = ours(pipeline, policy, 5.0)
    unchanged = theirs(pipeline, rollout, 5.0)
    policy.save(tmp_path, policy.trainable())
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline.load_lora_weights(tmp_path)
    changed = theirs(pipeline, rollout, 5.0)
    assert (changed - unchanged).abs().max() > 0.01
    close(rollout, changed)
    with policy.reference():
        close(ours(pipeline, policy, 5.0), unchanged)


def test_whole_weights_load_in_stock_and_again(one: Path, tmp_path: Path):
    policy = built(one, reference=True)
    perturb(policy)
    policy.save(tmp_path / "first", policy.trainable())
    alone = WanTransformer3DModel.from_pretrained(tmp_path / "first" / "transformer")
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, policy.trainable()[name])
    pipeline = stock(tmp_path / "first")
    rollout = ours(pipeline, policy, 5.0)
    close(rollout, theirs(pipeline, rollout, 5.0))
    base = stock(one)
    with policy.reference():
        close(ours(base, policy, 5.0), theirs(base, rollout, 5.0))
    # A saved one is a checkpoint; what it links to stays where it first was.
    again = built(tmp_path / "first")
    again.save(tmp_path / "second", again.trainable())
    shutil.rmtree(tmp_path / "first")
    assert np.array_equal(
        ours(pipeline, built(tmp_path / "second"), 5.0).replay.final, rollout.replay.final
    )


def test_two_transformers_are_stock_s(two: Path, tmp_path: Path):
    policy, pipeline = built(two), stock(two)
    # Timesteps 999 and 900 are the first's, 750 and 500 the second's.
    assert policy.boundary == 875 and config(two).networks == 2
    rollout = ours(pipeline, policy, 5.0)
    latents = theirs(pipeline, rollout, 5.0)
    close(rollout, latents)
    perturb(policy)
    rollout = ours(pipeline, policy, 5.0)
    policy.save(tmp_path, policy.trainable())
    changed = theirs(stock(tmp_path), rollout, 5.0)
    assert (changed - latents).abs().max() > 1e-3
    close(rollout, changed)


def test_both_adapters_train_and_load_in_stock(two: Path, tmp_path: Path):
    policy, pipeline = built(two, lora=LoraAdapter(rank=4, alpha=8)), stock(two)
    trained_one_step(pipeline, policy, [0, 2])
    grads = {name: p.grad.abs().max() for name, p in policy.trainable().items()}
    for name in ("transformer.", "transformer_2."):
        own = [g for n, g in grads.items() if n.startswith(name) and "lora_B" in n]
        assert len(own) == 16 and min(own) > 0
    rollout = ours(pipeline, policy, 5.0)
    base = theirs(pipeline, rollout, 5.0)
    policy.save(tmp_path, policy.trainable())
    pipeline.load_lora_weights(tmp_path)
    half = theirs(pipeline, rollout, 5.0)
    pipeline.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
    whole = theirs(pipeline, rollout, 5.0)
    assert min((half - base).abs().max(), (whole - half).abs().max()) > 1e-3
    close(rollout, whole)
    with policy.reference():
        close(ours(pipeline, policy, 5.0), base)


def test_rows_go_to_their_own_transformer_and_all_that_trains_gets_a_gradient(two: Path):
    policy = built(two, lora=LoraAdapter(rank=4, alpha=8))
    perturb(policy)
    x = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.2, 0.9, 0.8749, 0.875, 0.5])
    condition = policy.encode([PROMPT] * 5)
    mixed, deep = policy.velocity(x, t, condition), policy.features(x, t, condition, [1])[0]
    assert deep.shape == (5, 24, 2, 2, 1)
    for row in range(5):
        span = slice(row, row + 1)
        alone = policy.velocity(x[span], t[span], condition[span])
        assert torch.equal(alone, mixed[span])
        hidden = policy.features(x[span], t[span], condition[span], [1])[0]
        torch.testing.assert_close(hidden, deep[span])
        network = policy.module["transformer" if row in (1, 3) else "transformer_2"]
        (direct,) = network(x[span], (t[span] * 1000).floor(), condition[span], return_dict=False)
        torch.testing.assert_close(direct, alone)
    policy.velocity(x[:1], t[:1], condition[:1]).sum().backward()
    grads = {name: p.grad for name, p in policy.trainable().items()}
    assert all(g is not None for g in grads.values())
    used = {name.split(".")[0] for name, g in grads.items() if g.abs().max() > 0}
    assert used == {"transformer_2"}


def test_bfloat16_computes_close_and_decodes_in_fp32(two: Path):
    exact, half = (
        built(two, dtype=dtype, lora=LoraAdapter(rank=4)) for dtype in ("float32", "bfloat16")
    )
    x = torch.randn(4, *half.latent_shape, generator=torch.Generator().manual_seed(4))
    t = torch.tensor([0.2, 0.4, 0.9, 0.95])
    velocities, embeddings = [], []
    for policy in (exact, half):
        embeddings.append(policy.encode([PROMPT] * 4))
        velocities.append(policy.guided_velocity(x, t, embeddings[-1], 5.0).detach())
    for one_half, other in (embeddings, velocities):
        assert one_half.dtype == other.dtype == torch.float32
        assert 1e-4 < (one_half - other).abs().max() < 0.1
    frozen = {p.dtype for p in half.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in half.trainable().values()} == {torch.float32}
    assert torch.equal(half.pixels(x), exact.pixels(x))


def test_pixels_are_differentiable_and_in_range(one: Path):
    policy = built(one)
    assert policy.latent_shape == (4, 2, 4, 2)
    assert (policy.blocks, policy.width) == (2, 24)
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    pixels = policy.pixels(x)
    assert pixels.shape == (3, FRAMES, HEIGHT, WIDTH, 3)
    assert 0 <= pixels.min() < pixels.max() <= 1
    pixels[1].sum().backward()
    assert x.grad is not None
    assert x.grad[1].abs().max() > 0 == x.grad[[0, 2]].abs().max()
    step = 1e-2 * torch.nn.functional.normalize(x.grad, dim=None)
    with torch.no_grad():
        gained = policy.pixels(x + step)[1].sum() - policy.pixels(x - step)[1].sum()
    assert gained.item() == pytest.approx(2 * (x.grad * step).sum().item(), rel=0.05)
    media = policy.decode(x.detach())
    assert media.dtype == np.uint8
    assert np.abs(media - pixels.detach().numpy() * 255).max() < 0.51
    assert not any(p.requires_grad for p in policy._vae.parameters())
    assert not any("vae" in name or "shared" in name for name in policy.trainable())


def test_what_is_missing_or_does_not_fit_is_named(one: Path, two: Path, tmp_path: Path):
    for part in ("vae/config.json", "tokenizer/tokenizer_config.json", "transformer_2/config.json"):
        broken = tmp_path / part.replace("/", "-")
        shutil.copytree(two, broken)
        (broken / part).unlink()
        with pytest.raises(ValueError, match=f"has no {part}; copy or download it again"):
            config(broken).linear_names()
    for key, value, words in (
        (
            "_class_name",
            "WanImageToVideoPipeline",
            "is a WanImageToVideoPipeline, not a WanPipeline",
        ),
        ("expand_timesteps", True, "is no WanPipeline of Wan 2.1 or 2.2 A14B"),
    ):
        other = tmp_path / key
        shutil.copytree(one, other)
        index = json.loads((one / "model_index.json").read_text()) | {key: value}
        (other / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=words):
            config(other).build()
    for sizes in ({"height": 40}, {"width": 8}, {"frames": 6}, {"frames": 0}):
        with pytest.raises(ValidationError, match=next(iter(sizes))):
            config(one, **sizes)
    vae = json.loads((one / "vae" / "config.json").read_text())
    wide = tmp_path / "wide"
    shutil.copytree(one, wide)
    (wide / "vae" / "config.json").write_text(json.dumps(vae | {"scale_factor_spatial": 16}))
    with pytest.raises(ValueError, match="width and height multiples of 32"):
        config(wide).build()
    with pytest.raises(ValueError, match="a pipeline of two transformers has no student"):
        TwoStepPolicy(config(two), "shared", (1.0, 0.8, 0.0))


def test_a_published_pipeline_is_fetched_when_it_is_prepared(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = WanConfig(checkpoint=HUB)
    assert published.latent() == (16, 21, 60, 104)
    for read in (published.prepare, published.directory, published.build):
        with pytest.raises(ValueError, match=f"not on this machine: run 'hf download {HUB}'"):
            read()
    place = tmp_path / f"models--{HUB.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(one, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert published.prepare() == published.directory() == place / "snapshots" / commit
    assert built(Path(HUB)).blocks == 2


@pytest.mark.parametrize("parameters", ["full_per_step", "shared"])
def test_a_two_step_student_is_stock_s_pipeline(one: Path, tmp_path: Path, parameters: Any):
    student = TwoStepPolicy(config(one), parameters, (1.0, 0.8, 0.0))
    perturb(student)
    student.save(tmp_path, student.trainable())
    pipeline = stock(tmp_path)
    sampler = FlowSamplerConfig(steps=2, shift=4.0, sigma_max=1.0).build(student)
    assert sampler.grid.sigmas == pytest.approx((1.0, 0.8, 0.0))
    groups = groups_for([Prompt("1", PROMPT, {})], seed=0, step=0, count=1, size=2)
    (rollout,) = sampler.sample(groups, [FlowPlan(keep_final=True)])
    close(rollout, theirs(pipeline, rollout, 1.0, steps=2))
    # It is a pipeline that trains again, of two transformers where the steps have one each.
    assert config(tmp_path).networks == (2 if parameters == "full_per_step" else 1)


def test_a_two_step_student_stays_class_conditional(tmp_path: Path):
    student = TwoStepPolicy(WanConfig(), "shared", (1.0, 0.8, 0.0))
    student.save(tmp_path, student.trainable())
    assert (tmp_path / "model_index.json").is_file()
    again = WanConfig(checkpoint=str(tmp_path))
    assert not again.pipeline and isinstance(again.build(), WanPolicy)
