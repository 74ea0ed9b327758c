"""LLaDA's configuration, with the key names of the released ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


class LLaDAConfig(PreTrainedConfig):
    """Sizes and token ids; the defaults are LLaDA-8B's (arXiv 2502.09992, released config).

    Keys of the released file that change nothing here (initialisation, dropout of 0, kernels) are
    kept as they come, so that a saved configuration reads like the one that was loaded. ``loops`` is
    ours, written where it is not 1: how often a forward goes through the blocks (R-MDM 2606.18022).
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = 32
    n_layers: int = 32
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464
    embedding_size: int | None = 126464
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    activation_type: str = "silu"
    layer_norm_type: str = "rms"
    block_type: str = "llama"
    mask_token_id: int | None = 126336
    bos_token_id: int | None = None
    eos_token_id: int | None = 126081
    pad_token_id: int | None = 126081
    initializer_range: float = 0.02
    loops: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.embedding_size = self.embedding_size or self.vocab_size
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``config.json``."""
        keys = super().to_dict()
        if keys["loops"] == 1:
            del keys["loops"]
        return keys

    def validate_architecture(self) -> None:
        """Refuse a variant of the architecture that this implementation does not compute.

        Raises:
            ValueError: with the key, what it is and what it may be.
        """
        for key, only in (
            ("include_bias", False),
            ("include_qkv_bias", False),
            ("weight_tying", False),
            ("activation_type", "silu"),
            ("layer_norm_type", "rms"),
            ("block_type", "llama"),
            ("rope", True),
            ("alibi", False),
            ("attention_layer_norm", False),
            ("input_emb_norm", False),
            ("scale_logits", False),
        ):
            value = self.__dict__.get(key, only)
            if value != only:
                raise ValueError(f"config.json: {key} is {value!r}, only {only!r} is known")
        if self.loops < 1:
            raise ValueError(f"config.json: loops is {self.loops}, at least 1 is needed")
        if self.d_model % self.n_heads or self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(
                f"config.json: {self.n_heads} heads of {self.n_kv_heads} key/value heads do not "
                f"divide d_model {self.d_model}"
            )


AutoConfig.register("llada", LLaDAConfig)
