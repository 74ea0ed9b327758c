"""The tokenizer as released, its chat template, and a small byte-level BPE for the embedded models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOS, EOS, EOT = "<|startoftext|>", "<|endoftext|>", "<|eot_id|>"
START, END, MASK = "<|start_header_id|>", "<|end_header_id|>", "<|mdm_mask|>"
SPECIAL = (BOS, EOS, EOT, START, END, MASK)
# Answer tags are one token each, but ordinary text: they stay when special tokens are left out.
TAGS = ("<answer>", "</answer>", "<reasoning>", "</reasoning>")
# bos; per message its role in a header, an empty line, the stripped content, end of turn; then the
# assistant's header.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    + START
    + "{{ message['role'] }}"
    + END
    + "\n\n{{ message['content'] | trim }}"
    + EOT
    + "{% endfor %}{% if add_generation_prompt %}"
    + START
    + "assistant"
    + END
    + "\n\n{% endif %}"
)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint; one without a chat template gets LLaDA's.

    Raises:
        ValueError: the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no readable tokenizer: {error}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE over ``texts`` with LLaDA's special tokens.

    Digits stand alone, whatever else repeats merges freely, across spaces too: a constant
    instruction becomes a few tokens, and any other text still has a spelling in bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[EOT, START, END],
    )
    fast.add_tokens(list(TAGS))
    fast.chat_template = CHAT_TEMPLATE
    return fast
