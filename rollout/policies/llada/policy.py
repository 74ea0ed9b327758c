"""LLaDA as a policy: embedded small models, or a directory (or hub id) in the released layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from rollout.masked import end_at_eos
from rollout.policies.adapters import LoraAdapter, set_trainable
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.loading import HEAD, load_network, stored_tensors
from rollout.policies.llada.quantization import Quantization

EMBEDDED = ("sudoku", "countdown")
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


class LladaAdapter(LoraAdapter, frozen=True, extra="forbid"):
    """A low-rank adapter on all seven projections of every block."""

    rank: int = Field(default=16, gt=0, description="Rank r.")
    alpha: int = Field(default=32, gt=0, description="Scale; the update is alpha/rank B A.")
    targets: tuple[str, ...] = Field(
        default=BLOCK_LINEARS,
        min_length=1,
        description="Name endings of the linear layers that get an adapter.",
    )


class LladaConfig(BaseModel, frozen=True, extra="forbid"):
    """A LLaDA: an embedded small model, or a checkpoint in the released layout."""

    kind: Literal["llada"] = "llada"
    checkpoint: str = Field(
        default="sudoku",
        description="sudoku, countdown (embedded, trained once and cached), a directory, or a hub "
        "id such as GSAI-ML/LLaDA-8B-Instruct.",
    )
    lora: LladaAdapter | None = Field(
        default=None, description="Train an adapter; without it all parameters train."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Compute type of the forward; trained parameters stay fp32."
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Keep the frozen base below an adapter in 8 bits (int8) or 4 (nf4); needs "
        "bitsandbytes. None: in the compute type.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass."
    )
    loops: int | None = Field(
        default=None,
        ge=1,
        description="Times that a forward goes through the blocks of a looped model, a saved model's "
        "own from then on; none: as it was trained.",
    )

    @model_validator(mode="after")
    def _adapted(self) -> Self:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization: {self.quantization} weights do not train; give lora, or leave it out"
            )
        return self

    def directory(self) -> Path:
        """Where the weights are, or for an embedded model will be after ``prepare``.

        Raises:
            ValueError: neither an embedded name nor a directory in the released layout, nor a
                hub id whose files are in the local cache.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.llada.pretraining import cached_directory

            return cached_directory(self.checkpoint)
        path = Path(self.checkpoint)
        if (path / "config.json").is_file():
            return path
        if self.on_hub:
            return _cached_on_hub(self.checkpoint)
        raise ValueError(
            f"{path} has no config.json; give {' or '.join(EMBEDDED)}, a directory in LLaDA's "
            "layout, or a hub id (owner/name)"
        )

    @property
    def on_hub(self) -> bool:
        """Whether ``checkpoint`` reads like a hub id and is no directory here."""
        path = Path(self.checkpoint)
        return (
            self.checkpoint.count("/") == 1
            and self.checkpoint[0] not in "./~"
            and (not path.is_dir())
        )

    def linear_names(self) -> list[str]:
        """Names of the linear layers an adapter can go on, without building the network.

        Raises:
            ValueError: the checkpoint is not here and is no hub id either, or is not whole.
        """
        if not self.on_hub and self.checkpoint not in EMBEDDED:
            stored_tensors(self.directory())
        return [f"model.transformer.blocks.0.{name}" for name in BLOCK_LINEARS]

    def sizes(self) -> dict[str, Any]:
        """The keys of ``config.json``; for a released 8B model that is not here, its known ones.

        Raises:
            ValueError: the checkpoint is neither here nor known.
        """
        if self.checkpoint in EMBEDDED:
            from rollout.policies.llada.pretraining import model_sizes

            return model_sizes(self.checkpoint)
        try:
            return json.loads((self.directory() / "config.json").read_text())
        except ValueError:
            if self.on_hub and self.checkpoint.startswith("GSAI-ML/LLaDA-"):
                from rollout.policies.llada.configuration import LLaDAConfig

                return LLaDAConfig().to_dict()
            raise

    def prepare(self) -> Path:
        """Make the weights available on this machine (trains an embedded model once)."""
        if self.checkpoint in EMBEDDED:
            from rollout.policies.llada.pretraining import ensure_base

            return ensure_base(self.checkpoint)
        if self.on_hub:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self.checkpoint))
        return self.directory()

    def build(self, device: str = "cpu", seed: int = 0, reference: bool = False) -> LladaPolicy:
        """The policy on ``device``.

        Args:
            device: torch device.
            seed: starts a new adapter.
            reference: keep what ``Policy.reference`` needs (a frozen copy, if all trains).
        """
        return LladaPolicy(self, self.prepare(), device, seed, reference)


def _cached_on_hub(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise ValueError(f"{name} is not in the local hub cache; it is fetched when a run starts")
    return Path(found).parent


def set_loops(network: Any, loops: int, directory: Path) -> None:
    """Go through the blocks ``loops`` times in every forward from now on.

    Raises:
        ValueError: more than once, and the blocks were never trained to be gone through again.
    """
    if loops > 1 and network.config.loops == 1:
        raise ValueError(
            f"{directory} was not trained in loops: policy.loops is {loops}, must be 1"
        )
    network.config.loops = loops


class LladaPolicy(MaskedDiffusionPolicy):
    """The transformer with its tokenizer."""

    def __init__(
        self, config: LladaConfig, directory: Path, device: str, seed: int, reference: bool
    ) -> None:
        from rollout.policies.llada.tokenizer import load_tokenizer

        self.config = config
        self.tokenizer: Any = load_tokenizer(directory)
        half = config.dtype == "bfloat16" and config.lora is not None
        dtype = torch.bfloat16 if half else torch.float32
        network = load_network(directory, dtype, device, config.quantization)
        if config.loops is not None:
            set_loops(network, config.loops, directory)
        self.mask_token_id = network.config.mask_token_id
        self.eos_token_id = network.config.eos_token_id
        self.vocab_size = network.config.embedding_size
        self.prompt_limit: int = network.config.max_sequence_length
        network.train()
        if config.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        module = set_trainable(
            network, config.lora, config.dtype, config.checkpoint, seed, exclude=[HEAD]
        ).to(device)
        super().__init__(module, adapted=config.lora is not None, reference=reference)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """See ``MaskedDiffusionPolicy``: the chat template with one user message."""
        encoded: list[Tensor] = []
        for prompt in prompts:
            ids = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
            if len(ids) >= self.prompt_limit:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens does not fit {self.prompt_limit}: {prompt[:60]!r}"
                )
            encoded.append(torch.tensor(ids, dtype=torch.int64))
        return encoded

    def decode(self, tokens: Tensor) -> list[str]:
        """See ``MaskedDiffusionPolicy``."""
        _, lengths, _ = end_at_eos(tokens, self.eos_token_id)
        rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        where: Tensor,
        cache: Any = None,
        start: int = 0,
    ) -> Tensor:
        """See ``MaskedDiffusionPolicy``. A place never holds the mask: its logit is -inf."""
        half = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            logits = self.network(
                tokens, attention_mask, where=where, cache=cache, start=start
            ).logits
        blocked = torch.zeros(logits.shape[-1], device=logits.device)
        blocked[self.mask_token_id] = -torch.inf
        return logits.float() + blocked

    def new_cache(self) -> Any:
        """See ``MaskedDiffusionPolicy``."""
        from rollout.policies.llada.modeling import KeyValueCache

        return KeyValueCache()

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """An adapter in peft's layout, or the whole model in the released one; and the tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        self.tokenizer.save_pretrained(directory)
        if self.config.lora is None:
            self.module.save_pretrained(directory, state_dict=values, max_shard_size="5GB")
            return
        from peft import get_peft_model_state_dict
        from peft.utils import SAFETENSORS_WEIGHTS_NAME
        from safetensors.torch import save_file

        adapter: Any = get_peft_model_state_dict(
            self.module, state_dict=values, adapter_name="default"
        )
        named = {f"base_model.model.{name}": value for name, value in adapter.items()}
        save_file(named, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        described = self.module.peft_config["default"]
        described.base_model_name_or_path = self.config.checkpoint
        described.save_pretrained(directory)
