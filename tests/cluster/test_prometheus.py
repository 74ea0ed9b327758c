"""Ray's own endpoint serves what metrics.jsonl has."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from cluster.launch import run_locally
from cluster.progress import Progress
from cluster.prometheus import PrometheusTracker, exported
from cluster.ray_cluster import connected
from cluster.run import RunDirectory

LINE = re.compile(r"^ray_(rectify_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def test_names_are_flat_and_a_reward_is_a_label():
    assert exported("time/step") == ("rectify_time_step", {})
    assert exported("reward/ink-2/mean") == ("rectify_reward_mean", {"reward": "ink-2"})
    assert exported("evaluation/a/recall/two dogs") == (
        "rectify_evaluation_recall_two_dogs",
        {"reward": "a"},
    )
    assert exported("timestep/0/ratio_mean") == ("rectify_timestep_0_ratio_mean", {})


def scraped(address: str) -> dict[tuple[str, str | None, str | None], float]:
    """Values by name, run and reward."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', line[2])) for line in LINE.finditer(text)]
    return {
        (line[1], each.get("run"), each.get("reward")): float(line[3])
        for line, each in zip(LINE.finditer(text), labels, strict=True)
    }


@pytest.mark.slow
def test_every_number_of_the_last_step_is_at_ray_s_metrics_endpoint(digits_recipe, tmp_path: Path):
    recipe = digits_recipe(f"run_dir={tmp_path}", "workers.count=1", "learner.ranks=1")
    trained = run_locally(recipe, tmp_path / "first", Console(quiet=True))
    train = [row for row in trained.metrics.read() if row["kind"] == "train"]
    assert [row["rollout/samples"] for row in train] == [16, 16]

    path = tmp_path / "exported"
    path.mkdir()
    tracker = PrometheusTracker(path)
    with connected(recipe), Progress(2, 0, Console(quiet=True)) as progress:
        directory = RunDirectory(recipe, path, [tracker], progress, lambda value: value)
        for row in train:
            numbers = {k: v for k, v in row.items() if k not in ("kind", "step", "time")}
            directory.log(row["step"], {k: v for k, v in numbers.items() if "cost/" not in k})
        (where,) = json.loads((path / "prometheus.json").read_text())
        address = f"http://{where['targets'][0]}/metrics"
        deadline = time.monotonic() + 60
        while scraped(address).get(("rectify_step", "exported", None)) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        found = scraped(address)
        directory.close()
    last = directory.metrics.read()[-1]
    assert last["step"] == 2
    wanted = {k: v for k, v in last.items() if k not in ("kind", "step", "time")}
    assert len(wanted) > 30
    for metric, value in wanted.items():
        name, tags = exported(metric)
        assert found[name, "exported", tags.get("reward")] == pytest.approx(value), metric
    assert found["rectify_samples_total", "exported", None] == 32
    assert not (path / "prometheus.json").exists()
