"""Policies small enough to enumerate (fp64 tables), hand-made completions, and what is made of them."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewards.calling import Scores
from rl.bounds import Masks
from rl.catalogue import build_algorithm
from rl.contracts import Sampled, Scored
from rl.diffu_grpo import DiffuGRPOConfig
from rl.dipod import DipodConfig
from rl.espo import ESPOConfig
from rl.fpo import FPOConfig
from rl.items import Item, micro_steps
from rl.rollout_set import optimiser_steps
from rl.spg import SPGConfig
from rl.text import TextAlgorithm, TextSettings
from rl.text_batches import Masking, TextBatch, text_batches
from rl.trace_rl import TraceRLConfig
from rl.wd1 import WD1Config
from rollout.draws import Prompt, groups_for
from rollout.masked import Completions, MaskedRollout, MaskedSamplerConfig, TextSummary
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.configuration import LLaDAConfig
from rollout.policies.llada.modeling import LLaDAModelLM
from rollout.policies.llada.policy import LladaConfig, LladaPolicy
from rollout.policies.llada.pretraining import build_tokenizer, model_sizes

# The specification's logits of A: x1|(M,A), x1|(M,M), x2|(A,M), x2|(M,M), x1|(M,B), x2|(B,M).
THETA = (2.0, -1.0, -0.5, 1.5, 0.3, -0.7)
AA, AB, BA, BB = 0, 1, 2, 3
OUTCOMES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
# Tokens of the completions that algorithms are tried on.
WINDOW = 6
CONFIGS: dict[str, TextSettings] = {
    "spg": SPGConfig(draws=3),
    "diffu_grpo": DiffuGRPOConfig(),
    "fpo": FPOConfig(draws=3),
    "espo": ESPOConfig(draws=4),
    "wd1": WD1Config(),
    "trace_rl": TraceRLConfig(segments=3),
}
REWARDS = np.random.default_rng(0).random((4, 3))


class TablePolicy(MaskedDiffusionPolicy):
    """Logits (B, G, V) of an answer of G places are a function of one parameter and the answer.

    Ids 0 ... V - 1 are tokens, V is the mask. Prompts change nothing.

    Attributes:
        theta: fp64, all that trains.
        calls: rows of every forward so far.
    """

    def __init__(
        self,
        theta: Tensor,
        table: Callable[[Tensor, Tensor], Tensor],
        window: int,
        vocabulary: int,
        eos: int,
        reference: bool = False,
    ) -> None:
        self.theta = nn.Parameter(theta.double())
        super().__init__(nn.ParameterDict({"theta": self.theta}), False, reference)
        self.table, self.window = table, window
        self.mask_token_id = self.vocab_size = vocabulary
        self.eos_token_id = eos
        self.calls: list[int] = []

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        where: Tensor,
        cache: Any = None,
        start: int = 0,
    ) -> Tensor:
        self.calls.append(len(tokens))
        logits = self.table(self.network["theta"], tokens[:, -self.window :])
        return logits[where[:, -self.window :]]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        return [torch.zeros(1, dtype=torch.int64) for _ in prompts]

    def decode(self, tokens: Tensor) -> list[str]:
        return [str(row) for row in tokens.tolist()]

    def new_cache(self) -> Any:
        raise NotImplementedError

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


def toy_policy(theta: Sequence[float] = THETA) -> TablePolicy:
    """The specification's: A is 0, B is 1, the mask 2; no token ends a text."""

    def table(theta: Tensor, answers: Tensor) -> Tensor:
        first = theta[[0, 4, 1]][answers[:, 1]]
        second = theta[[2, 5, 3]][answers[:, 0]]
        of_a = torch.stack([first, second], dim=1)
        return torch.stack([of_a, torch.zeros_like(of_a)], dim=2)

    return TablePolicy(torch.tensor(theta), table, window=2, vocabulary=2, eos=3)


def random_policy(
    window: int, vocabulary: int, context: bool = True, reference: bool = False, seed: int = 0
) -> TablePolicy:
    """Unrelated logits for every context; or the same in all of them. The last token is the EOS."""
    base = vocabulary + 1
    contexts = base**window if context else 1
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(contexts, window, vocabulary, generator=generator, dtype=torch.float64)

    def table(theta: Tensor, answers: Tensor) -> Tensor:
        codes = (answers * base ** torch.arange(window)).sum(1)
        return theta[codes % len(theta)]

    return TablePolicy(theta, table, window, vocabulary, vocabulary - 1, reference)


@functools.cache
def random_llada() -> LladaPolicy:
    """Two layers, weights large enough that a place's prediction depends on all others; read-only."""
    tokenizer = build_tokenizer("sudoku")
    sizes = {**model_sizes("sudoku"), "d_model": 32, "mlp_hidden_size": 64, "n_layers": 2}
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = LLaDAModelLM(
            LLaDAConfig(**sizes, **ids, pad_token_id=None, initializer_range=0.2)
        )
    with tempfile.TemporaryDirectory() as directory:
        network.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return LladaConfig(checkpoint=directory).build(reference=True)


def every_mask(length: int, window: int | None = None, prompt: int = 1) -> Masks:
    """Each subset as often as ``exact_k_masks`` draws it: the mean over draws is the expectation."""
    ways = [math.comb(length, k) for k in range(1, length + 1)]
    subsets = [
        places
        for k, count in enumerate(ways, 1)
        for places in itertools.combinations(range(length), k)
        for _ in range(math.lcm(*ways) // count)
    ]
    hidden = torch.zeros(len(subsets), window or length, dtype=torch.bool)
    for row, places in enumerate(subsets):
        hidden[row, list(places)] = True
    scored, after = hidden.clone(), torch.arange(hidden.shape[1]) >= length
    scale = torch.tensor([length / len(places) for places in subsets])
    return Masks(hidden | after, scored, scale, torch.zeros(len(subsets), prompt, dtype=torch.bool))


def completions(
    tokens: np.ndarray, lengths: Sequence[int] | None = None, prompt: int = 1, seed: int = 0
) -> Completions:
    """A group whose tokens were committed one a step, in a random order."""
    size, window = tokens.shape
    rng = np.random.default_rng(seed)
    chosen = np.array(lengths or [window] * size)
    steps = np.argsort(rng.random(tokens.shape), axis=1)
    steps[np.arange(window) >= chosen[:, None]] = -1
    seeds = rng.integers(2**62, size=size)
    return Completions(
        np.arange(prompt) % 2, tokens.astype(np.int64), chosen, steps.astype(np.int16), seeds
    )


def item_of(
    replay: Any,
    advantages: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    distillation: Sequence[float] | np.ndarray | None = None,
    epoch: int = 0,
    evaluations: int = 0,
) -> Item:
    """An item of numbers as they come."""
    kept = np.zeros(len(weights)) if distillation is None else np.asarray(distillation)
    return Item(replay, evaluations, "", np.asarray(advantages), np.asarray(weights), kept, epoch)


def batch_of(
    policy: MaskedDiffusionPolicy, items: Sequence[Item], masking: Masking, draws: int = 1
) -> TextBatch:
    """All of ``items``, whose replays are completions, in one micro-batch."""
    size = sum(len(item.weights) for item in items)
    (batch,) = text_batches(policy, items, lambda replay: replay, size, 1, masking, draws)
    return batch


def toy_batch(policy: TablePolicy) -> TextBatch:
    """AA, AB, BA, BB at every mask, with weights still to be given."""
    items = [item_of(completions(OUTCOMES), np.zeros(4), np.zeros(4))]
    batch = batch_of(policy, items, lambda c, j, g: every_mask(2))
    assert batch.tokens.shape == (4, 4, 3)
    return batch


def scored_groups(replays: Sequence[Completions], rewards: np.ndarray) -> list[Scored]:
    """Groups as the driver sees them; ``rewards`` (groups, size)."""
    prompts = [Prompt(str(i), "", {}) for i in range(len(replays))]
    groups = groups_for(prompts, seed=0, step=-1, count=len(replays), size=rewards.shape[1])
    return [
        Scored(
            Sampled(group, 0, c, [], TextSummary(tuple(c.lengths.tolist()), 0), {}, 0, 0.0, 0),
            {"r": Scores(row, (), 0)},
        )
        for group, c, row in zip(groups, replays, rewards, strict=True)
    ]


def sampler_of(length: int, block_length: int | None = None, **options: Any) -> MaskedSamplerConfig:
    """The sampler of completions of ``length`` tokens, one block unless said otherwise."""
    return MaskedSamplerConfig(length=length, block_length=block_length or length, **options)


def build(
    config: TextSettings, length: int = WINDOW, block: int = 2, stale: bool = False
) -> TextAlgorithm:
    """The algorithm of a config, decoding in blocks."""
    algorithm = build_algorithm(config, sampler_of(length, block), 0, stale)  # pyright: ignore[reportArgumentType]
    assert isinstance(algorithm, TextAlgorithm)
    return algorithm


def text_groups(policy: LladaPolicy, count: int = 4, size: int = 3) -> list[Completions]:
    """Prompts of 3, 5, ... tokens, completions of 1 to 6 that end with an EOS unless whole."""
    rng = np.random.default_rng(1)
    groups: list[Completions] = []
    for g in range(count):
        lengths = rng.integers(1, WINDOW + 1, size=size)
        tokens = rng.integers(20, 300, size=(size, WINDOW))
        ended = (np.arange(WINDOW) >= lengths[:, None] - 1) & (lengths[:, None] < WINDOW)
        tokens[ended] = policy.eos_token_id
        made = completions(tokens, lengths.tolist(), seed=g)
        groups.append(replace(made, prompt=rng.integers(20, 300, size=3 + 2 * g)))
    return groups


def text_rollouts(policy: LladaPolicy) -> list[MaskedRollout]:
    """The groups above as they leave a sampler that took 5 forwards for each."""
    replays = text_groups(policy)
    return [
        MaskedRollout(s.sample.group, c, [], 5, TextSummary(tuple(c.lengths.tolist()), 0))
        for s, c in zip(scored_groups(replays, REWARDS), replays, strict=True)
    ]


def items_of(
    policy: LladaPolicy, algorithm: TextAlgorithm, rewards: np.ndarray = REWARDS
) -> list[Item]:
    """The groups above in the first optimiser step of a rollout set."""
    scored = scored_groups(text_groups(policy), rewards)
    return optimiser_steps(scored, {"r": 1.0}, algorithm, 0)[0][0]


def batches(
    policy: MaskedDiffusionPolicy, algorithm: TextAlgorithm, items: Sequence[Item], size: int
) -> list[TextBatch]:
    """Micro-batches of ``size`` completions."""
    evaluations = size * algorithm.forwards_per_completion
    count = micro_steps([items], evaluations)
    return list(algorithm.batches(policy, items, lambda replay: replay, evaluations, count))


def gradient(
    policy: LladaPolicy,
    algorithm: TextAlgorithm,
    items: Sequence[Item],
    size: int,
    shift: float = 0,
) -> tuple[float, Tensor, list[dict[str, Tensor]]]:
    """Sums over micro-batches, old log-probabilities ``shift`` below the present ones."""
    policy.module.zero_grad()
    total, tables = 0.0, list[dict[str, Tensor]]()
    for batch in batches(policy, algorithm, items, size):
        if algorithm.needs_old:
            with torch.no_grad():
                old = algorithm.scores(policy, batch)
            own = batch.scored[:, : algorithm.draws]
            batch = replace(batch, old=old - shift * own)
        loss, table = algorithm.loss(policy, batch)
        loss.backward()
        total += loss.item()
        tables.append(table)
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    return total, torch.cat([g.flatten() for g in gradients]).clone(), tables


def joint(config: TextSettings) -> TextSettings:
    """With DiPOD's term in every loss."""
    return config.model_copy(update={"dipod": DipodConfig(coefficient=0.3, draws=2)})
