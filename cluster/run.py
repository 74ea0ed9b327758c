"""A run directory: what was asked, what came out, and all that is needed to go on."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import yaml

from cluster import checkpoints
from cluster.atomic import replace_text
from cluster.checkpoints import Checkpoint
from cluster.copies import Copies
from cluster.disk import check_room, writing
from cluster.media import write_evaluated
from cluster.monitors import learns_from_itself, recursion_metrics, warnings
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.timeline import attempt_timeline
from cluster.tracking import MetricsFile, Tracker
from recipes.schema import AnyRecipe
from rl.contracts import Metrics, Scored
from rollout.draws import Prompt

logger = logging.getLogger(__name__)

SHOWN_SAMPLES = 40
PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "rectify")


class RunDirectory:
    """Implements ``rl.contracts.Run`` on disk.

    Attributes:
        path: the run directory. ``attempt``: how many processes have worked on it.
        costs: totals since step 0, kept in every checkpoint.
        timeline: what the actors did, written with each step's metrics.
        extra: what else a checkpoint keeps of the loop; ``restored``: what it kept.
        copies: to the recipe's storage, where it has one.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        path: Path,
        trackers: Sequence[Tracker],
        progress: Progress,
        fetch: Callable[[Any], Any],
    ) -> None:
        self.recipe, self.path = recipe, path
        self.trackers, self.progress, self.fetch = trackers, progress, fetch
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.timeline = attempt_timeline(path)
        self.costs: Metrics = {}
        self.best: tuple[float, int] | None = None
        self.save: Callable[[Path], None] | None = None
        self.last_saved = -1
        self.extra: Callable[[], dict[str, Any]] = dict
        self.restored: dict[str, Any] = {}
        url, keep_last = recipe.checkpoints.storage, recipe.checkpoints.keep_last
        self.copies = Copies(Storage(url), path, keep_last, progress.message) if url else None
        self._stop = False

    def resume_from(self, checkpoint: Checkpoint | None) -> None:
        """Forget what came after ``checkpoint`` (all, when there is none)."""
        state = checkpoint.state if checkpoint else {}
        with writing(self.metrics.path, self.path):
            self.metrics.truncate(checkpoint.step if checkpoint else -1)
        self.costs = dict(state.get("costs", {}))
        self.restored = dict(state.get("extra", {}))
        self.best = tuple(state["best"]) if state.get("best") else None
        self.last_saved = checkpoint.step if checkpoint else -1
        if self.copies is not None and checkpoint is not None:
            self.copies.copy(checkpoint.step, self.best[1] if self.best else None, known=True)

    def log(self, step: int, metrics: Metrics) -> None:
        """See ``rl.contracts.Run``."""
        metrics = metrics | self._idle(metrics)
        metrics.setdefault("rollout/samples", self._samples(metrics))
        self._add_costs(metrics)
        metrics |= {f"cost/{name}": total for name, total in self.costs.items()}
        self._write("train", step, metrics)
        self._trace(step, metrics)
        self.progress.step(step, metrics)

    def evaluated(self, step: int, metrics: Metrics, scored: Sequence[Scored]) -> None:
        """See ``rl.contracts.Run``."""
        directory = self.path / "evaluation"
        with writing(directory, self.path):
            directory.mkdir(exist_ok=True)
        if learns_from_itself(self.recipe):
            media = [self.fetch(group.sample.media) for group in scored]
            metrics |= recursion_metrics(self.path / "evaluation", media)
        seconds = metrics["time/evaluate"]
        self.timeline.span("driver", "evaluate", time.time() - seconds, seconds, step=step)
        self._add_costs(metrics)
        self._write("evaluation", step, metrics)
        document = {
            "step": step,
            "metrics": metrics,
            "samples": [
                {
                    "prompt_id": group.sample.group.prompt_id,
                    "prompt": group.sample.group.prompt,
                    "seed": group.sample.group.seed,
                    "scores": {
                        name: [_finite(v) for v in scores.values]
                        for name, scores in group.scores.items()
                    },
                }
                for group in scored
            ],
        }
        target = directory / f"step_{step:06d}.json"
        with writing(target, self.path):
            replace_text(target, json.dumps(document))
        samples = self.path / "samples" / f"step_{step:06d}"
        with writing(samples, self.path):
            self._write_samples(samples, scored[:SHOWN_SAMPLES])
        self._warn()
        self._note_best(step, metrics)
        self.progress.evaluation(step, metrics)

    def checkpoint(self, step: int) -> None:
        """See ``rl.contracts.Run``."""
        if step == self.last_saved:
            return
        assert self.save is not None
        started = time.perf_counter()
        root = self.path / "checkpoints"
        state = {"costs": self.costs, "best": self.best, "extra": self.extra()}
        check_room(root, self.path)
        with writing(root / checkpoints.name_of(step), self.path):
            checkpoints.write(root, step, self.save, state)
        best = self.best[1] if self.best else None
        spared = self.copies.in_use() if self.copies is not None else set[int]()
        spared |= set() if best is None else {best}
        checkpoints.prune(root, step, self.recipe.checkpoints.keep_last, spared)
        self.last_saved = step
        with writing(self.metrics.path, self.path):
            self.metrics.sync()
        if self.copies is not None:
            self.copies.copy(step, best)
        seconds = time.perf_counter() - started
        self.timeline.span("driver", "checkpoint", time.time() - seconds, seconds, step=step)
        logger.info("checkpoint of step %d in %.2f s", step, seconds)

    def interrupted(self) -> bool:
        """See ``rl.contracts.Run``."""
        return self._stop

    def stop_on_signals(self) -> None:
        """The first SIGINT or SIGTERM ends the run after its step, a second one at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.progress.message("stopping after this step; once more to stop at once")

        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)

    def warn(self, message: str) -> None:
        """One line for the user and the log."""
        logger.warning(message)
        self.progress.message(message)

    def close(self) -> None:
        """End the timeline and the trackers; wait for the last copy."""
        try:
            self.timeline.close()
            for tracker in self.trackers:
                tracker.close()
        finally:
            if self.copies is not None:
                self.copies.finish(self.recipe.cluster.job_timeout)

    def _write_samples(self, directory: Path, scored: Sequence[Scored]) -> None:
        """A grid of media, or a JSON line for each text."""
        directory.mkdir(parents=True, exist_ok=True)
        media = [self.fetch(group.sample.media) for group in scored]
        if isinstance(media[0], np.ndarray):
            prompts = [group.sample.group.prompt for group in scored]
            write_evaluated(directory, np.concatenate(media), prompts)
            return
        lines = [
            json.dumps(
                {
                    "prompt": group.sample.group.prompt,
                    "completion": text,
                    "scores": {n: _finite(s.values[i]) for n, s in group.scores.items()},
                }
            )
            for group, texts in zip(scored, media, strict=True)
            for i, text in enumerate(texts)
        ]
        (directory / "completions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _warn(self) -> None:
        for message in warnings(self.metrics.evaluations(), self.recipe.checkpoints.keep_best):
            self.warn(message)

    def _write(self, kind: str, step: int, metrics: Metrics) -> None:
        with writing(self.metrics.path, self.path):
            self.metrics.append({"kind": kind, "step": step, "time": time.time(), **metrics})
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def _trace(self, step: int, metrics: Metrics) -> None:
        """The driver's own part of a step that ends now, in the order of the loop."""
        end = time.time()
        at = end - metrics["time/step"]
        for name in ("wait", "learn"):
            seconds = metrics.get(f"time/{name}", 0.0)
            self.timeline.span("driver", name, at, seconds, step=step)
            at += seconds
        sync = metrics.get("time/sync", 0.0)
        self.timeline.span("driver", "sync", end - sync, sync, step=step)
        self.timeline.flush()

    def _samples(self, metrics: Metrics) -> float:
        """Of the step, less those of dropped groups."""
        rollout = self.recipe.rollout
        groups = rollout.prompts_per_step - metrics.get("rollout/dropped_groups", 0.0)
        return groups * rollout.group_size

    def _idle(self, metrics: Metrics) -> Metrics:
        """Share of the step in which an actor of a kind had nothing to do."""
        actors = {
            "rollout": self.recipe.workers.count,
            "learner": self.recipe.learner.ranks,
            "reward": sum(config.replicas for config in self.recipe.rewards),
        }
        wall = metrics["time/step"]
        return {
            f"idle/{kind}": max(0.0, 1 - metrics.get(f"busy/{kind}", 0.0) / (wall * count))
            for kind, count in actors.items()
            if count
        }

    def _add_costs(self, metrics: Metrics) -> None:
        """Totals from the increments of a step or an evaluation."""
        workers, learner = self.recipe.workers, self.recipe.learner
        seconds = metrics.get("time/step", 0.0)
        gpus = workers.count * workers.gpus + learner.ranks * learner.gpus
        increments = {
            "nfe": metrics.pop("work/rollout_forwards", 0.0),
            "learner_forwards": metrics.pop("work/learner_forwards", 0.0),
            "backwards": metrics.pop("work/backwards", 0.0),
            "evaluation_nfe": metrics.pop("work/evaluation_forwards", 0.0),
            "seconds": seconds,
            "actor_seconds": sum(metrics.get(f"busy/{k}", 0.0) for k in ("rollout", "learner")),
            "gpu_seconds": seconds * gpus,
        }
        for name, value in increments.items():
            self.costs[name] = self.costs.get(name, 0.0) + value
        self.costs["forwards"] = self.costs["nfe"] + self.costs["learner_forwards"]

    def _note_best(self, step: int, metrics: Metrics) -> None:
        wanted = self.recipe.checkpoints.keep_best
        if wanted is not None and wanted in metrics:
            value = metrics[wanted]
            if np.isfinite(value) and (self.best is None or value > self.best[0]):
                self.best = (value, step)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def new_directory(recipe: AnyRecipe, taken: Collection[str] = ()) -> Path:
    """A directory of its own for a new run: ``name``, or ``name-2`` ... where that is taken."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        path = recipe.run_dir / f"{recipe.name}{suffix}"
        try:
            if path.name in taken:
                raise FileExistsError
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def describe(path: Path, recipe: AnyRecipe, prompts: Sequence[Prompt]) -> None:
    """Write what the run is: resolved recipe, data digest, versions."""
    document = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    replace_text(path / "recipe.yaml", document)
    (path / "data.sha256").write_text(data_digest(prompts) + "\n")
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        versions[name] = metadata.version(name)
    (path / "versions.json").write_text(json.dumps(versions, indent=1))


def data_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the prompts with their ids and columns."""
    rows = [[p.id, p.text, p.columns] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
