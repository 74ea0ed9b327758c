"""Memory of a distillation's processes, by arithmetic: a learner rank and a rollout actor at their peak.

State is that of ``recipes/memory.py``, for each network that trains. They step one after another:
ZeRO stages 1 and 2 release gradients and buffers in between, so those of the largest count; stages 0
and 3 keep all (DeepSpeed 0.19, measured on one rank). The teacher is frozen, whole and fp32 on every
rank and actor.

Activations follow diffusers' ``WanTransformer3DModel``. With d = heads x head size, f = ffn_dim, c bytes
of compute (2 in bfloat16, else 4), autograd saves for a token of a layer, measured with torch 2.13

                  a gradient to the input alone              and where everything trains
    layer norms   3 (4 d + 8)   inputs, in fp32              8 d    outputs, before a trained scale
    RMS norms     3 (4 d + 4)   of q, k and cross q, fp32    12 d   their outputs
    attention     6 c d + 8 h   q, k, v, out; cross q, out   -
    inputs        -                                          3 c d  of q k v, of cross q, of ffn
    gates         -                                          (c + 4) d
    ffn           c f           before the gelu              c f    after it

and for a token of the text 2 c d, cross keys and values; + 8 d + 4 where its keys train. That is on a
CPU; a GPU's fused RMS norm should keep less. An adapter adds its input, in bfloat16 for each one alone,
and c r. In bfloat16 casts of fp32 weights are kept, of frozen ones too. Adapters count inside blocks only.

With gradient checkpointing: c d for a token of a layer, and one layer as above with the gradients at
its widest place. A student's update holds two forwards of its own and, until the samples have their
gradient, for each sample judged one of the teacher, whose features are there in fp32 for the heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from recipes.memory import BF16, FP32, state_memory

if TYPE_CHECKING:
    from distill.two_step import TwoStepConfig
    from recipes.schema import DistillRecipe
    from rollout.policies.adapters import LoraAdapter
    from rollout.policies.wan import WanConfig

EMBEDDED_FRAMES = {"digits": 1, "moving-digits": 4}
# Of a block's linear layers, what one that has an adapter sees; ``text``: the tokens of the text.
INPUTS = {
    "attn1.to_q": "self",
    "attn1.to_k": "self",
    "attn1.to_v": "self",
    "attn1.to_out.0": "attended",
    "attn2.to_q": "cross",
    "attn2.to_k": "text",
    "attn2.to_v": "text",
    "attn2.to_out.0": "attended",
    "ffn.net.0.proj": "ffn",
    "ffn.net.2": "inner",
}


@dataclass(frozen=True)
class Sample:
    """What a forward sees of one sample.

    Attributes:
        latent: (channels, frames, height, width). ``text``: tokens of its condition.
    """

    latent: tuple[int, ...]
    text: int

    @classmethod
    def of(cls, policy: WanConfig) -> Sample:
        """Of a checkpoint's own ``conditions.json``; of a pipeline, as the recipe asks for.

        Raises:
            ValueError: the checkpoint is neither here nor known.
        """
        from rollout.policies.digits import vocabulary
        from rollout.policies.wan_text import TEXT_TOKENS

        if policy.pipeline:
            return cls(policy.video_latent(), TEXT_TOKENS)
        frames = EMBEDDED_FRAMES.get(policy.checkpoint)
        if frames is not None:
            return cls((1, frames, 8, 8), len(vocabulary(policy.checkpoint)))
        conditions = json.loads((policy.directory() / "conditions.json").read_text())
        return cls(tuple(conditions["latent_shape"]), len(conditions["vocabulary"]))

    def tokens(self, patch: tuple[int, ...]) -> int:
        """Tokens of the sample, one a patch (frames, height, width)."""
        frames, height, width = (n // p for n, p in zip(self.latent[1:], patch, strict=True))
        return frames * height * width


@dataclass(frozen=True)
class Count:
    """Parameters of a network: ``frozen`` of ``width`` bytes each, and ``trained`` in fp32."""

    frozen: int
    trained: int
    width: int = FP32

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.width * self.frozen + FP32 * self.trained


def networks(recipe: DistillRecipe) -> dict[str, Count]:
    """The networks of a rank, counted where they have no storage: the teacher, then those that train.

    Raises:
        ValueError: the checkpoint is neither here nor known, or an adapter fits no layer.
    """
    distill, policy = recipe.distill, recipe.policy
    whole = _count(policy, None).trained
    found = {"teacher": Count(whole, 0)}
    if distill.kind == "random_conditioning":
        return found | {"student": _count(policy, None, distill.layers)}
    lora = policy.lora if distill.parameters == "lora_per_step" else None
    own = _count(policy, lora)
    steps = 1 if distill.parameters == "shared" else 2
    found["student"] = Count(own.frozen, steps * own.trained, own.width)
    if distill.adversarial:
        found["heads"] = Count(0, _heads(distill, WanSize.of(policy.sizes())))
    if distill.dmd:
        found["fake_score"] = Count(0, whole)
    return found


def _count(policy: WanConfig, lora: LoraAdapter | None, layers: int | None = None) -> Count:
    """Of the checkpoint's transformer with ``lora``, or all of it trained; of ``layers`` blocks."""
    import torch
    from diffusers import WanTransformer3DModel

    from rollout.policies.wan_network import prepare_transformer

    config = policy.sizes() | ({} if layers is None else {"num_layers": layers})
    with torch.device("meta"):
        network: Any = WanTransformer3DModel.from_config(config)
        prepare_transformer(network, policy.model_copy(update={"lora": lora}), seed=0)
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    width = BF16 if lora and policy.dtype == "bfloat16" else FP32
    return Count(sum(p.numel() for p in parameters) - trained, trained, width)


def _heads(distill: TwoStepConfig, size: WanSize) -> int:
    import torch

    from distill.discriminator import Heads

    config = distill.discriminator
    with torch.device("meta"):
        heads = Heads(
            [size.width] * len(config.depths),
            config.channels,
            [str(number) for number in range(_judged(distill))],
        )
    return sum(p.numel() for p in heads.parameters())


def _judged(distill: TwoStepConfig) -> int:
    """How many of y1 and y2 the critics look at."""
    return 2 if distill.step1.weight else 1


@dataclass(frozen=True)
class WanSize:
    """Sizes of a Wan transformer that its activations depend on."""

    width: int
    ffn: int
    heads: int
    layers: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> WanSize:
        """From the keys of ``transformer/config.json``."""
        heads = config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        return cls(width, config["ffn_dim"], heads, config["num_layers"])


@dataclass(frozen=True)
class Forward:
    """A forward whose graph is kept.

    Attributes:
        half: computes in bfloat16. ``checkpointing``: layers are recomputed in the backward pass.
        trains: all parameters, the adapter ``lora``, or none: a gradient to the input.
    """

    size: WanSize
    half: bool
    checkpointing: bool
    trains: Literal["all", "adapter", "input"]
    lora: LoraAdapter | None = None

    @property
    def compute(self) -> int:
        """Bytes of a number where matrices are multiplied."""
        return BF16 if self.half else FP32

    @property
    def casts(self) -> int:
        """Bytes of the bfloat16 copies of a layer's fp32 matrices."""
        if not self.half:
            return 0
        d, f, c = self.size.width, self.size.ffn, BF16
        if self.trains == "adapter":
            rank = self.lora.rank if self.lora else 0
            sides = {"ffn.net.0.proj": d + f, "ffn.net.2": d + f}
            return c * rank * sum(sides.get(name, 2 * d) for name in self._adapted())
        return c * ((8 if self.trains == "all" else 6) * d * d + 2 * d * f)

    def saved(self) -> tuple[int, int]:
        """Bytes for a token of a layer, and for one of its text: see the module's docstring."""
        d, f, c, h = self.size.width, self.size.ffn, self.compute, self.size.heads
        token = 3 * (4 * d + 8) + 3 * (4 * d + 4) + 6 * c * d + 8 * h + c * f
        text = 2 * c * d
        if self.trains == "all":
            return token + 20 * d + 3 * c * d + (c + 4) * d + c * f, text + 8 * d + 4
        rank = self.lora.rank if self.lora else 0
        for name, seen in self._adapter_inputs():
            rows = c * (rank + (seen and (f if name == "ffn.net.2" else d)))
            if INPUTS[name] == "text":
                text += rows + (4 * d + 4 if name == "attn2.to_k" else 0)
            else:
                token += rows
        return token, text

    def _adapted(self) -> list[str]:
        targets = self.lora.targets if self.lora and self.trains == "adapter" else ()
        return [n for n in INPUTS if any(f"blocks.0.{n}".endswith(f".{t}") for t in targets)]

    def _adapter_inputs(self) -> list[tuple[str, bool]]:
        """The layers that have an adapter, and whether its input is saved for it alone."""
        if self.half:
            return [(name, True) for name in self._adapted()]
        found: dict[str, str] = {}
        for name in self._adapted():
            found.setdefault(INPUTS[name], name)
        there = ("attended", "text")
        return [(n, INPUTS[n] not in there and found[INPUTS[n]] == n) for n in self._adapted()]

    def kept(self, tokens: int, text: int) -> int:
        """Bytes that the graph of ``tokens`` and their ``text`` tokens holds after the forward."""
        d, c = self.size.width, self.compute
        end = tokens * (4 * d + 8 + ((4 + c) * d if self.trains == "all" else 0))
        if self.checkpointing:
            return self.size.layers * tokens * c * d + end
        token, words = self.saved()
        return self.size.layers * (tokens * token + text * words + self.casts) + end

    def recomputed(self, tokens: int, text: int) -> int:
        """Bytes of the one layer that a checkpointed backward pass is at."""
        if not self.checkpointing:
            return 0
        token, words = self.saved()
        cast_back = self.half and "ffn.net.2" in self._adapted()
        inner = 2 * FP32 if cast_back else self.compute
        widest = inner * self.size.ffn + (self.compute + FP32) * self.size.width
        layer = tokens * (token + widest) + text * words + self.casts
        return max(layer, 0 if self.trains == "input" else self.size.layers * self.casts)

    def inference(self, tokens: int) -> int:
        """Bytes alive at the widest place of a forward without a graph, in attention or ffn."""
        d, f = self.size.width, self.size.ffn
        attention = (12 if self.half else 8) * self.compute * d
        ffn = self.compute * (2 * f + 4 * d)
        if any(name.startswith("ffn") for name in self._adapted()):
            ffn += FP32 * f
        copies = 0 if self.trains == "input" else self.size.layers * self.casts
        return tokens * max(attention, ffn) + copies


def distillation_memory(recipe: DistillRecipe) -> dict[str, dict[str, int]]:
    """Bytes that a ``learner rank`` (rank 0) and a ``rollout actor`` hold at their peak.

    A rank's ``activations`` are those of the widest of its updates, beginning their backward pass; an
    optimiser step comes when they are gone, and at stage 3 the average then gathers all weights.

    Raises:
        ValueError: see ``networks`` and ``Sample.of``.
    """
    counts, learner = networks(recipe), recipe.learner
    teacher = counts.pop("teacher").bytes
    states = [
        state_memory(
            c.frozen, c.width, c.trained, learner.zero_stage, learner.ranks, learner.gpus > 0, False
        )
        for c in counts.values()
    ]
    for name, state in zip(counts, states, strict=True):
        if name != "student":
            state["average"] = 0
    passing = ("gradients", "buffers") if learner.zero_stage in (1, 2) else ()
    rank = {
        part: (max if part in passing else sum)(state[part] for state in states)
        for part in states[0]
    }
    return {
        "learner rank": {"teacher": teacher, **rank, "activations": learner_activations(recipe)},
        "rollout actor": {
            "teacher": teacher,
            "parameters": counts["student"].bytes,
            "activations": actor_activations(recipe),
        },
    }


def _forwards(recipe: DistillRecipe) -> tuple[Forward, Forward]:
    """The student's, of one step, and the teacher's."""
    policy, distill = recipe.policy, recipe.distill
    size, half = WanSize.of(policy.sizes()), policy.dtype == "bfloat16"
    teacher = Forward(size, half, policy.gradient_checkpointing, "input")
    if distill.kind == "random_conditioning":
        return replace(teacher, size=replace(size, layers=distill.layers), trains="all"), teacher
    if distill.parameters == "lora_per_step":
        return replace(teacher, trains="adapter", lora=policy.lora), teacher
    return replace(teacher, trains="all"), teacher


def learner_activations(recipe: DistillRecipe) -> int:
    """Bytes alive in the widest of a rank's updates, after the warm-up."""
    distill, config, sample = recipe.distill, recipe.policy.sizes(), Sample.of(recipe.policy)
    student, teacher = _forwards(recipe)
    rows, d = recipe.learner.micro_batch, student.size.width
    tokens, text = rows * sample.tokens(config["patch_size"]), rows * sample.text
    graph = student.kept(tokens, text)
    if distill.kind == "random_conditioning":
        return max(graph + student.recomputed(tokens, text), teacher.inference(tokens))
    graph, judged = 2 * graph, _judged(distill)
    updates = [student.inference(tokens), graph + student.recomputed(tokens, text)]
    if distill.adversarial:
        depths = len(distill.discriminator.depths)
        # Of a head on a token: conv, norm and activation, each a quarter of the places in fp32.
        head = 3 * distill.discriminator.channels
        seen = 3 * judged * tokens * depths * (FP32 * d + head)
        updates.append(seen + teacher.inference(tokens))
        features = tokens * depths * ((FP32 * d if teacher.half else 0) + head)
        graph += judged * (teacher.kept(tokens, text) + features)
        updates.append(graph + teacher.recomputed(tokens, text))
    if distill.dmd:
        updates.append(graph + teacher.inference(_guided(recipe) * tokens))
        score = replace(teacher, trains="all")
        updates.append(judged * score.kept(tokens, text) + score.recomputed(tokens, text))
    return max(updates)


def actor_activations(recipe: DistillRecipe) -> int:
    """Bytes alive while an actor draws a batch, the teacher's guided or the student's."""
    student, teacher = _forwards(recipe)
    sample, config = Sample.of(recipe.policy), recipe.policy.sizes()
    tokens = recipe.rollout.batch_size * sample.tokens(config["patch_size"])
    return max(teacher.inference(_guided(recipe) * tokens), student.inference(tokens))


def _guided(recipe: DistillRecipe) -> int:
    from rollout.policies.base import forwards_per_sample

    return forwards_per_sample(recipe.rollout.guidance_scale)
