"""The Wan policy: exactness, adapters, the layouts of the libraries it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from rollout.policies.adapters import LoraAdapter, unmatched_targets
from rollout.policies.digits import moving_digits as moved
from rollout.policies.digits import training_digits
from rollout.policies.wan import WanConfig
from rollout.policies.wan_conditional import WanPolicy


def inputs(policy: WanPolicy, count: int = 9):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, *policy.latent_shape, generator=generator)[:count]
    t = torch.rand(9, generator=generator)[:count]
    return x, t, policy.encode([f"a handwritten {i % 10}" for i in range(count)])


@torch.no_grad()
def velocity(policy: WanPolicy, count: int = 9) -> torch.Tensor:
    return policy.velocity(*inputs(policy, count))


def test_a_sample_does_not_depend_on_its_batch(base_policy: WanPolicy):
    whole = velocity(base_policy)
    for count in range(1, 9):
        assert torch.equal(velocity(base_policy, count), whole[:count])


def test_a_new_adapter_changes_nothing(base_policy: WanPolicy):
    fresh = WanConfig(lora=LoraAdapter()).build()
    torch.testing.assert_close(velocity(fresh), velocity(base_policy), rtol=0, atol=1e-6)
    assert all("lora" in name for name in fresh.trainable())


def test_linear_names_are_the_real_network_s(base_policy: WanPolicy):
    real = [n for n, m in base_policy.module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(WanConfig().linear_names()) == sorted(real)


def test_targets_match_whole_name_parts():
    names = WanConfig().linear_names()
    assert unmatched_targets(["to_q", "to_out.0", "q", "to_x"], names) == ["q", "to_x"]
    with pytest.raises(ValueError, match="match no linear layer"):
        WanConfig(lora=LoraAdapter(targets=("to_q", "nowhere"))).build()


def test_reference_is_the_base(base_policy: WanPolicy, lora_policy: WanPolicy):
    trained = velocity(lora_policy)
    with lora_policy.reference():
        torch.testing.assert_close(velocity(lora_policy), velocity(base_policy), rtol=0, atol=1e-6)
    assert torch.equal(velocity(lora_policy), trained)
    assert not torch.allclose(trained, velocity(base_policy), atol=1e-3)


def test_frozen_reference_of_a_full_policy():
    policy = WanConfig().build(reference=True)
    before = velocity(policy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.05)
    assert not torch.allclose(velocity(policy), before)
    with policy.reference():
        assert torch.equal(velocity(policy), before)


def test_adapter_loads_in_stock_diffusers(lora_policy: WanPolicy, tmp_path: Path):
    lora_policy.save(tmp_path, lora_policy.trainable())
    stock = WanTransformer3DModel.from_pretrained(WanConfig().directory() / "transformer")
    x, t, condition = inputs(lora_policy)

    def out() -> torch.Tensor:
        with torch.no_grad():
            return stock(x, (t * 1000).floor(), condition, return_dict=False)[0]

    plain = out()
    scheduler = UniPCMultistepScheduler()
    pipeline = WanPipeline(None, None, None, scheduler, transformer=stock)  # type: ignore[arg-type]
    pipeline.load_lora_weights(tmp_path)
    assert not torch.allclose(out(), plain, atol=1e-3)
    torch.testing.assert_close(out(), velocity(lora_policy), rtol=0, atol=1e-5)


def test_full_weights_load_in_stock_diffusers(tmp_path: Path):
    policy = WanConfig().build()
    changed = {name: p.detach() * 1.01 for name, p in policy.trainable().items()}
    policy.save(tmp_path, changed)
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, changed[name])
    again = WanConfig(checkpoint=str(tmp_path)).build()
    assert again.latent_shape == (1, 1, 8, 8)


def test_bfloat16_computes_close_and_trains_fp32():
    policy = WanConfig(dtype="bfloat16", lora=LoraAdapter()).build()
    exact = WanConfig(lora=LoraAdapter()).build()
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    difference = (velocity(policy) - velocity(exact)).abs().max().item()
    assert 1e-4 < difference < 0.2


def test_gradient_checkpointing_gives_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        policy = WanConfig(lora=LoraAdapter(), gradient_checkpointing=checkpointing).build()
        policy.velocity(*inputs(policy)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().max() > 0


def test_a_prompt_outside_the_vocabulary_is_refused(base_policy: WanPolicy):
    with pytest.raises(ValueError, match="names 0 of 0, 1"):
        base_policy.encode(["a cat"])


def test_moving_digits_move_by_a_pixel_a_frame():
    images, _ = training_digits()
    clips = moved(images[:4], torch.arange(4).numpy())
    right = clips[1]
    assert (right[1] == images[1]).all()
    assert (right[2][:, 1:] == images[1][:, :-1]).all()
    assert (right[2][:, 0] == -1).all()


def test_video_policy_draws_four_frames(moving_digits: Path):
    policy = WanConfig(checkpoint=str(moving_digits)).build()
    assert policy.latent_shape == (1, 4, 8, 8)
    out = policy.velocity(
        torch.zeros(1, 1, 4, 8, 8), torch.ones(1), policy.encode(["a handwritten 3 moving left"])
    )
    assert out.shape == (1, 1, 4, 8, 8)


def test_an_empty_prompt_is_the_unconditional_branch(base_policy: WanPolicy) -> None:
    encoded = base_policy.encode(["a handwritten 3", "", "a handwritten 4"])
    assert torch.equal(encoded[1:2], base_policy.encode_null(1))
    assert torch.equal(encoded[::2], base_policy.encode(["a handwritten 3", "a handwritten 4"]))
