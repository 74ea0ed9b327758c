"""Reward models as Ray actors: replicas, deadlines, bounded retries, and poison found by name.

Reward workers hold no state, so Ray itself restarts them and repeats a call that lost its process.
A chunk that kills the process every time is taken apart until the sample that does it is known.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from cluster.dispatch import Cancelled
from cluster.jobs import chunk_columns, chunked, collect, reward_name
from cluster.ray_cluster import LOST, TIMEOUT, ClusterError
from cluster.stacks import end_processes, keep_stacks
from cluster.timeline import Timeline
from cluster.workers import RewardWorker
from recipes.schema import AnyRecipe
from rewards.calling import Failure, RewardFailed, Scores
from rewards.catalogue import RewardConfig
from rewards.serving import EnvironmentServer, crossing, interpreter, process_variables
from rl.contracts import Metrics, Sampled, Scored

logger = logging.getLogger(__name__)

FETCH_SECONDS = 120.0


@dataclass
class _Served:
    """One reward with its replicas."""

    config: RewardConfig
    replicas: list[Any]
    calls: int = 0

    def next(self) -> int:
        """A replica, in turn."""
        self.calls += 1
        return self.calls % len(self.replicas)

    def track(self, replica: int) -> str:
        """Its name in logs."""
        return f"reward-{reward_name(self.config)}-{replica}"


@dataclass(frozen=True)
class _Call:
    """``stop``: done when nobody wants the answer any more."""

    served: _Served
    replica: int
    answer: Any
    stop: Future[None]


class RayScorer:
    """See ``rl.contracts.Scorer``."""

    def __init__(self, recipe: AnyRecipe, log_dir: str, timeline: Timeline | None = None) -> None:
        """``timeline``: gets what each actor does."""
        self.log_dir, self.timeline = log_dir, timeline
        self.training = [self._serve(recipe, config, log_dir) for config in recipe.rewards]
        self.held_out = [
            self._serve(recipe, config, log_dir) for config in recipe.evaluation.rewards
        ]
        self.start_timeout = recipe.cluster.start_timeout
        self.seconds = 0.0
        self._counting = threading.Lock()
        self._stop: Future[None] = Future()

    def _serve(self, recipe: AnyRecipe, config: RewardConfig, log_dir: str) -> _Served:
        name = reward_name(config)
        replicas = [
            _actor(
                config,
                f"{recipe.name}-reward-{name}-{index}",
                f"{log_dir}/reward-{name}-{index}.log",
            )
            for index in range(config.replicas)
        ]
        return _Served(config, replicas)

    def start(self) -> list[int]:
        """Wait until every replica answers; returns their process ids.

        Raises:
            ClusterError: a reward that cannot be built, with its own error.
        """
        served = [*self.training, *self.held_out]
        pids: list[int] = []
        for one in served:
            for replica in one.replicas:
                try:
                    pids.append(ray.get(replica.health.remote(), timeout=self.start_timeout))
                except (TIMEOUT, *LOST) as error:
                    name = reward_name(one.config)
                    raise ClusterError(f"reward {name!r} did not start: {error}") from error
        return pids

    def score(self, samples: Iterable[Sampled], held_out: bool = False) -> list[Scored]:
        """See ``rl.contracts.Scorer``. Calls go out as samples come in."""
        served, stop = [*self.training, *(self.held_out if held_out else [])], self._stop
        chunks: list[list[Sampled]] = []
        calls: list[list[_Call]] = []
        scores: dict[str, list[Scores]] = {reward_name(one.config): [] for one in served}
        try:
            for chunk in chunked(samples):
                chunks.append(chunk)
                calls.append([self._submit(one, chunk, stop) for one in served])
            for chunk, row in zip(chunks, calls, strict=True):
                for call in row:
                    scores[reward_name(call.served.config)].append(self._receive(call, chunk))
        except Cancelled:
            for row in calls:  # an actor would score them before those of the next set
                for call in row:
                    ray.cancel(call.answer)
            raise
        return collect(chunks, scores, [one.config for one in served])

    def cancel(self) -> None:
        """See ``rl.contracts.Scorer``. An actor ends the call it is at; nobody waits for it."""
        stop, self._stop = self._stop, Future()
        stop.set_result(None)

    def describe(self, samples: Sequence[Sampled]) -> Metrics:
        """See ``rl.contracts.Scorer``."""
        prompts, columns = chunk_columns(samples)
        media, stop = [sample.media for sample in samples], self._stop

        def ask(one: _Served) -> _Call:
            replica = one.next()
            answer = one.replicas[replica].describe.remote(prompts, columns, *media)
            return _Call(one, replica, answer, stop)

        metrics: Metrics = {}
        for call in [ask(one) for one in [*self.training, *self.held_out]]:
            name = reward_name(call.served.config)
            try:
                described = self._answer(call, lambda call=call: ask(call.served))
            except ObjectLostError:
                raise
            except (TIMEOUT, *LOST) as error:
                raise RewardFailed(f"reward {name!r} does not describe a set: {error}") from error
            metrics |= {f"{name}/{key}": value for key, value in described.items()}
        return metrics

    def remote_scores(self) -> dict[str, RemoteScore]:
        """How another actor asks the training rewards, by name."""
        return {
            reward_name(one.config): RemoteScore(one.config.deadline, one.replicas)
            for one in self.training
        }

    def take_seconds(self) -> float:
        """See ``rl.contracts.Scorer``."""
        with self._counting:
            seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _submit(self, served: _Served, chunk: Sequence[Sampled], stop: Future[None]) -> _Call:
        prompts, columns = chunk_columns(chunk)
        replica = served.next()
        media = [sample.media for sample in chunk]
        answer = served.replicas[replica].score.remote(prompts, columns, *media)
        answer.future().add_done_callback(partial(self._scored, served.track(replica)))
        return _Call(served, replica, answer, stop)

    def _scored(self, track: str, answer: Future[tuple[Scores, float]]) -> None:
        """When an answer arrives; it may be taken later."""
        if answer.exception() is None:
            seconds = answer.result()[1]
            with self._counting:
                self.seconds += seconds
            if self.timeline is not None:
                self.timeline.span(track, "score", time.time() - seconds, seconds)

    def _answer(self, call: _Call, repeat: Callable[[], _Call]) -> Any:
        """What an actor answers; one that hangs is replaced, and the call repeated.

        Raises:
            Cancelled: see ``cancel``. GetTimeoutError: no answer in time, every time. LOST: see
                ``cluster.ray_cluster``.
        """
        config = call.served.config
        for attempt in range(config.retries + 1):
            answered = wait(
                [call.answer.future(), call.stop], config.deadline, FIRST_COMPLETED
            ).done
            if call.stop in answered:
                raise Cancelled("nobody waits for the scores any more")
            try:
                return ray.get(call.answer, timeout=config.deadline if answered else 0)
            except TIMEOUT:
                track = call.served.track(call.replica)
                logger.warning("%s: attempt %d: no answer in time", track, attempt + 1)
                replica = call.served.replicas[call.replica]
                keep_stacks({track: replica}, self.log_dir)
                end_processes([replica])
                ray.kill(replica, no_restart=False)
                if attempt == config.retries:
                    raise
            call = repeat()
        raise AssertionError("there is a first attempt")

    def _receive(self, call: _Call, chunk: Sequence[Sampled]) -> Scores:
        """Scores of a chunk.

        Raises:
            ObjectLostError: the samples are gone, with the node that held them.
        """
        config = call.served.config
        reason: Literal["deadline", "worker_died"] = "deadline"
        try:
            return self._answer(call, lambda: self._submit(call.served, chunk, call.stop))[0]
        except ObjectLostError:
            raise
        except TIMEOUT:
            reason = "deadline"
        except LOST:
            reason = "worker_died"  # Ray has repeated the call already
        if sum(sample.group.size for sample in chunk) == 1:
            return _failed(config, chunk[0], reason)
        logger.warning("reward %s: a chunk fails (%s); taken apart", reward_name(config), reason)
        parts: list[Scores] = []
        for one in _singles(chunk):  # one after the other: a poisoned one takes no other with it
            again = self._submit(call.served, [one], call.stop)
            parts.append(self._receive(again, [one]))
        return _joined(parts)


class RemoteScore:
    """A reward actor as a function, for guidance that asks it while a sample is on its way.

    Ray repeats a call that lost its process; what fails then, or comes too late, fails the job, which
    the rollout pool runs again.
    """

    def __init__(self, deadline: float, replicas: Sequence[Any]) -> None:
        self.deadline, self.replicas, self.calls = deadline, list(replicas), 0

    def __call__(
        self, prompts: list[str], completions: list[Any], columns: Mapping[str, list[Any]]
    ) -> Scores:
        """See ``rl.tilt.Score``.

        Raises:
            OSError: no answer within the deadline, or the actor is lost.
        """
        self.calls += 1
        replica = self.replicas[self.calls % len(self.replicas)]
        answer = replica.score.remote(prompts, dict(columns), completions)
        try:
            scores, _ = ray.get(answer, timeout=self.deadline)
        except LOST as error:
            raise ConnectionError(f"a reward actor was lost: {error}") from error
        return scores


def _actor(config: RewardConfig, name: str, log: str) -> Any:
    """A replica.

    Raises:
        RewardFailed: the reward's environment is missing.
    """
    threads = max(int(config.cpus), 1)
    kind: Any = RewardWorker
    arguments: tuple[Any, ...] = (config, threads, log)
    runtime: dict[str, Any] | None = None
    if config.served_in is not None:
        kind = EnvironmentServer
        arguments = (*crossing(config), log)
        runtime = {
            # Ray hands it to a shell.
            "py_executable": shlex.quote(str(interpreter(config))),
            "env_vars": process_variables(config, threads),
        }
    elif not config.gpus:
        # Ray leaves all GPUs visible to an actor that asked for none.
        runtime = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    actor: Any = ray.remote(kind)
    options: Any = actor.options(
        num_cpus=config.cpus,
        num_gpus=config.gpus,
        name=name,
        max_restarts=-1,
        max_task_retries=config.retries,
        # One at a time, and none waits behind another whose samples are late or not wanted any more.
        allow_out_of_order_execution=True,
        runtime_env=runtime,
    )
    return options.remote(*arguments)


def _failed(
    config: RewardConfig, sample: Sampled, reason: Literal["deadline", "worker_died"]
) -> Scores:
    name, prompt = reward_name(config), sample.group.prompt
    messages = {
        "deadline": f"no answer within {config.deadline:g} s",
        "worker_died": "its process died every time it was given this sample",
    }
    failure = Failure(name, prompt, 0, reason, messages[reason])
    return Scores(np.full(1, np.nan), (failure,), 0)


def _singles(chunk: Sequence[Sampled]) -> list[Sampled]:
    """Each sample of a chunk as a group of one, its media cut out here (the rare path).

    Raises:
        RewardFailed: its node is up, and does not send it. ObjectLostError: it is gone.
    """
    singles: list[Sampled] = []
    for sample in chunk:
        media = sample.media
        if isinstance(media, ray.ObjectRef):
            try:
                media = ray.get(media, timeout=FETCH_SECONDS)
            except TIMEOUT as error:
                raise RewardFailed(
                    f"samples of step {sample.group.step} did not arrive from the rollout actor that "
                    f"made them within {FETCH_SECONDS:g} s: is a node of the cluster cut off?"
                ) from error
        for index in range(sample.group.size):
            group = replace(sample.group, size=1)
            singles.append(replace(sample, group=group, media=media[index : index + 1]))
    return singles


def _joined(parts: Sequence[Scores]) -> Scores:
    failures = [
        replace(failure, index=index)
        for index, part in enumerate(parts)
        for failure in part.failures
    ]
    values = np.concatenate([part.values for part in parts])
    return Scores(values, tuple(failures), sum(part.not_scored for part in parts))
