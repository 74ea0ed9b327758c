"""A run's numbers among Ray's own metrics, where Prometheus and Ray's dashboard find them.

``reward/NAME/mean`` is the gauge ``ray_rectify_reward_mean{run=..., reward=NAME}``, ``time/step`` the
gauge ``ray_rectify_time_step{run=...}``. Ray's agent on the driver's node exports them, also where no
dashboard runs; ``prometheus.json`` in the run directory says where, as Prometheus's file_sd_configs
reads it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)

TARGETS = "prometheus.json"
# Of these the second part names a reward.
BY_REWARD = ("reward", "evaluation", "teacher")
# Metrics that say what a step added, and the counters they add up to.
COUNTED = {
    "rollout/samples": "samples",
    "rollout/dropped_groups": "dropped_groups",
    "rollout/restarts": "restarts",
}


class PrometheusTracker:
    """See ``tracking.Tracker``; Ray has to run at the first ``log``."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.gauges: dict[str, Gauge] = {}
        self.counters: dict[str, Counter] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``tracking.Tracker``."""
        if not self.gauges:
            self._say_where()
        for name, value in metrics.items():
            self._set(name, value)
            if value > 0 and name in COUNTED:
                self._count(COUNTED[name], value)
        # Last, so that whoever sees it has seen the rest.
        self._set("step", step)

    def close(self) -> None:
        """Take the address back: Ray ends with the run, or answers for others."""
        (self.run / TARGETS).unlink(missing_ok=True)

    def _set(self, metric: str, value: float) -> None:
        name, tags = exported(metric)
        tags["run"] = self.run.name
        if name not in self.gauges:
            self.gauges[name] = Gauge(name, f"{metric} of the last step", tuple(tags))
        self.gauges[name].set(value, tags)

    def _count(self, name: str, value: float) -> None:
        if name not in self.counters:
            self.counters[name] = Counter(f"rectify_{name}", f"{name} so far", ("run",))
        self.counters[name].inc(value, {"run": self.run.name})

    def _say_where(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        text = json.dumps([{"targets": [target], "labels": {"job": "ray"}}])
        (self.run / TARGETS).write_text(text)
        logger.info("Prometheus metrics at http://%s/metrics", target)


def exported(metric: str) -> tuple[str, dict[str, str]]:
    """A metric's name at Prometheus, less Ray's prefix, and the reward it is of."""
    parts = metric.split("/")
    tags: dict[str, str] = {}
    if len(parts) > 2 and parts[0] in BY_REWARD:
        tags["reward"] = parts.pop(1)
    return "rectify_" + re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(parts)), tags
