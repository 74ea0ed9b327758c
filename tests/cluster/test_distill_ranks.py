"""Distillation on actors: several networks under DeepSpeed against plain PyTorch, and whole runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from cluster.launch import run_locally
from cluster.learner_group import RayLearner
from cluster.local import LocalLearner
from cluster.ray_cluster import Placement, connected
from cluster.teacher_store import fill
from cluster.trained import STATE_FILE
from cluster.weights import unpack
from distill.catalogue import build_teacher, teacher_plan
from distill.contracts import TeacherItem
from distill.store import TeacherStore
from recipes.schema import DistillRecipe
from recipes.source import load
from rl.contracts import Update
from rollout.draws import groups_for
from rollout.flow_sampler import FlowRollout, FlowSampler

pytestmark = pytest.mark.timeout(900)

NETWORKS = ("student", "heads", "fake_score")
SAMPLES = 12
# Every loss and every network takes part from the first step on.
METHOD = (
    "steps=4", "rollout.steps=4", "tracking=[]", f"learner.micro_batch={SAMPLES}",
    "distill.warmup_steps=0", "distill.adversarial=0.05", "distill.regression=0.5",
    "distill.dmd=0.1", "distill.fake_score={updates: 2, learning_rate: 5.0e-4}",
    "distill.discriminator={updates: 2, learning_rate: 1.0e-3, r1_weight: 0.01, r1_sigma: 0.05}",
    "optimizer={learning_rate: 5.0e-4, betas: [0.0, 0.99], decay: cosine, ema_decay: 0.9}",
)  # fmt: skip
FULL = ("distill.parameters=full_per_step",)
LORA = ("distill.parameters=lora_per_step", "policy.lora={rank: 4, alpha: 8}")
State = dict[str, Tensor]
Case = tuple[int, int]


def recipe(*overrides: str) -> DistillRecipe:
    return load(Path("digits/two_step"), DistillRecipe, [*METHOD, *overrides]).value


@cache
def steps_of() -> list[list[TeacherItem]]:
    """Two training steps of real teacher samples; three groups, so two ranks are uneven."""
    drawn = [teacher_samples(recipe(), step, count=3) for step in range(2)]
    return [
        [TeacherItem(r.replay, 4, 1 / SAMPLES, r.group.prompt, r.group.columns) for r in rollouts]
        for rollouts in drawn
    ]


def teacher_samples(described: DistillRecipe, step: int, count: int) -> list[FlowRollout]:
    sampler = FlowSampler(described.rollout, build_teacher(described.policy, "cpu"))
    groups = groups_for(described.prompts.load(), seed=0, step=step, count=count, size=4)
    return sampler.sample(groups, [teacher_plan()] * count)


def state_of(learner: LocalLearner | RayLearner, directory: Path) -> State:
    """All that is saved of all networks."""
    directory.mkdir(exist_ok=True)
    learner.save(directory)
    return load_file(directory / STATE_FILE)


@dataclass(frozen=True)
class Reference:
    """The two steps on one rank of plain PyTorch, in one micro-batch."""

    before: State
    after: State
    update: Update


References = Callable[[tuple[str, ...]], Reference]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    @cache
    def train(parameters: tuple[str, ...]) -> Reference:
        directory = tmp_path_factory.mktemp("reference")
        learner = LocalLearner(recipe(*parameters))
        before = state_of(learner, directory)
        update = learner.update(steps_of())
        return Reference(before, state_of(learner, directory), update)

    return train


@dataclass
class Actors:
    """Groups of one and of two ranks, whose processes train one recipe after another."""

    placement: Placement
    directory: Path
    groups: dict[int, RayLearner] = field(default_factory=dict[int, RayLearner])

    def start(self, *overrides: str, ranks: int, stage: int) -> RayLearner:
        """New engines, with nothing of the recipe before."""
        described = recipe(
            *overrides, f"learner.ranks={ranks}", f"learner.zero_stage={stage}", f"name=of-{ranks}"
        )
        if ranks not in self.groups:
            places = self.placement.ranks
            own = replace(self.placement, ranks=places[:1] if ranks == 1 else places[1:])
            self.groups[ranks] = RayLearner(described, own, str(self.directory))
        self.groups[ranks].recipe = described
        self.groups[ranks].start()
        return self.groups[ranks]


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actors]:
    with connected(recipe("learner.ranks=3")) as placement:
        yield Actors(placement, tmp_path_factory.mktemp("actors"))


def distance(got: State, expected: State, before: State, network: str, kind: str) -> float:
    """|got - expected| over |expected - before|, Euclidean, over all tensors of a kind."""
    names = [n for n in expected if n.startswith(f"{network}:") and n.endswith(f".{kind}")]
    apart = torch.stack([(got[n] - expected[n]).norm() for n in names]).norm()
    moved = torch.stack([(expected[n] - before.get(n, 0 * got[n])).norm() for n in names]).norm()
    assert moved > 0
    return float(apart / moved)


def assert_same_training(got: State, expected: State, before: State) -> None:
    """Two learners agree on all networks, relative to how far they have gone from ``before``.

    Reduction order is all that differs. AdamW without a first moment divides small gradients by
    themselves, so weights are within 1e-2 (measured 3e-3). The moments are the last gradients and
    averages of their squares: apart by 5e-5, but for a unit of the heads at the kink of its
    LeakyReLU, which may fall on either side (9e-3): within 2e-2.
    """
    assert got.keys() == expected.keys()
    assert {name.split(":")[0] for name in got if name.endswith(".ema")} == {"student"}
    for network in NETWORKS:
        assert got[f"{network}:optimizer_steps"] == expected[f"{network}:optimizer_steps"]
        for kind, limit in (("weight_fp32", 1e-2), ("ema", 1e-2),
                            ("exp_avg", 2e-2), ("exp_avg_sq", 2e-2)):  # fmt: skip
            if kind != "ema" or network == "student":
                apart = distance(got, expected, before, network, kind)
                assert apart <= limit, (network, kind, apart)


def assert_published(learner: RayLearner, expected: State) -> None:
    """Each element within 2e-4, of 1e-3 that the furthest went."""
    for averaged, kind in ((False, "weight_fp32"), (True, "ema")):
        blob: Any = ray.get(learner.publish(0, averaged).data)
        names = {n for n in expected if n.startswith("student:") and n.endswith(f".{kind}")}
        found = {f"student:{name}.{kind}": array for name, array in unpack(blob).items()}
        assert found.keys() == names
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 3), *(pytest.param(*case, marks=pytest.mark.slow)
               for case in ((2, 0), (2, 1), (2, 2), (1, 0), (1, 1), (1, 2), (1, 3)))],
)  # fmt: skip
def test_all_networks_train_like_plain_pytorch(
    actors: Actors, reference: References, tmp_path: Path, ranks: int, stage: int, parts: int
):
    """A rank's samples in one micro-batch, all gradients clipped; in two, none of them clipped.

    On two ranks the micro-batches of the second one are padded.
    """
    micro_batch, clip_norm = (12 if ranks == 1 else 8) // parts, 0.2 if parts == 1 else 100
    for parameters in (FULL, LORA) if stage < 3 else (FULL,):
        settings = (*parameters, f"optimizer.clip_norm={clip_norm}")
        expected = reference(settings)
        size = f"learner.micro_batch={micro_batch}"
        learner = actors.start(*settings, size, ranks=ranks, stage=stage)
        update = learner.update(steps_of())
        got = state_of(learner, tmp_path)
        assert_same_training(got, expected.after, expected.before)
        assert got["student:optimizer_steps"] == 2
        assert got["heads:optimizer_steps"] == got["fake_score:optimizer_steps"] == 4
        assert_published(learner, expected.after)
        assert update.grad_norms == pytest.approx(expected.update.grad_norms, rel=1e-4)
        assert 0.2 < min(update.grad_norms) < max(update.grad_norms) < 100
        assert update.table.keys() == expected.update.table.keys()
        for name, column in expected.update.table.items():
            same = pytest.approx(np.sort(column), rel=1e-2, abs=1e-3)
            assert np.sort(update.table[name]) == same, name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, 2), (1, 1), marks=pytest.mark.slow),
        *(pytest.param((1, ranks), (1, 2), marks=pytest.mark.slow) for ranks in (1, 2)),
        *(pytest.param((stage, old), (stage, new), marks=pytest.mark.slow)
          for stage in (0, 2, 3)
          for old, new in ((2, 2), (2, 1), (1, 2))),
        pytest.param((1, 2), (3, 1), marks=pytest.mark.slow),
    ],
    ids=lambda case: "zero{}x{}".format(*case),
)  # fmt: skip
def test_all_networks_move_to_other_ranks(
    actors: Actors, reference: References, tmp_path: Path, before: Case, after: Case
):
    """(stage, ranks): one step, save, restore elsewhere, another step: like two in one go."""
    start = reference(FULL).before
    first, second = steps_of()
    micro_batch = f"learner.micro_batch={SAMPLES // 2}"
    stage, ranks = before
    learner = actors.start(*FULL, micro_batch, stage=stage, ranks=ranks)
    learner.update([first])
    saved = state_of(learner, tmp_path / "saved")
    learner.update([second])
    uninterrupted = state_of(learner, tmp_path / "uninterrupted")
    stage, ranks = after
    learner = actors.start(*FULL, micro_batch, stage=stage, ranks=ranks)
    learner.restore(tmp_path / "saved")
    restored = state_of(learner, tmp_path / "restored")
    assert restored.keys() == saved.keys()
    assert [n for n in saved if not torch.equal(restored[n], saved[n])] == []
    learner.update([second])
    continued = state_of(learner, tmp_path / "continued")
    if before == after:
        assert [n for n in saved if not torch.equal(continued[n], uninterrupted[n])] == []
    assert_same_training(continued, uninterrupted, start)
    assert_same_training(continued, reference(FULL).after, start)


STEPS = 6
RUN = (
    f"steps={STEPS}", "distill.warmup_steps=2",
    "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.batch_size=8",
    "rollout.groups_per_shard=4", "evaluation.every=6", "evaluation.samples=40",
    "checkpoints.every=3",
)  # fmt: skip
ACTORS = ("learner.ranks=2", "learner.micro_batch=8", "workers.count=2")
ALONE = ("learner.ranks=1", "learner.micro_batch=16", "workers.count=1")


def begin(path: Path, verb: str, *overrides: str) -> subprocess.Popen[str]:
    settings = [*METHOD, *RUN, *ACTORS, f"run_dir={path}", *overrides]
    sets = [part for setting in settings for part in ("--set", setting)]
    with (path / "output.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", "from cluster.cli import main; main()", verb,
             "digits/two_step", *sets],
            stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], path: Path) -> Path:
    assert process.wait(timeout=400) == 0, (path / "output.txt").read_text()[-3000:]
    return path / "digits-two-step"


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows of the metrics without what a clock decides."""
    timed = ("time", "busy/", "idle/", "cost/seconds", "cost/actor_seconds")
    file = run / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    found = [row for row in lines if row["kind"] == kind]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


def state_in(run: Path) -> bytes:
    return (run / "checkpoints" / f"step_{STEPS:06d}" / STATE_FILE).read_bytes()


def kill_a_worker(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "it ended early"
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::RolloutWorker" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                return
    pytest.fail("no rollout actor is there")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    return finish(begin(path, "run"), path)


@pytest.mark.slow
def test_one_process_gives_the_same_distillation(undisturbed: Path, tmp_path: Path):
    """No Ray, no DeepSpeed, one worker, one rank: the same teacher samples, the same curve."""
    run_locally(recipe(*RUN, *ALONE), tmp_path / "local", Console(quiet=True))
    here, there = rows(tmp_path / "local"), rows(undisturbed)
    assert len(here) == len(there) == STEPS
    # Before the first update the student is its teacher: its error is a fact of the samples.
    assert here[0]["error/final"] == pytest.approx(there[0]["error/final"], rel=1e-5)
    for mine, theirs in zip(here, there, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("error/final", "error/first", "grad_norm", "loss/student"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3), (mine["step"], key)
    for key in ("discriminator/final/accuracy", "loss/discriminator", "dmd/final"):
        assert [key in row for row in here] == [False] * 2 + [True] * 4
        assert here[2][key] == pytest.approx(there[2][key], rel=2e-3), key
    mine, theirs = rows(tmp_path / "local", "evaluation"), rows(undisturbed, "evaluation")
    teacher = [key for key in mine[0] if key.startswith("teacher")]
    assert teacher and [mine[0][key] for key in teacher] == [theirs[0][key] for key in teacher]
    key = "evaluation/digit_log_prob/mean"
    assert mine[1][key] == pytest.approx(theirs[1][key], rel=2e-3)


@pytest.mark.slow
def test_a_killed_rollout_actor_leaves_a_distillation_the_same(undisturbed: Path, tmp_path: Path):
    process = begin(tmp_path, "run")
    run = tmp_path / "digits-two-step"
    kill_a_worker(process, lambda: len(rows(run)) >= 1)
    finish(process, tmp_path)
    assert "quarantined" in (run / "logs" / "attempt-1" / "driver.log").read_text()
    assert rows(run) == rows(undisturbed)
    assert rows(run, "evaluation") == rows(undisturbed, "evaluation")
    assert state_in(run) == state_in(undisturbed)


def shards(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.glob("shard_*"))}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    finish(begin(path, "teacher", f"rollout.store={path / 'samples'}"), path)
    return path / "samples"


@pytest.mark.slow
def test_a_store_holds_what_the_teacher_draws_and_is_filled_once(store: Path):
    filled = TeacherStore.open(store)
    assert len(filled) == STEPS * 4
    for place, drawn in enumerate(teacher_samples(recipe(*RUN), step=5, count=4), 5 * 4):
        stored = filled.reference(place).read()
        assert (stored.prompt, stored.columns) == (drawn.group.prompt, drawn.group.columns)
        np.testing.assert_array_equal(stored.seeds, drawn.replay.seeds)
        np.testing.assert_allclose(stored.x0, drawn.replay.final, rtol=0, atol=1e-5)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert fill(recipe(*RUN, *ALONE, f"rollout.store={store}"), Console(quiet=True), None) == store
    assert times == {path: path.stat().st_mtime_ns for path in store.rglob("*")}


@pytest.mark.slow
def test_lost_shards_are_drawn_again_to_the_same_bytes(store: Path, tmp_path: Path):
    before = shards(store)
    (store / "shard_000002.safetensors").unlink()
    (store / "shard_000004.safetensors").write_bytes(b"cut short")
    finish(begin(tmp_path, "teacher", f"rollout.store={store}", "workers.count=1"), tmp_path)
    assert shards(store) == before


@pytest.mark.slow
def test_a_killed_rollout_actor_leaves_a_store_the_same(store: Path, tmp_path: Path):
    """The only one: nothing is drawn until its new process is back."""
    again = tmp_path / "again"
    process = begin(tmp_path, "teacher", f"rollout.store={again}", "workers.count=1", "steps=60")
    kill_a_worker(process, lambda: len(shards(again)) >= 2)
    finish(process, tmp_path)
    assert "re-admitted" in (tmp_path / "output.txt").read_text()
    assert len(TeacherStore.open(again)) == 60 * 4
    for file in store.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_run_learns_from_a_store(store: Path, undisturbed: Path, tmp_path: Path):
    """As in one process; it draws no teacher samples, and its teacher is evaluated alike."""
    run = finish(begin(tmp_path, "run", f"rollout.store={store}"), tmp_path)
    assert [row["cost/nfe"] for row in rows(run)] == [0.0] * STEPS
    assert rows(run, "evaluation")[0] == rows(undisturbed, "evaluation")[0]
    described = recipe(*RUN, *ALONE, f"rollout.store={store}")
    run_locally(described, tmp_path / "local", Console(quiet=True))
    for mine, theirs in zip(rows(tmp_path / "local"), rows(run), strict=True):
        for key in ("error/final", "error/first", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3), (mine["step"], key)
