"""The LLaDA transformer: released names and sizes, its numbers against loops, spans over a cache."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import KeyValueCache, LLaDAModelLM

# config.json of GSAI-ML/LLaDA-8B-Instruct.
RELEASED: dict[str, Any] = json.loads("""{
    "activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": false,
    "attention_layer_norm_with_affine": true,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM"
    },
    "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081,
    "flash_attention": false, "include_bias": false, "include_qkv_bias": false,
    "init_cutoff_factor": null, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true,
    "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4,
    "model_type": "llada", "multi_query_attention": null, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05, "rope": true, "rope_full_precision": true, "rope_theta": 500000.0,
    "scale_logits": false, "transformers_version": "4.46.3", "use_cache": false,
    "vocab_size": 126464, "weight_tying": false
}""")
# What transformers 5 writes its own way.
NOT_KEPT = {"transformers_version", "use_cache"}
SMALL: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 60,
    "embedding_size": 64,
    "max_sequence_length": 32,
    "mask_token_id": 59,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Of a row of 12 in ``padded``; the other row has no padding.
PADDING = 5


def small_config(**changes: Any) -> LLaDAConfig:
    return LLaDAConfig(**(SMALL | changes))


def small(**changes: Any) -> LLaDAModelLM:
    """A model whose weights are large enough that every part of it moves the logits."""
    model = LLaDAModelLM(small_config(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.mul_(float(parameter.ndim == 1)).add_(scale * noise)
    return model


@pytest.fixture(scope="module")
def model() -> LLaDAModelLM:
    """Treat as read-only."""
    return small()


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 59, (rows, length), generator=torch.Generator().manual_seed(1))


def padded() -> tuple[Tensor, Tensor]:
    """Two rows of 12 and their mask; the first row begins with padding."""
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    ids[0, :PADDING], mask[0, :PADDING] = 1, 0
    return ids, mask


@torch.no_grad()
def logits(model: LLaDAModelLM, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    return model(ids, attention_mask=mask, **more).logits


def released_shapes(width: int, hidden: int, layers: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The table of tensors of the released checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.weight": (rows, width),
        "model.transformer.ln_f.weight": (width,),
        "model.transformer.ff_out.weight": (rows, width),
    }
    for i in range(layers):
        block = f"model.transformer.blocks.{i}"
        shapes[f"{block}.attn_norm.weight"] = (width,)
        shapes[f"{block}.q_proj.weight"] = (width, width)
        shapes[f"{block}.k_proj.weight"] = (width, width)
        shapes[f"{block}.v_proj.weight"] = (width, width)
        shapes[f"{block}.attn_out.weight"] = (width, width)
        shapes[f"{block}.ff_norm.weight"] = (width,)
        shapes[f"{block}.ff_proj.weight"] = (hidden, width)
        shapes[f"{block}.up_proj.weight"] = (hidden, width)
        shapes[f"{block}.ff_out.weight"] = (width, hidden)
    return shapes


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(RELEASED | changes))
    return directory


def test_8b_has_the_released_names_shapes_and_parameters():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == released_shapes(4096, 12288, 32, 126464)
    assert len(shapes) == 291
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_015_581_184


def test_released_config_loads_without_remote_code_and_keeps_what_it_does_not_know(tmp_path: Path):
    config = AutoConfig.from_pretrained(write_config(tmp_path))
    assert type(config) is LLaDAConfig
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    for key in RELEASED.keys() - NOT_KEPT:
        assert getattr(config, key) == RELEASED[key] == saved[key], key


def test_defaults_are_the_released_8b():
    config = LLaDAConfig()
    for key in vars(config).keys() & RELEASED.keys() - {"architectures", *NOT_KEPT}:
        assert getattr(config, key) == RELEASED[key], key
    assert (config.hidden_size, config.num_key_value_heads) == (4096, 32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("weight_tying", True),
        ("activation_type", "gelu"),
        ("layer_norm_type", "default"),
        ("block_type", "sequential"),
        ("rope", False),
        ("alibi", True),
        ("attention_layer_norm", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
    ],
)
def test_a_variant_that_is_not_computed_is_refused_by_its_key(
    tmp_path: Path, key: str, value: object
):
    with pytest.raises(ValueError, match=rf"\b{key} is {value!r}"):
        AutoConfig.from_pretrained(write_config(tmp_path, **{key: value}))


def test_a_norm_is_fp32_and_its_weight_comes_after_the_cast(model: LLaDAModelLM):
    norm: Any = copy.deepcopy(model.model.transformer["ln_f"]).bfloat16()
    x = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = reference_norm(x.double(), torch.ones(32).double(), 1e-5).float()
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)


@pytest.mark.parametrize("heads", [{"n_heads": 3, "n_kv_heads": 3}, {"n_kv_heads": 3}])
def test_heads_that_do_not_divide_are_refused(heads: dict[str, int]):
    with pytest.raises(ValueError, match="do not divide d_model 32"):
        small_config(**heads)


def test_null_in_the_config_means_as_many_kv_heads_and_rows_as_there_are():
    found = small_config(n_kv_heads=None, embedding_size=None)
    assert (found.n_kv_heads, found.embedding_size) == (4, 60)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_map_without_remote_code_gives_this_class(
    tmp_path: Path, model: LLaDAModelLM, auto: Any
):
    model.save_pretrained(tmp_path)
    write_config(tmp_path, **SMALL)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAModelLM
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_shards_hold_exactly_the_released_names_and_load_again(tmp_path: Path, model: LLaDAModelLM):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = released_shapes(32, 48, 2, 64)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == 4 * sum(math.prod(s) for s in expected.values())
    found: dict[str, tuple[int, ...]] = {}
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
                found[name] = tuple(shard.get_slice(name).get_shape())
    assert len(files) > 1
    assert found == expected
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_turn(vector: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one head's vector: coordinates i and i + half turn by position theta^(-2i/size)."""
    size = len(vector)
    turned = torch.empty_like(vector)
    for i in range(size // 2):
        angle = position * theta ** (-2 * i / size)
        a, b = vector[i], vector[i + size // 2]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: list[int], real: list[int], config: LLaDAConfig
) -> Tensor:
    """Head by head and place by place, over the ``real`` keys only; q (T, width)."""
    assert config.n_kv_heads is not None
    size = config.d_model // config.n_heads
    out = torch.zeros_like(q)
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)
        span, kv_span = slice(head * size, (head + 1) * size), slice(shared * size, None)
        keys = [reference_turn(k[j, kv_span][:size], positions[j], config.rope_theta) for j in real]
        values = v[real][:, kv_span][:, :size]
        for i, position in enumerate(positions):
            query = reference_turn(q[i, span], position, config.rope_theta)
            scores = torch.stack([query @ key / math.sqrt(size) for key in keys]).exp()
            out[i, span] = scores / scores.sum() @ values
    return out


def reference_logits(model: LLaDAModelLM, ids: Tensor, mask: Tensor) -> Tensor:
    """LLaDA in fp64 by the formulas of the released description, one row (T,)."""
    config = model.config
    weights = {
        name.removeprefix("model.transformer.").removesuffix(".weight"): value.double()
        for name, value in model.state_dict().items()
    }
    real = [j for j in range(len(ids)) if mask[j]]
    positions = [max(sum(mask[: i + 1].tolist()) - 1, 0) for i in range(len(ids))]
    x = weights["wte"][ids]
    for layer in range(config.n_layers):
        own = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        h = reference_norm(x, own["attn_norm"], config.rms_norm_eps)
        q, k, v = (h @ own[name].T for name in ("q_proj", "k_proj", "v_proj"))
        x = x + reference_attention(q, k, v, positions, real, config) @ own["attn_out"].T
        h = reference_norm(x, own["ff_norm"], config.rms_norm_eps)
        gate = h @ own["ff_proj"].T
        x = x + (gate / (1 + (-gate).exp()) * (h @ own["up_proj"].T)) @ own["ff_out"].T
    return reference_norm(x, weights["ln_f"], config.rms_norm_eps) @ weights["ff_out"].T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_equal_the_formulas_written_out(kv_heads: int):
    model = small(n_kv_heads=kv_heads, rope_theta=100.0)
    ids, mask = padded()
    found = logits(model, ids, mask)
    for row in range(2):
        expected = reference_logits(model, ids[row], mask[row])
        chosen = mask[row].bool()
        torch.testing.assert_close(found[row][chosen].double(), expected[chosen], rtol=0, atol=1e-5)
        assert expected[chosen].std() > 0.5


def test_a_left_padded_row_is_computed_as_it_would_be_alone(model: LLaDAModelLM):
    ids, mask = padded()
    batch = logits(model, ids, mask)
    torch.testing.assert_close(batch[1:], logits(model, ids[1:]), rtol=0, atol=1e-5)
    alone = logits(model, ids[:1, PADDING:])
    torch.testing.assert_close(batch[:1, PADDING:], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, ids)[:1, PADDING:], alone, atol=1e-1)


def test_positions_count_real_tokens_wherever_the_padding_is():
    model = small(rope_theta=100.0)
    ids, mask = tokens(1), torch.ones(1, 12)
    mask[0, [2, 3, 8]] = 0
    real = mask.bool()
    found = logits(model, ids, mask)[real]
    torch.testing.assert_close(found, logits(model, ids[real][None])[0], rtol=0, atol=1e-5)


def test_padding_tokens_are_never_looked_at(model: LLaDAModelLM):
    ids, mask = padded()
    other = ids.clone()
    other[0, :PADDING] = 7
    first, second = logits(model, ids, mask), logits(model, other, mask)
    assert torch.equal(first[0, PADDING:], second[0, PADDING:])


def test_a_mask_of_ones_is_no_mask(model: LLaDAModelLM):
    found = logits(model, tokens(), torch.ones(2, 12))
    torch.testing.assert_close(found, logits(model, tokens()), rtol=0, atol=1e-5)


def test_attention_looks_both_ways(model: LLaDAModelLM):
    ids = tokens()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 59
    moved = (logits(model, changed) - logits(model, ids)).abs().amax(dim=2)
    assert (moved > 1e-4).all()


def test_where_gives_the_same_logits_at_fewer_places(model: LLaDAModelLM):
    ids, mask = padded()
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    whole = logits(model, ids, mask)
    assert whole.shape == (2, 12, 64)
    torch.testing.assert_close(logits(model, ids, mask, where=where), whole[where])


SPANS = pytest.mark.parametrize(("start", "stop"), [(4, 12), (4, 8)], ids=["prefix", "dual"])


@SPANS
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_span_over_the_cache_of_the_same_tokens_equals_the_full_forward(
    start: int, stop: int, with_padding: bool, kv_heads: int
):
    model = small(n_kv_heads=kv_heads)
    ids, mask = padded() if with_padding else (tokens(), None)
    cache = KeyValueCache()
    full = logits(model, ids, mask, cache=cache)
    torch.testing.assert_close(full, logits(model, ids, mask))
    span = logits(model, ids[:, start:stop], mask, cache=cache, start=start)
    torch.testing.assert_close(span, full[:, start:stop], rtol=0, atol=1e-5)


@SPANS
def test_a_span_s_new_tokens_replace_theirs_in_the_cache(start: int, stop: int):
    model = small(n_layers=1)  # one layer: keys depend on their own token only, so nothing is stale
    ids, mask = padded()
    cache = KeyValueCache()
    logits(model, ids, mask, cache=cache)
    ids[:, start + 1 : stop] = 33
    span = logits(model, ids[:, start:stop], mask, cache=cache, start=start)
    fresh = KeyValueCache()
    expected = logits(model, ids, mask, cache=fresh)[:, start:stop]
    torch.testing.assert_close(span, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cache.layers, fresh.layers, rtol=0, atol=1e-5)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient():
    gradients: list[list[Tensor]] = []
    calls: list[int] = []
    for checkpointing in (False, True):
        model = small().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seen: list[object] = []
        model.get_submodule("model.transformer.blocks.0.q_proj").register_forward_hook(
            lambda *_, seen=seen: seen.append(None)
        )
        ids, mask = padded()
        model(ids, attention_mask=mask, where=ids > 9).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        calls.append(len(seen))
    assert calls == [1, 2]
    assert len(gradients[0]) == 21
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
