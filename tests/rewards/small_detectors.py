"""Small random detectors and a CLIP, saved as transformers' own are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from test_clip_score import CHARACTERS, save_clip
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    ResNetConfig,
    SwinConfig,
)

CLASSES = {0: "cat", 1: "dog", 2: "Mouse"}
TRANSFORMER: dict[str, Any] = {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "image_size": 64,
}


def save_all(directory: Path) -> Path:
    """mask2former, detr, owlv2, dino and clip; seeds for which more than one class is found."""
    with torch.random.fork_rng(devices=[]):
        for seed, save, name in (
            (4, save_mask2former, "mask2former"),
            (7, save_detr, "detr"),
            (0, save_owlv2, "owlv2"),
            (6, save_grounding_dino, "dino"),
            (0, save_long_clip, "clip"),
        ):
            torch.manual_seed(seed)
            save(directory / name)
    return directory


def save_louder(model: Any, directory: Path) -> None:
    """With larger weights: what random ones see has to show in their objects."""
    loud = ("quer", "class_", "bbox", "mask_embed")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if any(part in name for part in loud) else 0.2
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(directory)


def swin(*stages: str) -> dict[str, Any]:
    config: dict[str, Any] = {**SWIN, "out_features": list(stages)}
    return SwinConfig(**config).to_dict()


def save_mask2former(directory: Path) -> None:
    config = Mask2FormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_queries=8,
        id2label=CLASSES,
        **TRANSFORMER,
    )
    save_louder(Mask2FormerForUniversalSegmentation(config), directory)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(directory)


def save_detr(directory: Path) -> None:
    resnet: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1] * 4,
        "out_features": ["stage4"],
    }
    config = DetrConfig(
        backbone_config=ResNetConfig(**resnet).to_dict(),
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        id2label=CLASSES,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_layers=1,
        decoder_layers=1,
    )
    save_louder(DetrForObjectDetection(config), directory)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(directory)


def save_owlv2(directory: Path) -> None:
    words = ["!", "<|startoftext|>", "<|endoftext|>"]
    words += [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    tower: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Owlv2Config(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    save_louder(Owlv2ForObjectDetection(config), directory)
    tokenizer = CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[], pad_token="!", model_max_length=24
    )
    images = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(directory)


def save_grounding_dino(directory: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog", "computer", "mouse"]
    config = GroundingDinoConfig(
        backbone_config=swin("stage2", "stage3", "stage4"),
        text_config={
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": len(words),
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
        max_text_len=32,
    )
    save_louder(GroundingDinoForObjectDetection(config), directory)
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(directory)


def save_long_clip(directory: Path) -> None:
    """One that reads GenEval's texts whole, letter by letter."""
    save_clip(directory)
    config: Any = CLIPConfig.from_pretrained(directory)
    config.text_config.max_position_embeddings = 48
    save_louder(CLIPModel(config), directory)
