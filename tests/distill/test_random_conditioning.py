"""Random conditioning: its draws, its corrections, its losses, and conditions without pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.random_conditioning import (
    Choice,
    RandomConditioningConfig,
    Sources,
    choose,
    correction,
    draw_conditions,
    losses,
    sample_weights,
    weights,
)
from distill.regions import Regions, RegionsConfig, allocate
from rollout.draws import keyed_uniform

PI = np.array([0.7, 0.2, 0.1])
D = np.array([0.1, 0.4, 0.9])
RC = RandomConditioningConfig()
# p(t) is 0 in fp64 for every t below 1 - 1e-6.
PAIRED_ONLY = RandomConditioningConfig(rate=1e9)


def keyed(count: int) -> np.ndarray:
    return np.array([keyed_uniform(7, "test", i) for i in range(count)])


def uneven_pool(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Masses and mixed labels (count,)."""
    generator = np.random.default_rng(0)
    return generator.dirichlet(np.ones(count)), generator.integers(0, 5, count)


def same(a: Choice, b: Choice) -> bool:
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in vars(a))


def test_golden_switch_probability():
    grid = (np.arange(200_000) + 0.5) / 200_000
    assert RC.switch_probability(grid).mean() == pytest.approx(0.1986524, abs=1e-7)
    assert RC.switch_probability(np.array([0.0, 1.0])) == pytest.approx([0.0067379, 1], abs=1e-6)


def test_draws_without_a_tilt_are_plain_draws_bit_for_bit():
    masses, labels = uneven_pool()
    uniforms = keyed(3000)
    cdf = np.cumsum(masses)
    plain = np.searchsorted(cdf, uniforms * cdf[-1], side="right")
    regions = Regions.by_label(labels, masses)
    untilted = RegionsConfig(gamma=0, epsilon=0)
    q = allocate(regions.pi, np.random.default_rng(3).random(5), untilted)
    assert draw_conditions(regions, q, uniforms).tobytes() == plain.tobytes()
    tilted = allocate(regions.pi, np.arange(1.0, 6), RegionsConfig(epsilon=0))
    assert (draw_conditions(regions, tilted, uniforms) != plain).any()


@pytest.mark.parametrize("d", [1.0, 0.3, 123.4567])
def test_one_region_is_random_conditioning(d: float):
    masses, labels = uneven_pool()
    owned = np.arange(0, 60, 3)
    one = Sources.allocated(
        Regions.by_label(np.zeros(60, int), masses), owned, np.array([d]), RegionsConfig()
    )
    rc = Sources.plain(Regions.by_label(labels, masses), owned)
    slots = range(500)
    got = choose(one, RC, seed=1, step=2, slots=slots)
    assert same(got, choose(rc, RC, seed=1, step=2, slots=slots))
    assert (sample_weights(one, got, RegionsConfig()) == 1).all()


def test_no_gamma_and_no_floor_is_random_conditioning():
    masses, labels = uneven_pool()
    pool, owned = Regions.by_label(labels, masses), np.arange(0, 60, 3)
    rc = Sources.plain(pool, owned)
    untilted = Sources.allocated(
        pool, owned, np.arange(1.0, 6), RegionsConfig(gamma=0, epsilon=0, correction_switched=1)
    )
    tilted = Sources.allocated(pool, owned, np.arange(1.0, 6), RegionsConfig())
    plain, still, moved = (
        choose(sources, RC, seed=1, step=2, slots=range(500)) for sources in (rc, untilted, tilted)
    )
    assert same(plain, still)
    assert not same(plain, moved)
    # Where a sample is and whether it is switched or dropped has nothing to do with regions.
    assert same(replace(moved, pair=plain.pair, condition=plain.condition), plain)


def test_regions_are_drawn_by_q_and_conditions_inside_by_their_mass():
    masses = np.array([0.1, 0.3, 0.4, 0.2])
    regions = Regions.by_label([0, 1, 0, 1], masses)
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    drawn = draw_conditions(regions, np.array([0.25, 0.75]), uniforms)
    shares = np.bincount(drawn, minlength=4) / 10_000
    assert shares == pytest.approx([0.05, 0.45, 0.2, 0.3], abs=2e-4)


def test_the_ends_of_the_uniform_draw_conditions_that_have_mass():
    regions = Regions.by_label([2, 0, 0, 1], np.array([0.0, 0.5, 0.5, 0.0]))
    # A keyed uniform may round to 1.
    drawn = draw_conditions(regions, regions.pi, np.array([0.0, 1.0]))
    assert drawn.tolist() == [1, 2]


def test_a_choice_belongs_to_its_slot_whatever_rank_makes_it():
    pool = Regions.by_label([0, 1, 1, 2])
    sources = Sources.plain(pool, np.array([0, 1, 1]))
    whole = choose(sources, RC, seed=3, step=5, slots=range(64))
    part = choose(sources, RC, seed=3, step=5, slots=range(1, 64, 4))
    assert same(part, Choice(*(getattr(whole, name)[1::4] for name in vars(whole))))
    assert not same(whole, choose(sources, RC, seed=3, step=6, slots=range(64)))


def test_choices_have_the_right_shares():
    pool = Regions.by_label(np.arange(4))
    sources = Sources.plain(pool, np.array([0, 1]))
    got = choose(sources, RC, seed=0, step=0, slots=range(20_000))
    assert got.switched.mean() == pytest.approx(0.1987, abs=0.01)
    assert got.switched[got.t > 0.99].mean() > 0.9
    assert got.null.mean() == pytest.approx(0.1, abs=0.01)
    assert got.t.mean() == pytest.approx(0.5, abs=0.01)
    for other in (got.switched, got.pair == 0):
        assert got.null[other].mean() == pytest.approx(0.1, abs=0.02)
    assert got.switched[got.pair == 0].mean() == pytest.approx(0.1987, abs=0.02)
    kept = ~got.switched
    assert (got.condition[kept] == sources.owned[got.pair[kept]]).all()
    for pair in (0, 1):
        conditions = got.condition[got.switched & (got.pair == pair)]
        assert np.bincount(conditions) / len(conditions) == pytest.approx(
            np.full(4, 0.25), abs=0.04
        )


def test_golden_weights_of_a_batch():
    q = allocate(PI, D, RegionsConfig(gamma=1, epsilon=0.1))
    regions = np.repeat([0, 1, 2], [710, 800, 890])
    w = weights(correction(PI, q, regions, 1.0), clip=5)
    assert w[[0, 710, 1510]] == pytest.approx([2.366197, 0.6, 0.269663], abs=1e-6)
    assert w.mean() == pytest.approx(1)
    assert (w * D[regions]).mean() == pytest.approx(0.24)
    assert (correction(PI, q, regions, 0.0) == 1).all()
    assert correction(PI, q, regions, 0.5)[0] == pytest.approx(2.366197**0.5)


def test_weights_are_clipped_after_they_are_normalised():
    assert weights(np.array([1.0, 1.0, 10.0]), clip=2).tolist() == [0.25, 0.25, 2.0]


@pytest.mark.parametrize("switched", [False, True])
def test_full_correction_gives_the_expectation_of_random_conditioning(switched: bool):
    pool = Regions.by_label([0, 1, 1, 2], np.array([0.4, 0.1, 0.2, 0.3]))
    owned = np.array([0, 0, 1, 2, 2])
    # Picture i with condition j costs this much: nothing that regions could explain.
    cost = np.random.default_rng(0).random((5, 4))
    plain = Sources.plain(pool, owned)
    config = RegionsConfig(correction=1, correction_switched=1, clip=1e9)
    tilted = Sources.allocated(pool, owned, D, config)
    uniforms = (np.arange(1000) + 0.5) / 1000

    def expectation(sources: Sources, weigh: bool) -> float:
        pair = np.repeat(draw_conditions(sources.pairs, sources.q_pairs, uniforms), 1000)
        other = np.tile(draw_conditions(sources.pool, sources.q, uniforms), 1000)
        condition = other if switched else owned[pair]
        flags = np.full(len(pair), switched)
        choice = Choice(np.zeros(len(pair)), pair, condition, flags, np.zeros(len(pair), bool))
        w = sample_weights(sources, choice, config) if weigh else 1.0
        return float((w * cost[pair, condition]).mean())

    assert expectation(tilted, True) == pytest.approx(expectation(plain, False), rel=5e-3)
    assert expectation(tilted, False) != pytest.approx(expectation(plain, False), rel=2e-2)


def test_default_corrects_pairs_and_lets_switched_conditions_focus():
    pool = Regions.by_label([0, 1, 2], PI)
    sources = Sources.allocated(pool, np.array([0, 1]), D, RegionsConfig())
    choice = Choice(
        t=np.zeros(4),
        pair=np.array([0, 0, 1, 1]),
        condition=np.array([0, 2, 1, 2]),
        switched=np.array([False, True, False, True]),
        null=np.zeros(4, bool),
    )
    w = sample_weights(sources, choice, RegionsConfig())
    assert w[0] == w[1] > w[2] == w[3]
    w = sample_weights(sources, choice, RegionsConfig(correction_switched=1))
    assert w[1] < w[0]


def test_draws_and_corrections_refuse_nonsense():
    pool = Regions.by_label([0, 1])
    with pytest.raises(ValueError, match=r"sum to 0\.8"):
        draw_conditions(pool, np.array([0.4, 0.4]), np.zeros(1))
    with pytest.raises(ValueError, match="differ"):
        draw_conditions(pool, np.array([1.0]), np.zeros(1))
    empty = pool.take(np.array([0]))
    with pytest.raises(ValueError, match="'1' is to be drawn but has no conditions"):
        draw_conditions(empty, np.array([0.5, 0.5]), np.zeros(1))
    with pytest.raises(ValueError, match="unknown region 3: there are 3"):
        correction(PI, PI, np.array([0, 3]), 1.0)
    with pytest.raises(ValueError, match="region 1 is never drawn"):
        correction(np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([1]), 1.0)


def test_denoising_counts_only_where_the_condition_was_kept():
    shape = (2, 3, 4)
    student = torch.zeros(shape, requires_grad=True)
    teacher = torch.full(shape, 2.0, requires_grad=True)
    target = torch.full(shape, 3.0)
    kept = torch.tensor([True, False])
    config = RandomConditioningConfig(denoising_weight=0.5, distillation_weight=2.0)
    loss, table = losses(student, teacher, target, kept, config)
    assert loss.tolist() == [2 * 4 + 0.5 * 9, 2 * 4]
    assert table["distillation"].tolist() == [4, 4]
    assert table["denoising"][0] == 9 and table["denoising"][1].isnan()
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    elements = 12
    assert student.grad[0, 0, 0].item() == pytest.approx(-(2 * 2 * 2 + 0.5 * 2 * 3) / elements)
    assert student.grad[1, 0, 0].item() == pytest.approx(-(2 * 2 * 2) / elements)


def test_losses_refuse_shapes_that_would_broadcast():
    v = torch.zeros(2, 3)
    kept = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="differ in shape"):
        losses(v, v[:1], v, kept, RC)
    with pytest.raises(ValueError, match="paired_mask"):
        losses(v, v, v, kept[:1], RC)
    with pytest.raises(ValueError, match="paired_mask"):
        losses(v, v, v, kept.float(), RC)


def trained(config: RandomConditioningConfig, seen: int, pool: int, width: int) -> torch.Tensor:
    """Weights of one-hot conditions of a linear student: initial, after 150 steps, the teacher's.

    (3, width, pool). Only the first ``seen`` conditions have pictures.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(width, pool, generator=generator)
    student = torch.nn.Linear(pool + width, width, bias=False)
    torch.nn.init.normal_(student.weight, generator=generator)
    initial = student.weight[:, :pool].detach().clone()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    sources = Sources.plain(Regions.by_label(np.arange(pool)), np.arange(seen))
    for step in range(150):
        choice = choose(sources, config, seed=0, step=step, slots=range(32))
        t = torch.from_numpy(choice.t).float()[:, None]
        noise = torch.randn(32, width, generator=generator)
        x0 = teacher.T[torch.from_numpy(choice.pair)]
        x_t = (1 - t) * x0 + t * noise
        shown = torch.from_numpy(choice.condition)
        onehot = torch.eye(pool)[shown] * torch.from_numpy(~choice.null)[:, None]
        loss, _ = losses(
            student(torch.cat([onehot, x_t], 1)),
            onehot @ teacher.T,
            noise - x0,
            torch.from_numpy(~choice.switched),
            config,
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return torch.stack([initial, student.weight[:, :pool].detach(), teacher])


def test_only_random_conditioning_teaches_conditions_without_pictures():
    unseen = slice(3, 5)
    initial, student, _ = trained(PAIRED_ONLY, seen=3, pool=5, width=4)
    assert torch.equal(student[:, unseen], initial[:, unseen])
    assert (student[:, :3] != initial[:, :3]).all()
    initial, student, teacher = trained(RC, seen=3, pool=5, width=4)
    before, after = ((w - teacher)[:, unseen].norm() for w in (initial, student))
    assert after < 0.3 * before
