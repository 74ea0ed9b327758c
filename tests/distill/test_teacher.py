"""The teacher's samples: golden spreads, streams and stores as functions of (seed, step), micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_two_step import TEACHER, Gaussian, Toy, scalars
from torch import Tensor

from distill.batches import TwoStepBatch, two_step_batches
from distill.catalogue import teacher_plan
from distill.contracts import TeacherItem
from distill.noise import gaussians
from distill.real_data import real_digits
from distill.store import StoredGroup, TeacherStore
from distill.teacher import StoredTeacher, StreamedTeacher, draws_of
from rl.contracts import Plan, Sampled
from rollout.draws import Group, Prompt
from rollout.flow import ode_step, renoised
from rollout.flow_sampler import FlowSampler, FlowSamplerConfig
from rollout.policies.digits import moving_digits, training_digits
from rollout.prompts import DigitPrompts

PROMPTS = [Prompt(f"p{i}", f"prompt {i}", {"digit": i}) for i in range(5)]
SIGMAS = (1.0, 0.75, 0.0)


def sampler(steps: int = 8, shift: float = 3.0) -> FlowSampler:
    config = FlowSamplerConfig(steps=steps, shift=shift, sigma_max=1.0)
    return FlowSampler(config, Gaussian(0.5))


class Pool:
    """A worker that samples ``size`` groups a job, and hands jobs out in another order than asked.

    Attributes:
        drawn: groups sampled so far; ``finished``: streams that came to their end.
    """

    def __init__(self, size: int = 1, window: int = 1, impossible: Sequence[str] = ()) -> None:
        self.sampler, self.size, self.window = sampler(), size, window
        self.impossible, self.drawn, self.finished = impossible, 0, 0

    def load(self, weights: Any) -> None:
        raise NotImplementedError

    def generate(self, groups: Sequence[Group], plans: Sequence[Plan]) -> Iterator[Sampled]:
        jobs = [groups[i : i + self.size] for i in range(0, len(groups), self.size)]
        for start in range(0, len(jobs), self.window):
            for number, job in reversed(list(enumerate(jobs))[start : start + self.window]):
                yield from self._run(number, job)
        self.finished += 1

    def _run(self, number: int, job: Sequence[Group]) -> Iterator[Sampled]:
        for rollout in self.sampler.sample(job, [teacher_plan()] * len(job)):
            self.drawn += 1
            if rollout.group.prompt_id not in self.impossible:
                yield Sampled(
                    group=rollout.group, job=number, replay=rollout.replay, media=rollout.media,
                    summary=rollout.summary, facts={}, forwards=rollout.forwards, seconds=0.5,
                    version=0,
                )  # fmt: skip


def streamed(pool: Pool, every: int, size: int = 2, steps: int = 7) -> StreamedTeacher:
    """Three groups a step; a stream ends before every ``every``-th step."""
    groups = draws_of(PROMPTS, seed=3, count=3, size=size)

    def until(step: int) -> int:
        return min((step // every + 1) * every, steps)

    return StreamedTeacher(pool, teacher_plan(), groups, until)


def facts(items: Sequence[TeacherItem]) -> list[Any]:
    """All that a learner is told, as plain values."""
    return [
        (item.replay.seeds.tolist(), item.replay.final.tobytes(), item.evaluations, item.weight,
         item.prompt, dict(item.columns))
        for item in items
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "shift", "std"),
    [(2, 3.0, 0.0810811), (4, 3.0, 0.2121081), (8, 3.0, TEACHER), (16, 3.0, 0.4156207),
     (2, 1.0, 0.2), (8, 1.0, 0.4147846)],
)  # fmt: skip
def test_euler_makes_a_narrower_gaussian_than_the_data(steps: int, shift: float, std: float):
    """Data N(1, .5^2), exact velocity."""
    group = Group(0, 0, "p", "", {}, 2, seed=5)
    (rollout,) = sampler(steps, shift).sample([group], [teacher_plan()])
    z = gaussians(rollout.replay.seeds.tolist(), Toy.latent_shape, "initial")
    final = torch.from_numpy(rollout.replay.final)
    torch.testing.assert_close(final, 1 + std * z, rtol=0, atol=2e-6)


def test_a_z_image_transformer_reaches_x0_in_one_step_of_size_1():
    """It takes 1 - sigma as its time and gives -v."""

    class ZImage(Toy):
        def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return -self.transformer(x, 1 - t)

        def transformer(self, x: Tensor, time: Tensor) -> Tensor:
            assert (time == 0).all()
            return -(x - 3.5)

    group = Group(0, 0, "p", "", {}, 2, seed=5)
    few = FlowSampler(FlowSamplerConfig(sigma_max=1.0), ZImage(scalars(0.0)))
    (rollout,) = few.sample([group], [teacher_plan(steps=1)])
    np.testing.assert_allclose(rollout.replay.final, 3.5, rtol=1e-6)
    assert rollout.forwards == 2


def test_the_same_noise_is_exactly_one_euler_step():
    z, v = gaussians((1, 2), (3, 1, 2, 4, 4)).double()
    sigmas = [torch.full((3,), sigma, dtype=torch.float64) for sigma in SIGMAS]
    moved = renoised(ode_step(z, v, sigmas[0], sigmas[2]), SIGMAS[1], z)
    torch.testing.assert_close(moved, z + (SIGMAS[1] - 1) * v, rtol=0, atol=1e-15)
    torch.testing.assert_close(moved, ode_step(z, v, *sigmas[:2]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("every", "size", "window", "start"),
    [(1, 1, 1, 0), (3, 1, 4, 0), (7, 2, 1, 0), (7, 1, 100, 0), (100, 4, 2, 0), (3, 1, 2, 4)],
)
def test_a_stream_gives_the_same_items_however_it_is_cut(
    every: int, size: int, window: int, start: int
):
    """Jobs of any size, finished in any order, streams of any length, from any step on."""
    plain = streamed(Pool(), every=7)
    expected = [facts(plain.take(step)[0]) for step in range(7)]
    other = streamed(Pool(size, window), every)
    found = [facts(other.take(step)[0]) for step in range(start, 7)]
    assert found == expected[start:]
    assert len({str(step) for step in expected}) == 7


def test_an_item_is_its_draws_and_the_weights_of_a_step_sum_to_1():
    groups = draws_of(PROMPTS, seed=3, count=3, size=2)
    items, (forwards, seconds) = streamed(Pool(window=3), every=4).take(0)
    assert (forwards, seconds) == (3 * 2 * 8, 1.5)
    for item, group in zip(items, groups(0), strict=True):
        assert item.replay.seeds.tolist() == [group.draw(j).seed for j in range(2)]
        assert (item.prompt, item.columns, item.evaluations) == (group.prompt, group.columns, 2)
    assert sum(item.weight * item.evaluations for item in items) == pytest.approx(1.0)


def test_a_stream_runs_no_further_than_it_is_read_and_ends_where_it_must():
    pool = Pool()
    teacher = streamed(pool, every=3)
    for step, drawn, finished in [(0, 3, 0), (1, 6, 0), (2, 9, 1), (3, 12, 1), (5, 18, 2)]:
        if step == 5:
            teacher.take(4)
        teacher.take(step)
        assert (pool.drawn, pool.finished) == (drawn, finished)
    teacher.take(6)
    assert (pool.drawn, pool.finished) == (21, 3)


def test_an_impossible_group_is_missing_and_the_others_share_the_loss():
    whole, holed = streamed(Pool(), every=7), streamed(Pool(impossible=["p2"]), every=7)
    for step in range(7):
        expected = [item for item in whole.take(step)[0] if item.prompt != "prompt 2"]
        items, _ = holed.take(step)
        assert [item.replay.seeds.tolist() for item in items] == [
            item.replay.seeds.tolist() for item in expected
        ]
        assert sum(item.weight * item.evaluations for item in items) == pytest.approx(1.0)


def store(directory: Path, sizes: Sequence[int] = (2, 2, 2, 2, 2)) -> TeacherStore:
    """Groups of the streamed teacher's first draws, two a shard."""
    shards = -(-len(sizes) // 2)
    made = TeacherStore.create(directory, {"teacher": "toy"}, shards)
    groups: list[StoredGroup] = []
    for number, size in enumerate(sizes):
        group = draws_of(PROMPTS, seed=3, count=len(sizes), size=size)(0)[number]
        (rollout,) = sampler().sample([group], [teacher_plan()])
        replay = rollout.replay
        groups.append(
            StoredGroup(group.prompt_id, group.prompt, group.columns, replay.seeds, replay.final)
        )
    for shard in range(shards):
        made.write(shard, groups[2 * shard : 2 * shard + 2])
    return TeacherStore.open(directory)


def test_a_store_is_walked_through_once_an_epoch(tmp_path: Path):
    opened = store(tmp_path)
    teacher = StoredTeacher(opened, seed=0, count=3)
    taken = [teacher.take(step) for step in range(10)]
    places = [(i.replay.shard, i.replay.group) for items, _ in taken for i in items]
    assert all(spent == (0, 0.0) for _, spent in taken)
    epochs = [places[i : i + 5] for i in range(0, 30, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_a_stored_step_is_a_function_of_seed_and_step(tmp_path: Path):
    opened = store(tmp_path)
    forward = [StoredTeacher(opened, 0, 3).take(step)[0] for step in range(6)]
    teacher = StoredTeacher(opened, 0, 3)
    assert [teacher.take(step)[0] for step in reversed(range(6))] == forward[::-1]
    assert [StoredTeacher(opened, 1, 3).take(step)[0] for step in range(6)] != forward


def test_stored_samples_weigh_the_same_whatever_their_group(tmp_path: Path):
    teacher = StoredTeacher(store(tmp_path, sizes=(1, 4, 2, 3, 1)), seed=0, count=4)
    for step in range(5):
        items, _ = teacher.take(step)
        assert len({item.weight for item in items}) == 1
        assert sum(item.weight * item.evaluations for item in items) == pytest.approx(1.0)


def batches(items: Sequence[TeacherItem], size: int, count: int) -> list[TwoStepBatch]:
    def fetch(replay: Any) -> Any:
        return replay if hasattr(replay, "final") else replay.read()

    return list(two_step_batches(Gaussian(0.5), items, fetch, size, count, None))


@pytest.mark.parametrize(("size", "count"), [(6, 1), (4, 2), (1, 6), (4, 5), (16, 1)])
def test_micro_batches_are_of_one_size_and_padded(size: int, count: int):
    items, _ = streamed(Pool(), every=7).take(0)
    found = batches(items, size, count)
    assert [len(batch.z) for batch in found] == [size] * count
    weights, x0 = (torch.cat([getattr(b, name) for b in found]) for name in ("weights", "x0"))
    torch.testing.assert_close(weights[:6], torch.full((6,), 1 / 6))
    assert (weights[6:] == 0).all() and (x0[6:] == 0).all()
    assert torch.equal(x0[:6], torch.from_numpy(np.concatenate([i.replay.final for i in items])))


def test_a_row_starts_at_the_noise_that_the_teacher_started_from(tmp_path: Path):
    """Streamed or stored: x0 is the teacher's map of z, and the real samples are the teacher's."""
    stored, _ = StoredTeacher(store(tmp_path), seed=0, count=5).take(0)
    for items, rows in ((streamed(Pool(), every=7).take(0)[0], 6), (stored, 10)):
        (batch,) = batches(items, rows, 1)
        assert (batch.weights > 0).all()
        torch.testing.assert_close(batch.x0, 1 + TEACHER * batch.z, rtol=0, atol=2e-6)
        assert torch.equal(batch.real, batch.x0)


def test_real_samples_are_training_digits_of_the_prompt():
    images, labels = training_digits()
    draw, seen = real_digits(moving=False), list[bytes]()
    for digit in (0, 7):
        own = {image.tobytes() for image in images[labels == digit]}
        drawn = [draw({"digit": digit}, seed) for seed in range(20)]
        assert {tuple(x.shape) for x in drawn} == {(1, 1, 8, 8)}
        assert {x.numpy().tobytes() for x in drawn} <= own
        seen += [x.numpy().tobytes() for x in drawn]
    assert len(set(seen)) > 30
    assert torch.equal(draw({"digit": 3}, 5), draw({"digit": 3}, 5))


def test_real_videos_move_as_the_prompt_says():
    draw = real_digits(moving=True)
    for prompt in DigitPrompts(moving=True).load()[:4]:
        clip = draw(prompt.columns, 1)
        assert clip.shape == (1, 4, 8, 8)
        way = np.array([["left", "right", "up", "down"].index(prompt.columns["direction"])])
        assert np.array_equal(clip.numpy(), moving_digits(clip.numpy()[:, 1], way))
