"""Two-step students: routing, what trains, and the pipeline that stock diffusers reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from distill.networks import StudentModule
from distill.noise import gaussians
from rollout.draws import Prompt, groups_for
from rollout.flow import FlowPlan, shifted_sigmas
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig
from rollout.policies.adapters import LoraAdapter
from rollout.policies.two_step import Parameters, TwoStepPolicy
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy

PARAMETERS: list[Parameters] = ["shared", "lora_per_step", "full_per_step"]
LORA = LoraAdapter(rank=4, alpha=8)


def student(parameters: Parameters, checkpoint: str = "digits", **options: Any) -> TwoStepPolicy:
    config = WanConfig(checkpoint=checkpoint, lora=LORA if "lora" in parameters else None)
    shift = options.pop("shift", 3.0)
    return TwoStepPolicy(config, parameters, shifted_sigmas(2, shift, 1.0), **options)


@torch.no_grad()
def trained(policy: TwoStepPolicy, scale: float = 0.02) -> TwoStepPolicy:
    """Every trainable parameter moved, those of the steps apart."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable().values():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def inputs(policy: Any, times: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(times), *policy.latent_shape, generator=generator)
    return x, torch.tensor(times), policy.encode([f"a {i % 10}" for i in range(len(times))])


@torch.no_grad()
def velocity(policy: Any, times: list[float]) -> Tensor:
    return policy.velocity(*inputs(policy, times))


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_student_starts_as_its_teacher(parameters: Parameters, base_policy: WanPolicy):
    policy, times = student(parameters), [1.0, 0.9, 0.75, 0.5, 0.2]
    tolerance = 1e-6 if parameters == "lora_per_step" else 0
    torch.testing.assert_close(
        velocity(policy, times), velocity(base_policy, times), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_rows_go_to_the_network_of_their_step(parameters: Parameters):
    policy = trained(student(parameters))
    assert policy.boundary == 0.875
    times = [1.0, 0.75, 0.875, 0.8749, 0.1, 0.99]
    mixed, high = velocity(policy, times), torch.tensor(times) >= 0.875
    steps = [velocity(step, times) for step in (policy.steps[0], policy.steps[-1])]
    torch.testing.assert_close(mixed[high], steps[0][high], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[~high], steps[1][~high], rtol=0, atol=1e-6)
    apart = [(steps[0] - steps[1])[rows].abs().amax((1, 2, 3, 4)) for rows in (high, ~high)]
    if parameters == "shared":
        assert torch.equal(steps[0], steps[1])
    else:
        assert all((difference > 1e-3).all() for difference in apart)


def test_a_batch_of_one_step_goes_there_whole():
    policy = trained(student("full_per_step"))
    for step, time in enumerate((1.0, 0.75)):
        assert torch.equal(velocity(policy, [time] * 5), velocity(policy.steps[step], [time] * 5))


def test_what_trains_and_what_is_shared(base_policy: WanPolicy):
    base = dict(base_policy.module.named_parameters())
    size = sum(p.numel() for p in base.values())
    shared, lora, full = (student(parameters) for parameters in PARAMETERS)
    assert set(shared.trainable()) == {f"transformer.{name}" for name in base}
    both = {f"{part}.{name}" for part in ("transformer", "transformer_2") for name in base}
    assert set(full.trainable()) == both
    assert sum(p.numel() for p in full.trainable().values()) == 2 * size
    assert len({p.data_ptr() for p in full.trainable().values()}) == len(both)

    adapters = lora.trainable()
    assert all(".lora_" in name for name in adapters)
    first, second = ([n for n in adapters if n.startswith(f"{part}.")] for part in lora.module)
    assert [n.removeprefix("transformer.") for n in first] == [
        n.removeprefix("transformer_2.") for n in second
    ]
    assert all(torch.equal(adapters[a], adapters[b]) for a, b in zip(first, second, strict=True))
    assert len({p.data_ptr() for p in adapters.values()}) == len(adapters)
    # One base: a parameter that both networks hold is counted once.
    total = sum(p.numel() for p in lora.module.parameters())
    assert total == size + sum(p.numel() for p in adapters.values())


@pytest.mark.parametrize("parameters", ["lora_per_step", "full_per_step"])
def test_a_step_s_gradient_stays_in_its_network(parameters: Parameters):
    policy = trained(student(parameters))
    policy.velocity(*inputs(policy, [0.75] * 4)).square().sum().backward()
    held = {name.split(".")[0] for name, p in policy.trainable().items() if p.grad is not None}
    assert held == {"transformer_2"}


@pytest.mark.parametrize("noise", ["same", "fresh"])
def test_the_training_forward_is_what_the_sampler_draws(noise: str):
    policy = trained(student("full_per_step"))
    prompts = [Prompt(str(d), f"a handwritten {d}", {}) for d in range(3)]
    groups = groups_for(prompts, seed=1, step=0, count=3, size=2)
    plan = FlowPlan(steps=2, renoise=noise == "fresh", keep_final=True)
    sampler = FlowSampler(FlowSamplerConfig(sigma_max=1.0), policy)
    drawn = sampler.sample(groups, [plan] * 3)
    module = StudentModule(policy, policy.sigmas, end_to_end=True)
    for rollout in drawn:
        seeds = rollout.replay.seeds.tolist()
        z = gaussians(seeds, policy.latent_shape, "initial")
        n = z if noise == "same" else gaussians(seeds, policy.latent_shape, "inject 0")
        with torch.no_grad():
            _, y2 = module(z, n, policy.encode([rollout.group.prompt] * 2))
        torch.testing.assert_close(y2, torch.from_numpy(rollout.replay.final), rtol=0, atol=2e-6)


def from_pipeline(directory: Path, policy: TwoStepPolicy, z: Tensor, prompts: list[str]) -> Tensor:
    """Two steps of stock diffusers on the saved files alone."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipeline: Any = WanPipeline.from_pretrained(directory, **parts)
    pipeline.set_progress_bar_config(disable=True)
    frames = 1 + 4 * (policy.latent_shape[1] - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # a scheduler that renoises is given no generator by WanPipeline
        return pipeline(
            prompt_embeds=policy.encode(prompts), height=64, width=64, num_frames=frames,
            num_inference_steps=2, guidance_scale=1.0, latents=z, output_type="latent",
        ).frames  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "video"),
    [("full_per_step", False), ("shared", False), ("full_per_step", True)],
)
def test_the_saved_pipeline_of_stock_diffusers_draws_the_same(
    tmp_path: Path, moving_digits: Path, parameters: Parameters, video: bool
):
    policy = trained(student(parameters, str(moving_digits) if video else "digits"))
    policy.save(tmp_path, policy.trainable())
    texts = [f"a handwritten {d} moving left" for d in range(4)]
    prompts = [Prompt(str(d), text, {}) for d, text in enumerate(texts)]
    groups = groups_for(prompts, seed=0, step=-1, count=4, size=1)
    config = FlowSamplerConfig(steps=2, shift=3.0, sigma_max=1.0)
    drawn = FlowSampler(config, policy).sample(groups, [FlowPlan(keep_final=True)] * 4)
    final = torch.cat([torch.from_numpy(rollout.replay.final) for rollout in drawn])
    z = torch.stack([group.draw(0).noise("initial", policy.latent_shape) for group in groups])
    assert torch.equal(from_pipeline(tmp_path, policy, z, texts), final)
    assert (tmp_path / "transformer_2").is_dir() == (parameters == "full_per_step")


def test_the_saved_pipeline_renoises_where_training_did(tmp_path: Path):
    policy = trained(student("full_per_step", renoise=True))
    policy.save(tmp_path, policy.trainable())
    z, _, condition = inputs(policy, [1.0] * 4)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        _, y2 = StudentModule(policy, policy.sigmas, end_to_end=True)(z, noise, condition)
    found = from_pipeline(tmp_path, policy, z, [f"a {d}" for d in range(4)])
    torch.testing.assert_close(found, y2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [2.0, 5.0])
def test_the_saved_pipeline_keeps_another_shift(tmp_path: Path, shift: float):
    """Sigma 1 is 2/3 or 5/6, whose time in thousandths is no whole number."""
    policy = trained(student("full_per_step", shift=shift))
    policy.save(tmp_path, policy.trainable())
    z, _, condition = inputs(policy, [1.0] * 4)
    with torch.no_grad():
        _, y2 = StudentModule(policy, policy.sigmas, end_to_end=True)(z, z, condition)
    found = from_pipeline(tmp_path, policy, z, [f"a {d}" for d in range(4)])
    torch.testing.assert_close(found, y2, rtol=0, atol=1e-5)


def test_a_saved_student_comes_back(tmp_path: Path):
    for parameters in ("shared", "full_per_step"):
        policy = trained(student(parameters))
        policy.save(tmp_path / parameters, policy.trainable())
        again = TwoStepPolicy.load(WanConfig(checkpoint=str(tmp_path / parameters)))
        assert again.sigmas == policy.sigmas
        assert torch.equal(velocity(again, [1.0, 0.75, 0.3]), velocity(policy, [1.0, 0.75, 0.3]))


def test_adapters_are_saved_one_for_each_step_and_load_in_stock_diffusers(tmp_path: Path):
    policy = trained(student("lora_per_step"))
    policy.save(tmp_path, policy.trainable())
    x, t, condition = inputs(policy, [0.4] * 4)
    for step, part in zip(policy.steps, ("transformer", "transformer_2"), strict=True):
        path = WanConfig().directory() / "transformer"
        stock: Any = WanTransformer3DModel.from_pretrained(path)
        file = "pytorch_lora_weights.safetensors"
        stock.load_lora_adapter(tmp_path / part, prefix="transformer", weight_name=file)
        with torch.no_grad():
            (found,) = stock(x, (t * 1000).floor(), condition, return_dict=False)
        torch.testing.assert_close(found, velocity(step, [0.4] * 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 6])
def test_features_are_hidden_states_and_depend_on_time(base_policy: WanPolicy, count: int):
    x, t, condition = inputs(base_policy, [0.3] * count)
    with torch.no_grad():
        found = base_policy.features(x, t, condition, [0, 3, 3])
        later = base_policy.features(x, t + 0.2, condition, [0, 3, 3])
    assert [f.shape for f in found] == [(count, base_policy.width, 1, 4, 4)] * 3
    assert base_policy.blocks == 4
    assert torch.equal(found[1], found[2])
    assert all((a - b).abs().amax() > 1e-2 for a, b in zip(found, later, strict=True))
    assert not base_policy.network.blocks[0]._forward_hooks


def test_features_of_a_patch_stay_at_its_place(base_policy: WanPolicy):
    """What changes in one patch changes most where that patch is."""
    x, t, condition = inputs(base_policy, [0.3] * 4)
    moved = x.clone()
    moved[..., 6:8, 2:4] += 3
    with torch.no_grad():
        (before,), (after,) = (base_policy.features(v, t, condition, [0]) for v in (x, moved))
    change = (after - before).square().sum((1, 2)).flatten(1)
    assert (change.argmax(1) == 3 * 4 + 1).all()


def test_features_carry_a_gradient_to_the_sample_and_those_of_a_student_are_of_step_1():
    policy = trained(student("full_per_step"))
    x, t, condition = inputs(policy, [0.3] * 4)
    x.requires_grad_()
    found = policy.features(x, t, condition, [1])[0]
    assert torch.equal(found, policy.steps[0].features(x, t, condition, [1])[0])
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_features_of_a_video_have_its_frames(moving_digits: Path):
    policy = WanConfig(checkpoint=str(moving_digits)).build()
    with torch.no_grad():
        x, t = torch.zeros(2, *policy.latent_shape), torch.full((2,), 0.5)
        found = policy.features(x, t, policy.encode_null(2), [2])
    assert found[0].shape == (2, policy.width, 4, 4, 4)
