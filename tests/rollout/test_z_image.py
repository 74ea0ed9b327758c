"""Z-Image pipelines: stock ``ZImagePipeline``'s samples, embeddings, pixels and file layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from pydantic import ValidationError
from torch import Tensor

from rollout.draws import Prompt, groups_for
from rollout.flow import FlowPlan, log_prob, sde_step
from rollout.flow_sampler import FlowRollout, FlowSampler, FlowSamplerConfig
from rollout.policies.adapters import LoraAdapter
from rollout.policies.two_step import TwoStepPolicy
from rollout.policies.z_image import ZImageConfig, ZImagePolicy
from tests.rollout.tiny_z_image import HEIGHT, STEPS, WIDTH, stock, write_pipeline

PROMPT, LONG, NEGATIVE = "the cat runs over grass", " ".join(["a dog walks"] * 12), "ugly blurred"
HUB = "Tongyi-MAI/Z-Image"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("z_image"))


def config(directory: Path, **changes: Any) -> ZImageConfig:
    sizes = {"height": HEIGHT, "width": WIDTH, "negative_prompt": NEGATIVE}
    return ZImageConfig(checkpoint=str(directory), **{**sizes, **changes})


def built(directory: Path, reference: bool = False, **changes: Any) -> ZImagePolicy:
    return config(directory, **changes).build(reference=reference)


def sampler_on(stocks: Any, policy: Any, guidance: float, steps: int = STEPS) -> FlowSampler:
    """Ours on stock's sigmas."""
    sampler = FlowSamplerConfig(steps=steps, guidance_scale=guidance).build(policy)
    stocks.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    sampler.grid = replace(sampler.grid, sigmas=tuple(stocks.scheduler.sigmas.tolist()))
    return sampler


def ours(stocks: Any, policy: Any, guidance: float, prompt: str = PROMPT) -> FlowRollout:
    groups = groups_for([Prompt("1", prompt, {})], seed=0, step=0, count=1, size=2)
    plans = [FlowPlan(keep_final=True)]
    (rollout,) = sampler_on(stocks, policy, guidance).sample(groups, plans)
    return rollout


def noise(rollout: FlowRollout) -> Tensor:
    shape = rollout.replay.final.shape[1:]
    return torch.stack([rollout.group.draw(j).noise("initial", shape) for j in range(2)])[:, :, 0]


def theirs(
    stocks: Any, rollout: FlowRollout, guidance: float, kind: str = "latent", **options: Any
) -> Any:
    """Stock's output from the same noise; its guidance_scale is one less."""
    prompt = rollout.group.prompt
    return stocks(
        [prompt] * 2,
        negative_prompt=[NEGATIVE] * 2,
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=guidance - 1,
        latents=noise(rollout),
        output_type=kind,
        **{"num_inference_steps": STEPS, **options},
    ).images


def close(rollout: FlowRollout, latents: Tensor) -> None:
    found = torch.from_numpy(rollout.replay.final)[:, :, 0]
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def perturb(policy: Any, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
def test_samples_are_stock_s(pipeline: Path, guidance: float, prompt: str):
    stocks, policy = stock(pipeline), built(pipeline)
    rollout = ours(stocks, policy, guidance, prompt)
    latents = theirs(stocks, rollout, guidance)
    close(rollout, latents)
    images = theirs(stocks, rollout, guidance, "np")
    pixels = policy.pixels(torch.from_numpy(rollout.replay.final)).detach().numpy()
    np.testing.assert_allclose(pixels[:, 0], images, rtol=0, atol=2e-5)
    assert rollout.media.shape == (2, 1, HEIGHT, WIDTH, 3)
    assert np.abs(rollout.media[:, 0] - images * 255).max() < 0.51
    # Guidance is visible at that tolerance.
    assert (theirs(stocks, rollout, 3.0) - latents).abs().max() > 1e-3


def test_the_sampler_s_own_grid_is_stock_s_shift_of_three(pipeline: Path):
    stocks = stock(pipeline)
    sigmas = sampler_on(stocks, built(pipeline), 1.0).grid.sigmas
    assert FlowSamplerConfig(steps=STEPS, shift=3.0, sigma_max=1.0).grid().sigmas == pytest.approx(
        sigmas, abs=1e-6
    )


def test_embeddings_are_stock_s_and_know_their_length(pipeline: Path):
    policy, stocks = built(pipeline), stock(pipeline)
    prompts = [PROMPT, "", " ".join(["a dog walks over snow"] * 120)]
    found = policy.encode(prompts)
    assert found.shape == (3, 512, 16) and not found.requires_grad
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            ((own,), _) = stocks.encode_prompt([prompt], do_classifier_free_guidance=False)
        assert torch.equal(row[: len(own)], own)
        assert row[: len(own)].any(-1).all() and not row[len(own) :].any()
    assert policy.encode_null(2).shape == (2, 512, 16)


def test_a_row_does_not_depend_on_the_length_of_the_others(pipeline: Path):
    policy = built(pipeline)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.3])
    condition = policy.encode([PROMPT, LONG])
    together = policy.velocity(x, t, condition)
    alone = torch.cat(
        [policy.velocity(x[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in (0, 1)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_network_is_told_one_minus_t_and_answers_minus_v(pipeline: Path):
    policy = built(pipeline)
    x = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    target = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    told: list[Tensor] = []

    def answer(x: list[Tensor], t: Tensor, texts: list[Tensor], return_dict: bool) -> Any:
        told.append(t)
        return ([-(row - goal) for row, goal in zip(x, target, strict=True)],)

    policy.network = answer
    velocity = policy.velocity(x, torch.ones(4), policy.encode([PROMPT] * 4))
    # One step of size 1 from noise is at the target.
    torch.testing.assert_close(x - velocity, target)
    assert torch.equal(told[0], torch.zeros(4))


def test_features_are_the_image_s_tokens_of_a_layer(pipeline: Path):
    policy = built(pipeline)
    x = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t, condition = torch.full((4,), 0.5), policy.encode([PROMPT, LONG, "", "a cat"])
    first, last = policy.features(x, t, condition, [0, 1])
    assert first.shape == last.shape == (4, 24, 1, 2, 1) and policy.blocks == 2
    # What follows the last layer is one map a token: the velocity's patches come from them.
    final = policy.network.all_final_layer["2-1"]
    tokens = last.flatten(2).transpose(1, 2)
    with torch.no_grad():
        adaln = policy.network.t_embedder((1 - t) * 1000)
        patches = final(tokens, c=adaln)
        velocity = policy.velocity(x, t, condition)
    whole = policy.network.unpatchify(list(patches), [(1, 4, 2)] * 4, 2, 1)
    torch.testing.assert_close(-torch.stack(whole), velocity, rtol=1e-5, atol=1e-5)


def test_a_trained_adapter_changes_stock_as_it_changes_ours(pipeline: Path, tmp_path: Path):
    policy, stocks = built(pipeline, lora=LoraAdapter(rank=4, alpha=8)), stock(pipeline)
    groups = groups_for([Prompt("1", PROMPT, {})], seed=0, step=0, count=1, size=4)
    (rollout,) = sampler_on(stocks, policy, 5.0).sample(groups, [FlowPlan(sde_indices=(1,))])
    replay = rollout.replay
    x, sigma, after, g, x_next = (
        torch.from_numpy(getattr(replay, name))
        for name in ("x", "sigma", "sigma_next", "g", "x_next")
    )
    velocity = policy.guided_velocity(x, sigma, policy.encode([PROMPT] * len(x)), 5.0)
    new, old = log_prob(x_next, *sde_step(x, velocity, sigma, after, g)), replay.log_prob
    assert np.array_equal(new.detach().numpy(), old)
    rewards = torch.from_numpy(rollout.media.astype(np.float32)).mean((1, 2, 3, 4))
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.05, weight_decay=0.0)
    (-(advantages * (new - torch.from_numpy(old)).exp()).mean()).backward()
    optimizer.step()
    after_step = ours(stocks, policy, 5.0)
    unchanged = theirs(stocks, after_step, 5.0)
    policy.save(tmp_path, policy.trainable())
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    stocks.load_lora_weights(tmp_path)
    changed = theirs(stocks, after_step, 5.0)
    assert (changed - unchanged).abs().max() > 1e-3
    close(after_step, changed)
    with policy.reference():
        close(ours(stocks, policy, 5.0), unchanged)


def test_whole_weights_load_in_stock(pipeline: Path, tmp_path: Path):
    policy = built(pipeline)
    perturb(policy)
    policy.save(tmp_path, policy.trainable())
    stocks = stock(tmp_path)
    rollout = ours(stocks, policy, 5.0)
    close(rollout, theirs(stocks, rollout, 5.0))
    again = built(tmp_path)
    assert np.array_equal(ours(stocks, again, 5.0).replay.final, rollout.replay.final)


@pytest.mark.parametrize("parameters", ["full_per_step", "shared"])
def test_a_two_step_student_runs_in_stock(pipeline: Path, tmp_path: Path, parameters: Any):
    student = TwoStepPolicy(config(pipeline), parameters, (1.0, 0.8, 0.0))
    perturb(student)
    student.save(tmp_path, student.trainable())
    stocks = stock(tmp_path)
    groups = groups_for([Prompt("1", PROMPT, {})], seed=0, step=0, count=1, size=2)
    sampler = sampler_on(stocks, student, 1.0, steps=2)
    assert sampler.grid.sigmas == pytest.approx((1.0, 0.8, 0.0))
    (rollout,) = sampler.sample(groups, [FlowPlan(keep_final=True)])
    options: dict[str, Any] = {"num_inference_steps": 2}
    if parameters == "full_per_step":
        second = ZImageTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer_2")

        def swap(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            pipe.transformer = second
            return kwargs

        options["callback_on_step_end"] = swap
    close(rollout, theirs(stocks, rollout, 1.0, **options))


def test_what_is_missing_or_does_not_fit_is_named(pipeline: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no vae/config\.json; copy or download it again"):
        config(broken).linear_names()
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    index = json.loads((pipeline / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline, not a ZImagePipeline"):
        config(other).build()
    with pytest.raises(ValueError, match=f"or the hub id {HUB}"):
        config(tmp_path / "nowhere").sizes()
    with pytest.raises(ValidationError, match="height"):
        config(pipeline, height=40)
    with pytest.raises(ValueError, match="match no linear layer"):
        built(pipeline, lora=LoraAdapter(targets=("to_x",)))


def test_a_published_size_is_known_before_it_is_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = ZImageConfig(checkpoint=HUB)
    assert published.latent() == (16, 1, 128, 128) and published.tokens() == 4096
    with torch.device("meta"):
        network = published.network()
    assert sum(p.numel() for p in network.parameters()) == 6_154_908_736
    linears = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(published.linear_names()) < linears
    with pytest.raises(ValueError, match=f"not on this machine: run 'hf download {HUB}'"):
        published.build()
