"""A network under training: its learning rate over a run, its average, its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cluster.engine import TorchEngine
from cluster.trained import Trained, read_state, write_state
from recipes.schema import OptimizerConfig


class Line(nn.Module):
    """x w, with ``network`` where engines look for what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.network.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def trained(total: int, rank: int = 0, **options: Any) -> Trained:
    config = OptimizerConfig(**{"learning_rate": 1.0, **options})
    return Trained(TorchEngine(Line(), config), config, total, rank)


def step(network: Trained) -> None:
    network.backward(network(torch.ones(1, 2)).sum(), last=True)
    network.step()


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_rate_warms_up_and_falls_to_0_at_the_last_step(decay: str, expected: list[float]):
    network = trained(4, decay=decay, warmup_steps=2)
    rates = []
    for _ in range(4):
        rates.append(network.learning_rate())
        step(network)
    assert rates == pytest.approx(expected)
    assert network.learning_rate() == (1.0 if decay == "none" else pytest.approx(0, abs=1e-12))


def test_only_rank_0_averages():
    first, other = trained(4, ema_decay=0.9), trained(4, rank=1, ema_decay=0.9)
    step(first)
    step(other)
    weight = first.engine.weights()["weight"]
    # Decay min((1 + n) / (10 + n), .9) with n = 1: of the start 2/11 is left.
    torch.testing.assert_close(first.averaged["weight"], weight + 2 / 11 * (1 - weight))
    assert other.averaged == {}


def test_states_of_several_networks_share_a_file(tmp_path):
    networks = {name: trained(9, decay="linear") for name in ("a:", "b:")}
    for count, network in enumerate(networks.values(), 1):
        for _ in range(count):
            step(network)
    write_state(tmp_path, {name: network.state() for name, network in networks.items()})
    states = read_state(tmp_path, list(networks))
    for name, network in networks.items():
        other = trained(9, decay="linear")
        other.restore(states[name], lambda other=other: 0 * other(torch.zeros(1, 2)).sum())
        assert other.steps == network.steps
        step(other)
        step(network)
        assert torch.equal(other.engine.weights()["weight"], network.engine.weights()["weight"])
        assert torch.equal(other.averaged["weight"], network.averaged["weight"])
