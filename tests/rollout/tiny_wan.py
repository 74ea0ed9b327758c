"""Small Wan pipelines with random weights, of the real classes, in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "walks",
    "runs",
    "over",
    "grass",
    "snow",
    "&",
    "<",
    "ugly",
    "blurred",
    ".",
]
HEIGHT, WIDTH, FRAMES = 32, 16, 5
STEPS = 4


def transformer(text_dim: int = 16) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=text_dim,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 2.3, 0.9],
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; it ends a text with </s>, as UMT5's own does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def scheduler(euler: bool) -> Any:
    """Stock's Euler, or the published UniPC where it is Euler: first order without corrector."""
    if euler:
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=list(range(STEPS)),
    )


def write_pipeline(directory: Path, two: bool = False, euler: bool = False) -> Path:
    """A pipeline; with ``two`` transformers as Wan2.2's. Weights are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = UMT5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.1
        )
        pipeline = WanPipeline(
            tokenizer=tokenizer(),
            text_encoder=UMT5EncoderModel(sizes).eval(),
            vae=vae(),
            scheduler=scheduler(euler),
            transformer=transformer(),
            transformer_2=transformer() if two else None,
            boundary_ratio=0.875 if two else None,
        )
    pipeline.save_pretrained(directory)
    return directory


def stock(directory: Path) -> Any:
    """Stock's own, quiet."""
    pipeline: Any = WanPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
