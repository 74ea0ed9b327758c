"""Actors that fall silent and samples that do not arrive, on a real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError

from cluster.dispatch import Cancelled
from cluster.fleet import Event, Fleet, Member
from cluster.ray_cluster import ClusterError, connected
from cluster.reward_actors import RayScorer
from cluster.stacks import end_processes
from cluster.workers import Health
from recipes.schema import ClusterConfig, Recipe
from rewards.calling import RewardFailed
from rl.contracts import Sampled
from rollout.draws import groups_for
from rollout.flow_sampler import FlowSummary

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def recipe(digits_recipe: Callable[..., Recipe]) -> Iterator[Recipe]:
    """Of a cluster that is up."""
    rewards = "rewards=[{kind: ink, deadline: 1, retries: 0}]"
    made = digits_recipe(rewards, "evaluation.rewards=[]")
    with connected(made):
        yield made


@pytest.fixture
def config(recipe: Recipe) -> ClusterConfig:
    return recipe.cluster


def actor() -> Any:
    """An actor that answers as a rollout worker does; the class is sent along."""

    class Answering:
        def __init__(self) -> None:
            self.boot = os.urandom(8).hex()

        @ray.method(concurrency_group="health")
        def health(self) -> Health:
            return Health(self.boot, os.getpid(), None)

    remote: Any = ray.remote(num_cpus=0, max_restarts=-1, concurrency_groups={"health": 1})
    return remote(Answering).remote()


def impatient(fleet: Fleet) -> None:
    """From now on, not for its first start: a loaded machine starts a process in its own time."""
    fleet.config = fleet.config.model_copy(update={"start_timeout": 10.0})


def test_a_silent_process_in_quarantine_is_ended_and_another_takes_its_place(config: ClusterConfig):
    told: list[tuple[int, Event]] = []

    def note(member: Member, event: Event) -> None:
        told.append((member.index, event))
        if event == "hung":
            end_processes([member.handle], 0.5)

    fleet = Fleet([actor(), actor()], config, note)
    first, _ = fleet.start()
    impatient(fleet)
    # What Ray says when a connection fails, here of a process that then stays stopped.
    os.kill(first.pid, signal.SIGSTOP)
    fleet.quarantine(fleet.members[0], ActorUnavailableError("no answer", None))
    assert fleet.free() is fleet.members[1]
    deadline = time.monotonic() + 170
    while not fleet.whole and time.monotonic() < deadline:
        fleet.readmit()
        time.sleep(0.1)
    assert fleet.whole
    assert told[:2] == [(0, "lost"), (0, "hung")] and told[-1] == (0, "back")
    assert fleet.members[0].pid != first.pid
    for member in fleet.members:
        ray.kill(member.handle)


def test_nobody_left_within_the_time_to_start_is_an_error(config: ClusterConfig):
    fleet = Fleet([actor()], config, lambda member, event: None)
    (alone,) = fleet.start()
    impatient(fleet)
    os.kill(alone.pid, signal.SIGSTOP)
    fleet.quarantine(fleet.members[0], ActorUnavailableError("no answer", None))
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="no rollout actor is left"):
        while time.monotonic() < begun + 100:
            fleet.readmit()
            time.sleep(0.1)
    assert time.monotonic() - begun > fleet.config.start_timeout
    os.kill(alone.pid, signal.SIGKILL)


@pytest.fixture
def missing(recipe: Recipe, tmp_path: Path) -> Iterator[Sampled]:
    """A group whose samples arrive when there is a file ``sent``."""
    sent = tmp_path / "sent"

    @ray.remote(num_cpus=0)
    def late() -> np.ndarray:
        while not sent.exists():
            time.sleep(0.05)
        return np.zeros((4, 1, 28, 28, 1), np.uint8)

    (group,) = groups_for(recipe.prompts.load(), seed=0, step=7, count=1, size=4)
    media = late.remote()
    yield Sampled(group, 0, None, media, FlowSummary(0, 0), {}, 1, 0.0, 0)
    ray.cancel(media, force=True)


@contextmanager
def scoring(recipe: Recipe, log_dir: Path) -> Iterator[RayScorer]:
    scorer = RayScorer(recipe, str(log_dir))
    scorer.start()
    yield scorer
    for served in scorer.training:
        for replica in served.replicas:
            ray.kill(replica)


def test_samples_that_do_not_arrive_are_not_the_fault_of_a_prompt(
    recipe: Recipe, missing: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cluster.reward_actors.FETCH_SECONDS", 0.5)
    with (
        scoring(recipe, tmp_path) as scorer,
        pytest.raises(RewardFailed, match=r"samples of step 7 did not arrive .* within 0.5 s"),
    ):
        scorer.score([missing])


def test_late_samples_hold_up_no_others_and_who_stops_does_not_wait_for_them(
    digits_recipe: Callable[..., Recipe], missing: Sampled, tmp_path: Path
):
    patient = digits_recipe("rewards=[{kind: ink, deadline: 600}]", "evaluation.rewards=[]")
    here = replace(missing, media=np.zeros((4, 1, 28, 28, 1), np.uint8))
    with scoring(patient, tmp_path) as scorer, ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(scorer.score, [missing])
        with pytest.raises(TimeoutError):
            waiting.result(1)
        assert len(threads.submit(scorer.score, [here]).result(20)) == 1
        scorer.cancel()
        with pytest.raises(Cancelled):
            waiting.result(20)
        assert len(threads.submit(scorer.score, [here]).result(20)) == 1
        scorer.take_seconds()
        (tmp_path / "sent").touch()
        ray.get(missing.media)
        time.sleep(2)  # an actor that still had the call would work on it now
        assert scorer.take_seconds() == 0
