"""Keyed randomness: everything needed to repeat one sample anywhere.

A draw is a pure function of (run seed, step, group, index). There is no sampler state, hence nothing
to save at a checkpoint, and a job can be run again on any worker with the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Evaluation draws live at a step no training step can have, so that they are held out by key.
EVALUATION_STEP = -1


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key; equal keys give equal seeds on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key. Noise is drawn on the CPU so that it is equal on every device."""
    return torch.Generator("cpu").manual_seed(keyed_seed(*key))


def keyed_uniform(*key: int | str) -> float:
    """One number in [0, 1) for a key."""
    return keyed_seed(*key) / 2**63


@dataclass(frozen=True)
class Draw:
    """One sample: where it belongs and the seed from which all its noise comes."""

    step: int
    group: int
    prompt_id: str
    index: int
    seed: int

    def generator(self, stream: str) -> torch.Generator:
        """The CPU generator of a named stream of this sample."""
        return keyed_generator(self.seed, stream)

    def noise(self, stream: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal noise of ``shape`` (fp32, CPU) for a named stream of this sample."""
        return torch.randn(tuple(shape), generator=self.generator(stream), dtype=torch.float32)


@dataclass(frozen=True)
class Group:
    """All samples of one prompt at one step: ``size`` draws that are compared with each other."""

    step: int
    group: int
    prompt_id: str
    prompt: str
    columns: dict[str, Any]
    size: int
    seed: int

    def draw(self, index: int) -> Draw:
        """The draw of member ``index``."""
        seed = keyed_seed(self.seed, "member", index)
        return Draw(self.step, self.group, self.prompt_id, index, seed)

    @property
    def shared(self) -> Draw:
        """The draw whose noise the whole group has in common."""
        seed = keyed_seed(self.seed, "shared")
        return Draw(self.step, self.group, self.prompt_id, -1, seed)


@dataclass(frozen=True)
class Prompt:
    """A prompt with a stable id and the reward columns that belong to it (TRL's extra columns)."""

    id: str
    text: str
    columns: dict[str, Any]


def groups_for(
    prompts: Sequence[Prompt], *, seed: int, step: int, count: int, size: int
) -> list[Group]:
    """The groups of a step, a function of (seed, step).

    Training walks through keyed permutations of the prompt set, one per epoch, so that every prompt
    is used equally often. Evaluation (``step == EVALUATION_STEP``) takes the prompts in order.
    A prompt that comes twice in a step forms two groups with different noise.
    """
    groups: list[Group] = []
    order: tuple[int, list[int]] = (-1, [])
    for slot in range(count):
        epoch, position = divmod(max(step, 0) * count + slot, len(prompts))
        if step == EVALUATION_STEP:
            prompt = prompts[position]
        else:
            if order[0] != epoch:
                generator = keyed_generator(seed, "prompt order", epoch)
                permutation = torch.randperm(len(prompts), generator=generator)
                order = (epoch, [int(i) for i in permutation])
            prompt = prompts[order[1][position]]
        group_seed = keyed_seed(seed, "group", step, slot, prompt.id)
        groups.append(Group(step, slot, prompt.id, prompt.text, prompt.columns, size, group_seed))
    return groups
