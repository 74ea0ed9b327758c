"""The embedded LLaDAs: the real architecture at about 1 M parameters, trained on a task's own format.

Prompts and answers are those of ``rollout/sudoku.py`` and ``rollout/countdown.py`` (train split), so
that the model knows how an answer looks and is often right: about four Sudokus of five, one Countdown
of four. Reinforcement learning starts from there. Trained once in minutes, cached and seeded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.countdown import TEMPLATE as COUNTDOWN
from rollout.countdown import instance
from rollout.draws import keyed_generator
from rollout.masked import pad_left
from rollout.policies.embedded import cached, ensure
from rollout.sudoku import TEMPLATE as SUDOKU
from rollout.sudoku import puzzle

SIZES: dict[str, Any] = {
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 4,
    "mlp_hidden_size": 384,
    "max_sequence_length": 512,
}
# Entries of the tokenizers: enough for the constant part of a prompt to be a few tokens.
VOCABULARY = {"sudoku": 512, "countdown": 384}
VERSION = 1
STEPS = {"sudoku": 500, "countdown": 2000}
BATCH = 64
LEARNING_RATE = 2e-3
# Answers and the EOS that pad them; the models' recipes decode this many tokens.
LENGTHS = {"sudoku": 24, "countdown": 12}
SEED = 0


def example(name: str, *key: int | str) -> tuple[str, str]:
    """A prompt and its answer, a function of the key."""
    if name == "sudoku":
        text, solution = puzzle("train", (0, 12), "base", *key)
        return SUDOKU.format(puzzle=text), f"<answer>{solution}</answer>"
    numbers, target, expression = instance("train", (3, 3), 9, "base", *key)
    prompt = COUNTDOWN.format(numbers=" ".join(map(str, numbers)), target=target)
    return prompt, f"<answer>{expression}</answer>"


def model_sizes(name: str) -> dict[str, Any]:
    """The sizes of an embedded model, by the keys of ``config.json``."""
    rows = VOCABULARY[name]
    return {**SIZES, "vocab_size": rows, "embedding_size": rows}


def cached_directory(name: str) -> Path:
    """Where an embedded base is cached."""
    return cached(f"llada-{name}-v{VERSION}")


def ensure_base(name: str) -> Path:
    """The directory of an embedded base, training it first where it is not cached."""

    def train(directory: Path) -> None:
        tokenizer = build_tokenizer(name)
        train_base(name, tokenizer, STEPS[name]).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return ensure(f"llada-{name}-v{VERSION}", train)


def build_tokenizer(name: str) -> Any:
    """A small tokenizer, trained on the task's prompts."""
    from rollout.policies.llada.tokenizer import TAGS, train_tokenizer

    prompts = [example(name, "tokenizer", i)[0] for i in range(256)]
    parts = [part for prompt in prompts for part in re.split("|".join(TAGS), prompt)]
    return train_tokenizer([*parts, *["user", "assistant", "\n\n"] * 256], VOCABULARY[name])


def train_base(name: str, tokenizer: Any, steps: int, loops: int = 1) -> Any:
    """Train with the released recipe's loss: mask k ~ U{1..L} of an answer, (L/k) sum of CE, over L.

    The EOS that pad an answer to L are part of it. With ``loops`` the model is a looped one, its loss
    the mean over loops. Returns the EMA weights.
    """
    from rollout.policies.llada.configuration import LLaDAConfig
    from rollout.policies.llada.modeling import LLaDAModelLM
    from rollout.policies.llada.tokenizer import BOS, EOS, MASK

    ids = {"mask": MASK, "eos": EOS, "pad": EOS, "bos": BOS}
    tokens = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in ids.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LLaDAModelLM(LLaDAConfig(**model_sizes(name), **tokens, loops=loops))
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for step in range(steps):
        clean, mask, width = _batch(name, tokenizer, step)
        generator = keyed_generator(SEED, "masks", name, step)
        length = LENGTHS[name]
        counts = torch.randint(1, length + 1, (BATCH, 1), generator=generator)
        ranks = torch.rand(BATCH, length, generator=generator).argsort(1).argsort(1)
        hidden = torch.zeros_like(clean, dtype=torch.bool)
        hidden[:, width:] = ranks < counts
        noised = clean.masked_fill(hidden, tokens["mask_token_id"])
        losses = loop_losses(model, noised, mask, hidden, clean).mean(0)
        weights = (1 / counts).expand(-1, clean.shape[1])[hidden]
        optimizer.zero_grad()
        ((losses * weights).sum() / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    return averaged.module


def loop_losses(
    model: Any, noised: Tensor, mask: Tensor | None, hidden: Tensor, clean: Tensor
) -> Tensor:
    """Cross-entropy (loops, n) after each loop, at the n True places of ``hidden`` (B, S)."""
    logits = model(noised, mask, where=hidden, every_loop=True).logits
    targets = clean[hidden].expand(logits.shape[:2])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)


def _batch(name: str, tokenizer: Any, step: int) -> tuple[Tensor, Tensor | None, int]:
    """Clean tokens (B, P + length), their padding mask, and P."""
    length = LENGTHS[name]
    prompts: list[Tensor] = []
    answers: list[Tensor] = []
    for row in range(BATCH):
        prompt, answer = example(name, step, row)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        prompts.append(torch.tensor(ids))
        ended = tokenizer(answer + "<|eot_id|>")["input_ids"]
        padded = (ended + [tokenizer.eos_token_id] * length)[:length]
        answers.append(torch.tensor(padded))
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = pad_left(prompts, width, tokenizer.eos_token_id)
    if mask is not None:
        mask = torch.cat([mask, torch.ones(BATCH, length, dtype=torch.int64)], dim=1)
    return torch.cat([tokens, torch.stack(answers)], dim=1), mask, width
