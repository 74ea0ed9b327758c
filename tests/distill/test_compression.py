"""A smaller student by random conditioning: what is drawn, what is tracked, what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from distill.catalogue import build_teacher
from distill.compression import (
    Compression,
    CompressionConfig,
    Conditions,
    PairsConfig,
    conditioned_batches,
    prune,
)
from distill.networks import VelocityModule
from distill.real_data import real_digits
from distill.regions import RegionsConfig
from rollout.policies.wan import WanConfig
from rollout.prompts import DigitPrompts

PAIRS = PairsConfig(count=200, imbalance=20, held_out=("8", "9"))
ARIA = RegionsConfig(gamma=1.0, epsilon=0.1)


def embeddings(prompts: Sequence[str]) -> np.ndarray:
    return np.eye(len(prompts))


def conditions(batch: int = 64, **changes: Any) -> Conditions:
    config = CompressionConfig(layers=2, pairs=PAIRS).model_copy(update=changes)
    return Conditions(config, DigitPrompts().load(), 0, batch, embeddings)


def table_of(source: Conditions, items: Sequence[Any], loss: float | np.ndarray) -> dict[str, Any]:
    """As the ranks answer: rows in any order."""
    slots = np.array([item.slot for item in items])[::-1]
    return {"slot": slots, "distillation": np.broadcast_to(loss, slots.shape).copy()}


class Plain:
    """A network trained by plain PyTorch."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.network.parameters(), lr=0.1)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def apply(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0.0


def test_pictures_fall_off_and_held_out_prompts_have_none():
    source = conditions()
    counts = Counter(int(i) for i in source.owned)
    assert sum(counts.values()) == 200 and set(counts) == set(range(8))
    ordered = [counts[i] for i in range(8)]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[0] / ordered[7] == pytest.approx(20 ** (7 / 9), rel=0.2)
    assert source.pool.pi[0] / source.pool.pi[9] == pytest.approx(20)


def test_unknown_or_all_held_out_prompts_are_refused():
    with pytest.raises(ValueError, match="seven"):
        conditions(pairs=PairsConfig(held_out=("seven",)))
    with pytest.raises(ValueError, match="every prompt"):
        conditions(pairs=PairsConfig(held_out=tuple(str(d) for d in range(10))))


def test_aria_without_focus_draws_what_random_conditioning_draws():
    """gamma 0 and epsilon 0: the very items, weights included, after any losses."""
    plain, focused = conditions(), conditions(regions=RegionsConfig(gamma=0, epsilon=0))
    for step in range(3):
        items, _ = plain.take(step)
        others, _ = focused.take(step)
        assert items == others
        losses = np.random.default_rng(step).random(64)
        plain.observe(table_of(plain, items, losses))
        focused.observe(table_of(focused, others, losses))


def test_pairs_alone_never_meet_a_held_out_condition():
    source = conditions(256, conditioning=None)
    asked = {item.prompt for step in range(4) for item in source.take(step)[0]}
    assert not any(text is not None and text[-1] in "89" for text in asked)
    switched = {item.prompt for step in range(4) for item in conditions(256).take(step)[0]}
    assert {"a handwritten 8", "a handwritten 9"} <= switched


def test_draws_follow_the_discrepancy_and_weights_keep_their_mean():
    """Losses of digit 9 are ten times the others': it is drawn far beyond its mass."""
    source = conditions(512, regions=ARIA)
    before = source.sources.q[9]
    for step in range(6):
        items, _ = source.take(step)
        wrong = [10.0 if item.prompt == "a handwritten 9" else 1.0 for item in items][::-1]
        metrics = source.observe(table_of(source, items, np.array(wrong)))
    after = source.sources.q[9]
    assert after > 3 * before and metrics["region/9/q"] == after
    assert metrics["regions/unseen"] > metrics["regions/seen"]
    weights = np.array([item.weight for item in source.take(6)[0]]) * 512
    assert weights.mean() <= 1 + 1e-9 and weights.mean() > 0.8
    assert 0 < metrics["regions/effective_sample_share"] <= 1


def test_a_restored_tracker_draws_the_same():
    source = conditions(regions=ARIA)
    items, _ = source.take(0)
    source.observe(table_of(source, items, np.random.default_rng(1).random(64)))
    other = conditions(regions=ARIA)
    other.restore(source.state())
    assert other.take(1)[0] == source.take(1)[0]
    assert conditions(regions=ARIA).take(1)[0] != source.take(1)[0]


def test_regions_by_k_means_cover_all_prompts():
    source = conditions(regions=RegionsConfig(kind="kmeans", count=4))
    assert len(source.pool.names) <= 4 and len(source.pool.index) == 10
    items, _ = source.take(0)
    assert any(
        key.startswith("region/cluster") for key in source.observe(table_of(source, items, 1))
    )


def test_a_student_is_part_of_its_teacher(tmp_path):
    teacher = WanConfig().build()
    student = prune(WanConfig().build(), 2)
    assert len(student.module.blocks) == student.blocks == 2
    names = dict(teacher.module.named_parameters())
    kept = dict(student.module.named_parameters())
    assert torch.equal(kept["blocks.0.ffn.net.2.weight"], names["blocks.0.ffn.net.2.weight"])
    assert torch.equal(kept["blocks.1.ffn.net.2.weight"], names["blocks.3.ffn.net.2.weight"])
    student.save(tmp_path, student.trainable())
    again = WanConfig(checkpoint=str(tmp_path)).build()
    x, t = torch.randn(4, *student.latent_shape), torch.full((4,), 0.5)
    condition = student.encode(["a 3"] * 4)
    assert torch.equal(again.velocity(x, t, condition), student.velocity(x, t, condition))


def test_an_update_is_plain_gradient_descent_whatever_the_micro_batches():
    items, _ = conditions(24, regions=ARIA).take(0)
    teacher, real = build_teacher(WanConfig(), "cpu"), real_digits(moving=False)
    method = Compression(CompressionConfig(layers=2, pairs=PAIRS), teacher, real)
    found = []
    for size, count in ((24, 1), (10, 3)):
        student = prune(WanConfig().build(), 2)
        network = Plain(VelocityModule(student))
        batches = list(conditioned_batches(teacher, items, size, count, real))
        tables, _ = method.update({"student": network}, batches, 0)
        assert sorted(int(s) for t in tables for s in t["slot"]) == list(range(24))
        found.append({n: p.detach().clone() for n, p in student.trainable().items()})
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=0, atol=2e-6, msg=name)
