"""Metrics: a file that always exists, and the trackers a recipe names."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.atomic import replace_text

logger = logging.getLogger(__name__)

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "prometheus": "prometheus_client",
}
INSTALL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install 'rectify[wandb]'",
    "mlflow": "pip install 'rectify[mlflow]'",
    "prometheus": "pip install 'ray[default]'",
}


class MetricsFile:
    """``metrics.jsonl``: a JSON object a line; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: strict(v) for k, v in row.items()}, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Make all lines durable."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last one (a crash) is left out."""
        return _rows(self.path.read_bytes()) if self.path.exists() else []

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations; of the many others none is in memory."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            return _rows(b"".join(line for line in file if b'"kind": "evaluation"' in line))

    def tail(self, size: int) -> list[dict[str, Any]]:
        """The last whole lines, as many as lie in so many bytes."""
        return _rows(last_bytes(self.path, size)) if self.path.exists() else []

    def truncate(self, step: int) -> None:
        """Drop what came after ``step``, atomically."""
        if not self.path.exists():
            return
        kept = [row for row in self.read() if row["step"] <= step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of a step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class TensorBoardTracker:
    """Event files under the run directory."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See ``Tracker``."""
        self.writer.close()


class WandbTracker:
    """Weights & Biases; the run's own name as id, so that a resume continues it."""

    def __init__(self, run: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(project="rectify", name=run.name, id=run.name, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See ``Tracker``."""
        self.run.finish()


class MLflowTracker:
    """MLflow at MLFLOW_TRACKING_URI (default: ./mlruns); a resume continues the run of this name."""

    def __init__(self, run: Path) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self.mlflow = mlflow
        mlflow.set_experiment("rectify")
        known = run / "mlflow_run_id"
        if known.exists():
            mlflow.start_run(run_id=known.read_text().strip())
        else:
            known.write_text(mlflow.start_run(run_name=run.name).info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        self.mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """See ``Tracker``."""
        self.mlflow.end_run()


def _prometheus(run: Path) -> Tracker:
    from cluster.prometheus import PrometheusTracker

    return PrometheusTracker(run)


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
    "prometheus": _prometheus,
}


def open_trackers(kinds: Sequence[str], run: Path) -> list[Tracker]:
    """The trackers of a recipe."""
    return [TRACKERS[kind](run) for kind in kinds]


def missing(kind: str) -> str | None:
    """How to install a tracker that is not there."""
    return None if importlib.util.find_spec(PACKAGES[kind]) else INSTALL[kind]


def last_bytes(path: Path, size: int) -> bytes:
    """The end of a file from the beginning of a line on; all of a small one."""
    with path.open("rb") as file:
        whole = file.seek(0, os.SEEK_END)
        file.seek(max(whole - size, 0))
        data = file.read()
    return data if whole <= size else data.partition(b"\n")[2]


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in data.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
            rows.append(row)
    return rows


def strict(value: Any) -> Any:
    """JSON's null in place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
