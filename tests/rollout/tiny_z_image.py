"""Small Z-Image pipelines with random weights, of the real classes, in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.rollout.tiny_wan import WORDS

HEIGHT, WIDTH = 32, 16
STEPS = 4
# Of the published tokenizer only the turn is kept: one that asks, one that answers.
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def transformer() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
        axes_lens=[640, 32, 32],
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # The pad tokens are zeros in the class, and no zeros in a trained model.
            if name.endswith("pad_token"):
                parameter.normal_(std=0.5)
    return network


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", *WORDS]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def write_pipeline(directory: Path) -> Path:
    """A pipeline; weights are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = Qwen3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        pipeline = ZImagePipeline(
            tokenizer=tokenizer(),
            text_encoder=Qwen3Model(sizes).eval(),
            vae=vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer(),
        )
    pipeline.save_pretrained(directory)
    return directory


def stock(directory: Path) -> Any:
    """Stock's own, quiet."""
    pipeline: Any = ZImagePipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
