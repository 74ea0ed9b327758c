"""A network under training on one rank: engine, learning rate, average, and its part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.engine import Engine, TorchEngine, Wrapped
from recipes.schema import LearnerConfig, OptimizerConfig

STATE_FILE = "optimizer.safetensors"


def write_state(directory: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the states of networks by their names (a single one's may be empty)."""
    named = {f"{name}{key}": t for name, state in states.items() for key, t in state.items()}
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in named.items()}
    save_file(tensors, directory / STATE_FILE)


def read_state(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """What ``write_state`` wrote."""
    tensors = load_file(directory / STATE_FILE)
    return {
        name: {key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name)}
        for name in names
    }


def build_engine(
    kind: str, module: Wrapped, optimizer: OptimizerConfig, learner: LearnerConfig
) -> Engine:
    """The engine ``kind``: torch or deepspeed."""
    if kind == "torch":
        return TorchEngine(module, optimizer)
    from cluster.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, optimizer, learner)


class Trained:
    """Steps an engine by the recipe's schedule. Collective: all ranks call everything alike.

    Attributes:
        steps: optimiser steps taken, of ``total`` that the run will take.
        averaged: rank 0's exponential average of the trained weights in fp32, updated once per
            optimiser step with decay min((1 + n) / (10 + n), ema_decay); empty on other ranks, and
            for networks that only serve training.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: OptimizerConfig,
        total: int,
        rank: int,
        averages: bool = True,
    ) -> None:
        self.engine, self.optimizer, self.total = engine, optimizer, total
        self.steps = 0
        weights = engine.weights()
        kept = averages and rank == 0
        self.averaged = {n: t.clone().float() for n, t in weights.items()} if kept else {}

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward, of which ``backward`` will follow."""
        return self.engine.forward(*inputs)

    def apply(self, *inputs: Any) -> Any:
        """The module's forward when no gradient of it will reach the parameters."""
        return self.engine.apply(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; see ``Engine.backward``."""
        self.engine.backward(loss, last)

    def step(self) -> float:
        """One optimiser step at the schedule's rate; returns the gradient norm before clipping."""
        norm = self.engine.step(self.learning_rate())
        self.steps += 1
        self._average()
        return norm

    def learning_rate(self) -> float:
        """Of the next step: warm-up, then the decay to 0 at the last step of the run."""
        config = self.optimizer
        warmed = min(1.0, (self.steps + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        left = max(0.0, 1 - self.steps / self.total) if self.total else 1.0
        decayed = {"none": 1.0, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}
        return config.learning_rate * warmed * decayed[config.decay]

    def state(self) -> dict[str, Tensor]:
        """Weights, moments, average and step count by name; whole on rank 0, others only take part."""
        weights, moments = self.engine.weights(), self.engine.moments()
        state = {f"{name}.weight_fp32": t for name, t in weights.items()} | moments
        state |= {f"{name}.ema": t for name, t in self.averaged.items()}
        state["optimizer_steps"] = torch.tensor([self.steps])
        return state

    def restore(self, state: Mapping[str, Tensor], empty: Callable[[], Tensor]) -> None:
        """Continue from ``state``, on any number of ranks.

        Optimisers make their state at the first step; ``empty``, a loss of 0, makes it, to be
        overwritten.
        """
        self.steps = int(state["optimizer_steps"][0])
        parts: dict[str, dict[str, Tensor]] = {"weight_fp32": {}, "ema": {}, "moment": {}}
        for key, tensor in state.items():
            name, _, kind = key.rpartition(".")
            if kind in parts:
                parts[kind][name] = tensor
            elif key != "optimizer_steps":
                parts["moment"][key] = tensor
        if parts["moment"]:
            self.engine.backward(empty(), last=True)
            self.engine.step(0.0)
        self.engine.restore(parts["weight_fp32"], parts["moment"], self.steps)
        self.averaged = {
            name: parts["ema"][name].to(average.device) for name, average in self.averaged.items()
        }

    @torch.no_grad()
    def _average(self) -> None:
        decay = min((1 + self.steps) / (10 + self.steps), self.optimizer.ema_decay)
        weights = self.engine.weights()
        if self.averaged:
            targets = [weights[name] for name in self.averaged]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage]
                list(self.averaged.values()), targets, 1 - decay
            )
