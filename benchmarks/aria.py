"""Uniform draws, RC and ARIA: a smaller student under imbalance, with classes of which it has no picture.

    python benchmarks/aria.py [--seeds 3] [--processes 1]

A two-layer student of the four-layer digit model (digits/aria). Pictures and the pool of conditions
fall off geometrically from digit 0 to 9, and of two digits there is no picture at all. Every variant
takes the same number of updates; the learning rate of each is the best of a grid on a seed of its own, by
mean discrepancy. Discrepancy is mean |v_student - v_teacher|^2 on the teacher's own samples of each digit,
at keyed noise; accuracy is that of a classifier that is never trained against. Regions: the frequent
half of the pictured digits, the rare half, the unseen. Writes docs/benchmarks/aria.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

VARIANTS: dict[str, list[str]] = {
    "pairs only": ["distill.conditioning=null", "distill.regions=null"],
    "uniform": ["distill.regions={kind: label, epsilon: 1.0}"],
    "RC": ["distill.regions=null"],
    "ARIA": [],
}
LEARNING_RATES = (2e-3, 4e-3)
REGIONS = {"frequent": (0, 1, 2, 3), "rare": (4, 5, 6, 7), "unseen": (8, 9)}
TUNING_SEED = 100
MEASURED = 64  # teacher samples of a digit
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
RUNS = Path(__file__).parents[1] / "runs" / "aria.jsonl"


class Recorder:
    """The loop's view of a run directory: keeps the last evaluation."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}
        self.extra: Any = dict
        self.last: dict[str, float] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing is kept."""

    def evaluated(self, step: int, metrics: dict[str, float], scored: Sequence[Any]) -> None:
        self.last = metrics

    def checkpoint(self, step: int) -> None:
        """Nothing is kept."""

    def interrupted(self) -> bool:
        return False


def one_run(variant: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one variant on one core; finished runs are kept in RUNS and not repeated."""
    import torch

    torch.set_num_threads(1)
    from cluster.launch import build_distiller
    from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
    from recipes.schema import DistillRecipe
    from recipes.source import load

    overrides = [f"optimizer.learning_rate={rate}", f"seed={seed}"]
    overrides += ["evaluation.samples=1000", "evaluation.every=1000"]
    recipe = load(Path("digits/aria"), DistillRecipe, [*overrides, *VARIANTS[variant]]).value
    key = [variant, recipe.model_dump_json(exclude={"cluster", "checkpoints", "run_dir"})]
    known = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    if finished := [run for run in known if run["key"] == key]:
        return finished[0]
    recorder = Recorder()
    pool, scorer, learner = LocalRolloutPool(recipe), LocalScorer(recipe), LocalLearner(recipe)
    build_distiller(recipe, recorder, pool, scorer, learner, 0).train()  # type: ignore[arg-type]
    accuracy = {
        k.rsplit("/", 1)[1]: v
        for k, v in recorder.last.items()
        if k.startswith("evaluation/digit_held_out/recall/")
    }
    run = {"key": key, "variant": variant, "rate": rate, "seed": seed, "accuracy": accuracy}
    run["frechet"] = recorder.last["evaluation/digit_held_out/frechet"]
    run["discrepancy"] = discrepancies(recipe, pool.worker)
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    with RUNS.open("a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def discrepancies(recipe: Any, worker: Any) -> dict[str, float]:
    """Of each digit, with the weights that the worker evaluated last (the averaged ones)."""
    import torch

    from distill.catalogue import build_teacher, teacher_plan
    from distill.noise import gaussians
    from distill.two_step import mean_square, renoised_at
    from rollout.draws import groups_for

    teacher, student = build_teacher(recipe.policy, "cpu"), worker.policy
    found: dict[str, float] = {}
    for prompt in recipe.prompts.load():
        groups = groups_for([prompt], seed=7, step=0, count=1, size=MEASURED)
        replay = worker.sampler.sample(groups, [teacher_plan()])[0].replay
        x0, seeds = torch.from_numpy(replay.final), replay.seeds.tolist()
        noise = gaussians(seeds, x0.shape[1:], "measured")
        t = (torch.arange(MEASURED) + 0.5) / MEASURED
        condition = teacher.encode([prompt.text]).expand(MEASURED, -1, -1)
        x = renoised_at(x0, t, noise)
        with torch.no_grad():
            gap = student.velocity(x, t, condition) - teacher.velocity(x, t, condition)
        found[prompt.id] = float(mean_square(gap).mean())
    return found


def overall(run: dict[str, Any]) -> float:
    """Mean discrepancy over digits."""
    return statistics.mean(run["discrepancy"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    from rollout.policies.wan import WanConfig

    WanConfig().prepare()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        grid = [(variant, rate, TUNING_SEED) for variant in VARIANTS for rate in LEARNING_RATES]
        tuning = list(pool.map(one_run, *zip(*grid, strict=True)))
        best = {
            variant: min((r for r in tuning if r["variant"] == variant), key=overall)["rate"]
            for variant in VARIANTS
        }
        jobs = [(v, best[v], seed) for seed in range(arguments.seeds) for v in VARIANTS]
        runs = list(pool.map(one_run, *zip(*jobs, strict=True)))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "aria.json").write_text(json.dumps({"tuning": tuning, "runs": runs}))
    (OUT / "aria.md").write_text(table(runs))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians and ranges over seeds as Markdown."""
    head = [f"{kind}, {name}" for kind in ("discrepancy", "accuracy") for name in REGIONS]
    rows = ["| | lr | " + " | ".join([*head, "Fréchet"]) + " |", "|---" * (len(head) + 3) + "|"]
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        columns = [
            [statistics.mean(run[kind][str(d)] for d in digits) for run in own]
            for kind in ("discrepancy", "accuracy")
            for digits in REGIONS.values()
        ]
        columns.append([run["frechet"] for run in own])
        cells = [
            f"{statistics.median(values):.3f} ({min(values):.3f}…{max(values):.3f})"
            for values in columns
        ]
        rows.append("| " + " | ".join([variant, f"{own[0]['rate']:g}", *cells]) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
