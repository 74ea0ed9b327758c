"""A frozen base in 8 or 4 bits below an adapter (QLoRA, arXiv 2305.14314), through bitsandbytes.

The projections of the blocks are stored in it, embedding, head and norms are not. A base is quantised
while it is read, by every process for itself and on its own device.

    int8  LLM.int8 (arXiv 2208.07339): a row of the weight has one fp32 scale. On a GPU activations are
          8-bit too, except columns with an outlier above 6 anywhere in the batch; a CPU multiplies in
          the type of the activations.
    nf4   16 levels, a scale for 64 weights; the scales are 8-bit themselves, 256 with one fp32 scale.
          A matrix is brought back to the compute type for each product.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Quantization = Literal["int8", "nf4"]
INSTALL = "needs the package bitsandbytes: pip install 'rectify[quantization]'"
NF4_BLOCK, NF4_SCALES = 64, 256
# The 16 levels and the 256 of the scales, in fp32, and the scales' mean: each layer has its own.
NF4_TABLES = 4 * (16 + 256 + 1)


def installed() -> bool:
    """Whether the package is here; nothing is imported."""
    return find_spec("bitsandbytes") is not None


def quantized_bytes(kind: Quantization, inputs: int, outputs: int) -> int:
    """Bytes of a linear layer's weight with its scales and tables."""
    weights = inputs * outputs
    if kind == "int8":
        return weights + 4 * outputs
    blocks = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // NF4_SCALES) + NF4_TABLES


def bitsandbytes_config(kind: Quantization, compute: torch.dtype, kept: list[str]) -> Any:
    """Transformers' description of it.

    Args:
        compute: type of the products of an nf4 base.
        kept: name beginnings of linear layers that stay as they are.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not installed():
        raise ValueError(f"quantization {kind} {INSTALL}")
    from transformers import BitsAndBytesConfig

    # It tells at every product that bfloat16 is cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=kept,
    )
