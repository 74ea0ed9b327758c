"""Looped models: the same blocks again, what a cache holds of them, and what more loops are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from pytest import MonkeyPatch
from test_llada_model import SPANS, logits, padded, small, tokens
from test_masked_sampler import PROMPTS, decode, equal, groups_of
from torch import Tensor

from rollout.policies.llada import pretraining
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import KeyValueCache, LLaDAModelLM
from rollout.policies.llada.policy import LladaAdapter, LladaConfig, LladaPolicy
from rollout.policies.llada.pretraining import build_tokenizer, loop_losses, model_sizes, train_base

LOOPS = 3
LAYERS = 2


def looped(loops: int = LOOPS, **changes: Any) -> LLaDAModelLM:
    """The same weights for every number of loops."""
    return small(n_layers=LAYERS, loops=loops, **changes)


def stacked(model: LLaDAModelLM, loops: int) -> LLaDAModelLM:
    """The blocks of ``model`` written out ``loops`` times, without loops."""
    deep = small(n_layers=loops * LAYERS)
    weights = model.state_dict()
    for name in deep.state_dict().keys() - weights.keys():
        parts = name.split(".")
        parts[3] = str(int(parts[3]) % LAYERS)
        weights[name] = weights[".".join(parts)]
    deep.load_state_dict(weights)
    return deep


def checkpoint(directory: Path, loops: int) -> str:
    """Random weights, large enough that a place's prediction depends on all others."""
    tokenizer = build_tokenizer("sudoku")
    sizes = {**model_sizes("sudoku"), "d_model": 32, "n_layers": 1, "initializer_range": 0.2}
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = LLaDAModelLM(LLaDAConfig(**sizes, **ids, pad_token_id=None, loops=loops))
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a model of three loops; treat as read-only."""
    return checkpoint(tmp_path_factory.mktemp("looped"), loops=LOOPS)


@torch.no_grad()
def policy_logits(policy: LladaPolicy) -> Tensor:
    ids = tokens()
    return policy.logits(ids, None, ids > 0)


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_loops_are_the_same_blocks_stacked(loops: int):
    model, (ids, mask) = looped(loops), padded()
    deep = stacked(model, loops)
    assert torch.equal(logits(model, ids, mask), logits(deep, ids, mask))
    where = ids % 3 == 0
    every = logits(looped(), ids, mask, where=where, every_loop=True)
    assert torch.equal(every[loops - 1], logits(deep, ids, mask, where=where))
    assert every.shape == (LOOPS, int(where.sum()), 64)
    assert (every[1:] - every[:-1]).abs().mean(dim=(1, 2)).min() > 0.1


def test_a_gradient_goes_through_every_loop():
    """It is the sum over the copies of the stacked model."""
    model, (ids, mask) = looped(), padded()
    deep = stacked(model, LOOPS)
    for network in (model, deep):
        network(ids, attention_mask=mask).logits.square().mean().backward()
    name = "model.transformer.blocks.{}.q_proj.weight"
    for layer in range(LAYERS):
        own = (deep.get_parameter(name.format(layer + LAYERS * i)).grad for i in range(LOOPS))
        copies = torch.stack([gradient for gradient in own if gradient is not None])
        assert copies.abs().amax(dim=(1, 2)).min() > 1e-4
        torch.testing.assert_close(model.get_parameter(name.format(layer)).grad, copies.sum(0))


def test_checkpointed_loops_give_the_same_gradient():
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        model, (ids, mask) = looped().train(), padded()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, attention_mask=mask).logits.square().mean().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*gradients)


def test_one_loop_is_the_model_without_loops():
    """Written out: embedding, every block once, final norm, head; and no key of its own."""
    model, ids = small(), tokens()
    parts: Any = model.model.transformer
    calls: list[tuple[Any, ...]] = []
    for block in parts["blocks"]:
        block.register_forward_pre_hook(lambda block, args: calls.append((block, *args)))
    found = logits(model, ids)
    assert [call[0] for call in calls] == list(parts["blocks"])
    with torch.no_grad():
        x = parts["wte"](ids)
        for block in parts["blocks"]:
            x = block(x, *calls[0][2:])
        assert torch.equal(parts["ff_out"](parts["ln_f"](x)), found)
    assert "loops" not in model.config.to_dict()
    assert looped(1).config.to_dict() == model.config.to_dict()
    assert looped().config.to_dict() == model.config.to_dict() | {"loops": LOOPS}
    with pytest.raises(ValueError, match="loops is 0"):
        looped(0)


@SPANS
def test_a_span_over_the_cache_of_the_same_tokens_equals_the_full_forward(start: int, stop: int):
    model, (ids, mask), cache = looped(), padded(), KeyValueCache()
    full = logits(model, ids, mask, cache=cache)
    assert torch.equal(full, logits(model, ids, mask))
    assert len(cache.layers) == LOOPS * LAYERS
    span = logits(model, ids[:, start:stop], mask, cache=cache, start=start)
    torch.testing.assert_close(span, full[:, start:stop], rtol=0, atol=1e-5)
    assert len(cache.layers) == LOOPS * LAYERS


def test_caches_decode_the_same_where_nothing_goes_stale(trained: str):
    policy, groups = LladaConfig(checkpoint=trained).build(), groups_of(*PROMPTS, size=2)
    config = {"length": 24, "block_length": 8, "steps": 3}
    plain, prefix, dual = (
        decode(policy, groups, cache=cache, **config) for cache in ("none", "prefix", "dual")
    )
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(plain, prefix, dual, strict=True))
    once = decode(LladaConfig(checkpoint=trained, loops=1).build(), groups, **config)
    assert not any(equal(a, b) for a, b in zip(plain, once, strict=True))


def test_the_switch_sets_the_loops_of_every_forward(trained: str):
    own = LladaConfig(checkpoint=trained).build()
    for loops in (1, 2, 5):
        policy = LladaConfig(checkpoint=trained, loops=loops).build(reference=True)
        every = LladaConfig(checkpoint=trained, loops=5).build().module
        ids = tokens()
        expected = logits(every, ids, None, where=ids > 0, every_loop=True)[loops - 1]
        expected[:, policy.mask_token_id] = -torch.inf
        assert torch.equal(policy_logits(policy), expected)
        with policy.reference():
            assert torch.equal(policy_logits(policy), expected)
        assert not torch.allclose(policy_logits(own), expected)
    same = LladaConfig(checkpoint=trained, loops=LOOPS).build()
    assert torch.equal(policy_logits(same), policy_logits(own))


def test_an_adapter_goes_on_looped_blocks(trained: str):
    plain = LladaConfig(checkpoint=trained, loops=2).build()
    adapted = LladaConfig(checkpoint=trained, loops=2, lora=LladaAdapter(rank=2)).build()
    assert torch.equal(policy_logits(adapted), policy_logits(plain))


@pytest.mark.parametrize("loops", [1, 4])
def test_a_saved_model_keeps_its_loops(trained: str, tmp_path: Path, loops: int):
    policy = LladaConfig(checkpoint=trained, loops=loops).build()
    policy.save(tmp_path, dict(policy.trainable()))
    again = LladaConfig(checkpoint=str(tmp_path)).build()
    assert again.module.config.loops == loops
    assert torch.equal(policy_logits(again), policy_logits(policy))


def test_more_loops_than_were_ever_trained_are_refused(tmp_path: Path):
    plain = checkpoint(tmp_path, loops=1)
    assert LladaConfig(checkpoint=plain, loops=1).build().module.config.loops == 1
    with pytest.raises(ValueError, match=r"not trained in loops: policy\.loops is 2"):
        LladaConfig(checkpoint=plain, loops=2).build()
    with pytest.raises(ValidationError):
        LladaConfig(loops=0)


def counting(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that count up modulo 8, three of four hidden (token 8): noised, hidden, clean."""
    clean = (torch.randint(8, (rows, 1), generator=generator) + torch.arange(12)) % 8
    hidden = torch.rand(rows, 12, generator=generator) < 0.75
    return clean.masked_fill(hidden, 8), hidden, clean


def losses_by_loops(trained_loops: int) -> list[float]:
    """Held-out loss with 1 to 4 loops of one block, after 100 steps with ``trained_loops``."""
    sizes: dict[str, Any] = {
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 1,
        "mlp_hidden_size": 64,
        "vocab_size": 9,
        "embedding_size": 9,
        "mask_token_id": 8,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_theta": 100.0,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LLaDAModelLM(LLaDAConfig(**sizes, loops=trained_loops))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, 100)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        noised, hidden, clean = counting(generator, 64)
        optimizer.zero_grad()
        loop_losses(model, noised, None, hidden, clean).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    noised, hidden, clean = counting(generator, 512)
    model.config.loops = 4
    with torch.no_grad():
        return loop_losses(model, noised, None, hidden, clean).mean(1).tolist()


def test_more_loops_lower_the_loss_of_a_model_trained_in_loops_and_of_no_other():
    """Trained in 3 loops: .35, .18, .15, and .15 in a fourth. In 1 loop: .35, then worse."""
    one, two, three, four = losses_by_loops(LOOPS)
    assert one > 1.5 * two > 1.5 * 1.1 * three
    assert max(three, four) < 0.6 * one
    untrained = losses_by_loops(1)
    assert untrained[0] == pytest.approx(one, rel=0.1)
    assert untrained[1] > 1.3 * untrained[0]


def test_the_loss_of_a_loop_is_that_of_a_model_of_so_many():
    ids, (_, mask) = tokens(), padded()
    hidden = ids % 2 == 0
    with torch.no_grad():
        found = loop_losses(looped(), ids.masked_fill(hidden, 59), mask, hidden, ids)
        for loops in (1, 2, 3):
            out = logits(looped(loops), ids.masked_fill(hidden, 59), mask)[hidden]
            expected = -out.log_softmax(1).gather(1, ids[hidden][:, None])[:, 0]
            torch.testing.assert_close(found[loops - 1], expected)


def test_an_embedded_task_can_be_trained_in_loops(monkeypatch: MonkeyPatch):
    monkeypatch.setattr(pretraining, "BATCH", 4)
    tokenizer = build_tokenizer("sudoku")
    model = train_base("sudoku", tokenizer, 3, loops=2)
    assert model.config.loops == 2
    plain = train_base("sudoku", tokenizer, 3)
    assert plain.config.loops == 1
    name = "model.transformer.blocks.0.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), plain.get_parameter(name))
