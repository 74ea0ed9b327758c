"""The LLaDA policy: its chat template, its adapter, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rollout.policies.adapters import set_trainable
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import HEAD, LladaAdapter, LladaConfig, LladaPolicy
from rollout.policies.llada.pretraining import build_tokenizer, model_sizes
from rollout.policies.llada.tokenizer import BOS, CHAT_TEMPLATE, END, EOS, EOT, MASK, START

RELEASED = "GSAI-ML/LLaDA-8B-Instruct"
# By arithmetic: r (in + out) for each projection of 32 blocks at r = 128.
ALL_SEVEN = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
LLAMA_NAMES = 32 * 128 * (3 * (4096 + 4096) + (4096 + 12288))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded models' own; treat as read-only."""
    return build_tokenizer("sudoku")


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random weights, large enough to move the logits; treat as read-only."""
    directory = tmp_path_factory.mktemp("llada")
    ids = {"mask": MASK, "eos": EOS, "pad": EOS, "bos": BOS}
    tokens = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in ids.items()}
    sizes = {
        **model_sizes("sudoku"),
        "d_model": 64,
        "n_layers": 2,
        "mlp_hidden_size": 96,
        "max_sequence_length": 96,
    }
    model = LLaDAModelLM(LLaDAConfig(**sizes, **tokens))
    fill(dict(model.named_parameters()))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def fill(parameters: dict[str, nn.Parameter], seed: int = 0) -> None:
    """Random values of the size that keeps a layer's output as large as its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[1] ** -0.5)


def build(checkpoint: Path, reference: bool = False, seed: int = 0, **options: Any) -> LladaPolicy:
    config = LladaConfig(checkpoint=str(checkpoint), **options)
    return config.build(seed=seed, reference=reference)


@pytest.fixture(scope="session")
def policy(checkpoint: Path) -> LladaPolicy:
    """All parameters trainable; treat as read-only."""
    return build(checkpoint)


@pytest.fixture
def adapted(checkpoint: Path) -> LladaPolicy:
    """With an adapter whose B is no longer zero."""
    policy = build(checkpoint, lora=LladaAdapter(rank=4, alpha=8))
    fill({name: p for name, p in policy.trainable().items() if "lora_B" in name})
    return policy


def batch(policy: LladaPolicy) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of 16 tokens that end in four masks, the first left-padded; mask and places."""
    tokens = torch.randint(6, 376, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[0, :3], mask[0, :3] = policy.eos_token_id, 0
    tokens[:, 12:] = policy.mask_token_id
    return tokens, mask, tokens == policy.mask_token_id


@torch.no_grad()
def logits(policy: LladaPolicy) -> Tensor:
    """At the eight masks, without the mask's own."""
    found = policy.logits(*batch(policy))
    return found[:, torch.arange(found.shape[1]) != policy.mask_token_id]


@torch.no_grad()
def stock_logits(model: Any, policy: LladaPolicy) -> Tensor:
    """What ``logits`` returns, through a model that another library loaded."""
    tokens, mask, where = batch(policy)
    found = model.eval()(tokens, attention_mask=mask).logits[where]
    return found[:, torch.arange(found.shape[1]) != policy.mask_token_id]


def test_prompts_follow_the_chat_template_to_the_letter(policy: LladaPolicy):
    expected = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
        "Solve 1203, then stop.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for content in ("Solve 1203, then stop.", "\n  Solve 1203, then stop. \n"):
        (ids,) = policy.encode([content])
        assert ids.dtype == torch.int64
        assert policy.tokenizer.decode(ids) == expected
        assert ids.tolist() == policy.tokenizer(expected)["input_ids"]
    named = policy.tokenizer.convert_ids_to_tokens(ids)
    assert [named.count(token) for token in (BOS, START, END, EOT, EOS)] == [1, 2, 2, 1, 0]
    assert named[0] == BOS


def test_several_messages_each_have_a_header(tokenizer: Any):
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
    )


def test_prompts_are_encoded_each_to_its_own_length(policy: LladaPolicy):
    short, long = policy.encode(["1", "1 2 3 4 5 6"])
    assert len(short) < len(long)
    assert torch.equal(short, policy.encode(["1"])[0])


def test_a_prompt_that_leaves_no_room_is_refused(policy: LladaPolicy):
    with pytest.raises(ValueError, match=r"of \d+ tokens does not fit 96: '1 1 1"):
        policy.encode(["1", "1 " * 96])


def test_decoding_ends_at_the_first_eos_and_keeps_the_tags(policy: LladaPolicy):
    texts = [
        "<answer>1234</answer><|eot_id|><|endoftext|> and 5<|endoftext|>",
        "<reasoning>2 + 2 = 4</reasoning> <answer>4</answer>",
        "<|endoftext|>never",
        "<|start_header_id|>a<|mdm_mask|>b<|endoftext|>",
    ]
    rows = [policy.tokenizer(text)["input_ids"] for text in texts]
    length = max(len(row) for row in rows)
    eot = policy.tokenizer.convert_tokens_to_ids(EOT)
    tokens = torch.tensor([row + [eot] * (length - len(row)) for row in rows])
    assert policy.decode(tokens) == [
        "<answer>1234</answer>",
        "<reasoning>2 + 2 = 4</reasoning> <answer>4</answer>",
        "",
        "ab",
    ]


def test_tokenizer_splits_digits_keeps_tags_whole_and_spells_anything(tokenizer: Any):
    assert tokenizer.tokenize("<answer>1203</answer>") == ["<answer>", *"1203", "</answer>"]
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c.isdigit() for c in t)]
    text = "  Привет, 世界\t√2\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= model_sizes("sudoku")["vocab_size"]


def test_a_tokenizer_without_a_template_gets_llada_s(checkpoint: Path, tmp_path: Path):
    directory = tmp_path / "plain"
    shutil.copytree(checkpoint, directory)
    (directory / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(directory).chat_template is None
    assert build(directory).tokenizer.chat_template == CHAT_TEMPLATE


def test_a_place_never_holds_the_mask(policy: LladaPolicy):
    tokens, mask, where = batch(policy)
    found = policy.logits(tokens, mask, where)
    assert found.shape == (8, policy.vocab_size) == (8, 512)
    assert (found[:, policy.mask_token_id] == -torch.inf).all()
    assert found.isinf().sum() == 8
    torch.testing.assert_close(logits(policy), stock_logits(policy.module, policy))


def test_a_span_over_the_policy_s_cache_equals_the_whole(policy: LladaPolicy):
    tokens, mask, where = batch(policy)
    cache = policy.new_cache()
    with torch.no_grad():
        whole = policy.logits(tokens, mask, where, cache)
        span = policy.logits(tokens[:, 10:], mask, where[:, 10:], cache, 10)
    torch.testing.assert_close(span, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (LladaAdapter().targets, 335_544_320),
        (("q_proj", "k_proj", "v_proj", "up_proj"), 167_772_160),
    ],
)
def test_8b_adapter_trains_this_many_and_never_the_head(targets: tuple[str, ...], count: int):
    assert count in (ALL_SEVEN, LLAMA_NAMES)
    lora = LladaAdapter(rank=128, alpha=64, targets=targets)
    with torch.device("meta"):
        network = LLaDAModelLM(LLaDAConfig())
        set_trainable(network, lora, "bfloat16", RELEASED, 0, exclude=[HEAD])
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert len(trained) == 2 * 32 * len(targets)
    assert all(".blocks." in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_a_new_adapter_changes_nothing_and_has_all_seven(checkpoint: Path, policy: LladaPolicy):
    fresh = build(checkpoint, lora=LladaAdapter())
    torch.testing.assert_close(logits(fresh), logits(policy), rtol=0, atol=1e-6)
    assert len(fresh.trainable()) == 2 * 2 * 7
    assert all("lora_" in name for name in fresh.trainable())
    assert all(p.requires_grad for p in policy.module.parameters())


def test_an_adapter_starts_from_its_seed_and_leaves_the_global_one(checkpoint: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    built = [build(checkpoint, seed=seed, lora=LladaAdapter()) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    first, same, other = (next(iter(policy.trainable().values())) for policy in built)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_linear_names_hold_every_target(policy: LladaPolicy):
    linear = {n for n, m in policy.module.named_modules() if isinstance(m, nn.Linear)}
    names = LladaConfig().linear_names()
    assert set(names) == {name for name in linear if ".blocks.0." in name}
    assert {name.rsplit(".", 1)[1] for name in names} == set(LladaAdapter().targets)


def test_a_target_that_matches_nothing_is_refused(checkpoint: Path):
    with pytest.raises(ValueError, match=r"LoRA targets \['o_proj'\] match no linear layer"):
        build(checkpoint, lora=LladaAdapter(targets=("q_proj", "o_proj")))


def test_saved_adapter_loads_in_stock_peft(adapted: LladaPolicy, checkpoint: Path, tmp_path: Path):
    adapted.save(tmp_path, adapted.trainable())
    base = LLaDAModelLM.from_pretrained(checkpoint)
    plain = stock_logits(base, adapted)
    peft = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(stock_logits(peft, adapted), logits(adapted), rtol=0, atol=1e-5)
    assert (plain - logits(adapted)).abs().max() > 0.1
    merged = peft.merge_and_unload()
    torch.testing.assert_close(stock_logits(merged, adapted), logits(adapted), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE


def test_saving_writes_the_weights_it_is_given(
    adapted: LladaPolicy, checkpoint: Path, tmp_path: Path
):
    doubled = {name: 2 * p.detach() for name, p in adapted.trainable().items()}
    adapted.save(tmp_path, doubled)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value.tolist()
        for name, value in written.items()
    } == {name: value.tolist() for name, value in doubled.items()}


def test_a_full_save_loads_as_a_model_and_as_a_checkpoint(checkpoint: Path, tmp_path: Path):
    policy = build(checkpoint)
    before = logits(policy)
    changed = {name: p.detach() * 1.5 for name, p in policy.trainable().items()}
    policy.save(tmp_path, changed)
    assert torch.equal(logits(policy), before)
    stock = AutoModel.from_pretrained(tmp_path)
    assert type(stock) is LLaDAModelLM
    assert load_file(tmp_path / "model.safetensors").keys() == changed.keys()
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, changed[name])
    again = build(tmp_path)
    torch.testing.assert_close(stock_logits(stock, policy), logits(again))
    assert not torch.allclose(logits(again), before, atol=0.1)
    assert torch.equal(again.encode(["1 2"])[0], policy.encode(["1 2"])[0])


def test_reference_of_an_adapted_policy_is_the_base(adapted: LladaPolicy, policy: LladaPolicy):
    trained = logits(adapted)
    with adapted.reference():
        torch.testing.assert_close(logits(adapted), logits(policy), rtol=0, atol=1e-6)
    assert torch.equal(logits(adapted), trained)
    assert (trained - logits(policy)).abs().max() > 0.1


def test_reference_of_a_full_policy_is_a_frozen_copy(checkpoint: Path):
    policy = build(checkpoint, reference=True)
    before = logits(policy)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.5)
    trained = logits(policy)
    with policy.reference():
        assert torch.equal(logits(policy), before)
    assert torch.equal(logits(policy), trained)
    assert not torch.allclose(trained, before, atol=0.1)


def test_a_full_policy_without_a_copy_has_no_reference(policy: LladaPolicy):
    with pytest.raises(ValueError, match="without reference=True"), policy.reference():
        pass


def test_bfloat16_keeps_the_base_in_it_and_the_adapter_in_fp32(
    checkpoint: Path, policy: LladaPolicy
):
    half = build(checkpoint, dtype="bfloat16", lora=LladaAdapter(rank=4))
    assert {p.dtype for p in half.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in half.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    difference = (logits(half) - logits(policy)).abs().max()
    assert 1e-3 < difference < 0.2
    found = half.logits(*batch(half))
    assert found.dtype == torch.float32
    found[:, :5].square().mean().backward()
    gradients = [p.grad for name, p in half.trainable().items() if "lora_B" in name]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients)


def test_bfloat16_without_an_adapter_keeps_fp32_parameters(checkpoint: Path, policy: LladaPolicy):
    half = build(checkpoint, dtype="bfloat16")
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}
    assert 1e-3 < (logits(half) - logits(policy)).abs().max() < 0.2


def test_gradient_checkpointing_gives_the_adapter_the_same_gradient(checkpoint: Path):
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        lora = LladaAdapter(rank=4)
        policy = build(checkpoint, lora=lora, gradient_checkpointing=checkpointing)
        assert policy.module.is_gradient_checkpointing is checkpointing
        policy.logits(*batch(policy))[:, :5].square().mean().backward()
        found = [p.grad for name, p in policy.trainable().items() if "lora_B" in name]
        gradients.append([gradient for gradient in found if gradient is not None])
    assert len(gradients[0]) == 14
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("change", ["lost", "left over"])
def test_a_checkpoint_that_is_not_exactly_the_model_is_refused(
    checkpoint: Path, tmp_path: Path, change: str
):
    directory = tmp_path / "broken"
    shutil.copytree(checkpoint, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.transformer.blocks.1.up_proj.weight"
    if change == "lost":
        del tensors[name]
    else:
        name = "model.transformer.blocks.1.q_norm.weight"
        tensors[name] = torch.ones(64)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing or left over: {name}"):
        build(directory)


def test_a_directory_without_a_tokenizer_is_refused(checkpoint: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        build(tmp_path)


def test_a_checkpoint_is_a_name_a_directory_or_a_hub_id(checkpoint: Path, tmp_path: Path):
    assert LladaConfig(checkpoint=str(checkpoint)).directory() == checkpoint
    with pytest.raises(ValueError, match=r"has no config\.json; give sudoku or countdown"):
        LladaConfig(checkpoint=str(tmp_path)).directory()
    with pytest.raises(ValueError, match="is not in the local hub cache"):
        LladaConfig(checkpoint="nobody/nothing").directory()
    on_hub = {RELEASED: True, "./a": False, "sudoku": False, str(checkpoint): False}
    assert {name: LladaConfig(checkpoint=name).on_hub for name in on_hub} == on_hub


def test_sizes_are_known_before_the_weights_are_here(checkpoint: Path):
    assert LladaConfig().sizes() == model_sizes("sudoku")
    written = json.loads((checkpoint / "config.json").read_text())
    assert LladaConfig(checkpoint=str(checkpoint)).sizes() == written
    released = LladaConfig(checkpoint=RELEASED).sizes()
    assert (released["n_layers"], released["vocab_size"]) == (32, 126464)
    with pytest.raises(ValueError, match="is not in the local hub cache"):
        LladaConfig(checkpoint="nobody/nothing").sizes()
