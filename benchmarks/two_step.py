"""Two-step students of the digit models: ours, its ablations, DMD2, LADD and regression.

    python benchmarks/two_step.py [--seeds 3] [--processes 1] [--tasks ...] [--variants ...] [--rates ...]

Every variant starts from the same teacher, sees the same teacher samples, is warmed up by the same
paired regression, and takes the same number of student steps (one says that it takes twice as many). The
learning rate of each is the best of a grid on a seed of its own, by Fréchet distance. Measured with
averaged weights on the same draws: Fréchet distance to all real digits and accuracy in a classifier that
is never trained against, the lowest recall of a class, diversity, and network evaluations of training
(backward 2). Finished runs are kept in runs/two_step.jsonl. Writes docs/benchmarks/two_step.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

OURS: list[str] = []
NEIGHBOUR = ["distill.parameters=shared", "distill.end_to_end=false"]
VARIANTS: dict[str, list[str]] = {
    "ours": OURS,
    "ours, twice as long": ["steps=200", "distill.warmup_steps=100"],
    "real: data": ["distill.real=data"],
    "LoRA per step": ["distill.parameters=lora_per_step", "policy.lora={rank: 16, alpha: 32}"],
    "shared": ["distill.parameters=shared"],
    "no end-to-end": ["distill.end_to_end=false"],
    "no step-1 loss": ["distill.step1.weight=0"],
    "DMD2": [
        *NEIGHBOUR, "distill.dmd=1", "distill.adversarial=0.003", "distill.regression=0",
        "distill.real=data", "distill.step1.regression=0", "distill.fake_score.learning_rate=3e-4",
    ],
    "LADD": [*NEIGHBOUR, "distill.regression=0", "distill.step1.regression=0"],
    "regression": ["distill.adversarial=0", "distill.regression=1"],
}  # fmt: skip
LEARNING_RATES = (1e-3, 3e-3)
# Student steps, and how many of them are the warm-up.
STEPS, WARM_UP = 100, 50
RECIPES = {"digits": "digits/two_step", "moving": "digits/moving_two_step"}
TUNING_SEED = 100
HELD_OUT = "digit_held_out"
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
RUNS = Path(__file__).parents[1] / "runs" / "two_step.jsonl"


class Recorder:
    """The loop's view of a run directory: keeps a curve in memory."""

    def __init__(self) -> None:
        self.compute = 0.0
        self.curve: list[dict[str, float]] = []
        self.restored: dict[str, Any] = {}
        self.extra: Callable[[], dict[str, Any]] = dict

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.compute += metrics["work/rollout_forwards"] + metrics["work/learner_forwards"]
        self.compute += 2 * metrics["work/backwards"]

    def evaluated(self, step: int, metrics: dict[str, float], scored: Sequence[Any]) -> None:
        kept = {k: v for k, v in metrics.items() if HELD_OUT in k}
        self.curve.append({"step": step, "compute": self.compute, **kept})

    def checkpoint(self, step: int) -> None:
        """Nothing is kept."""

    def interrupted(self) -> bool:
        return False


def one_run(task: str, variant: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one variant on one core; finished runs are kept in RUNS and not repeated."""
    import torch

    torch.set_num_threads(1)
    from cluster.launch import build_distiller
    from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
    from recipes.schema import DistillRecipe
    from recipes.source import load

    overrides = [f"optimizer.learning_rate={rate}", f"seed={seed}", "evaluation.samples=1000"]
    overrides += [f"steps={STEPS}", f"distill.warmup_steps={WARM_UP}", "evaluation.every=50"]
    recipe = load(Path(RECIPES[task]), DistillRecipe, [*overrides, *VARIANTS[variant]]).value
    key = [task, variant, recipe.model_dump_json(exclude={"cluster", "checkpoints", "run_dir"})]
    known = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    if finished := [run for run in known if run["key"] == key]:
        return finished[0]
    recorder = Recorder()
    pool, scorer, learner = LocalRolloutPool(recipe), LocalScorer(recipe), LocalLearner(recipe)
    build_distiller(recipe, recorder, pool, scorer, learner, 0).train()  # type: ignore[arg-type]
    run = {"key": key, "task": task, "variant": variant, "rate": rate, "seed": seed}
    run["curve"] = recorder.curve
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    with RUNS.open("a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def best_rate(
    pair: tuple[str, str], tuning: Sequence[dict[str, Any]], rates: Sequence[float]
) -> float:
    """Of a task and variant, by Fréchet distance; the only one, where there is one."""
    own = [run for run in tuning if (run["task"], run["variant"]) == pair]
    return min(own, key=lambda run: last(run, "frechet"))["rate"] if own else rates[0]


def last(run: dict[str, Any], name: str) -> float:
    """A held-out number of the finished student."""
    return run["curve"][-1][f"evaluation/{HELD_OUT}/{name}"]


def lowest_recall(point: dict[str, float], prefix: str) -> float:
    """Of all classes."""
    return min(v for k, v in point.items() if k.startswith(f"{prefix}/{HELD_OUT}/recall/"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    from rollout.policies.wan import WanConfig

    WanConfig().prepare()
    pairs = [(task, variant) for task in arguments.tasks for variant in arguments.variants]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        grid = [(*pair, rate, TUNING_SEED) for pair in pairs for rate in arguments.rates]
        several = len(arguments.rates) > 1
        tuning = list(pool.map(one_run, *zip(*grid, strict=True))) if several else []
        best = {pair: best_rate(pair, tuning, arguments.rates) for pair in pairs}
        jobs = [(*pair, best[pair], seed) for seed in range(arguments.seeds) for pair in pairs]
        runs = list(pool.map(one_run, *zip(*jobs, strict=True)))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "two_step.json").write_text(json.dumps({"tuning": tuning, "runs": runs}))
    tables = [table(task, [r for r in runs if r["task"] == task]) for task in arguments.tasks]
    (OUT / "two_step.md").write_text("\n".join(tables))
    plot(runs, arguments.tasks)


def table(task: str, runs: Sequence[dict[str, Any]]) -> str:
    """Medians and ranges over seeds as Markdown; teachers first."""
    head = ["", "lr", "sampling NFE", "Fréchet", "accuracy", "lowest recall", "diversity"]
    rows = [f"### {task}", "", "| " + " | ".join([*head, "training evaluations (k)"]) + " |"]
    rows.append("|---" * (len(head) + 1) + "|")
    for name, prefix, steps in (("teacher", "teacher", 8), ("teacher", "teacher_2_steps", 2)):
        rows.append(row(f"{name}, {steps} steps", "", steps, runs, 0, prefix))
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        rows.append(row(variant, f"{own[0]['rate']:g}", 2, own, -1, "evaluation"))
    return "\n".join(rows) + "\n"


def row(
    name: str, rate: str, steps: int, runs: Sequence[dict[str, Any]], place: int, prefix: str
) -> str:
    """One line of the table, from point ``place`` of every run's curve."""
    points = [run["curve"][place] for run in runs]
    columns = [
        [point[f"{prefix}/{HELD_OUT}/{key}"] for point in points] for key in ("frechet", "accuracy")
    ]
    columns.append([lowest_recall(point, prefix) for point in points])
    columns.append([point[f"{prefix}/{HELD_OUT}/diversity"] for point in points])
    cells = [
        f"{statistics.median(values):.3f} ({min(values):.3f}…{max(values):.3f})"
        for values in columns
    ]
    compute = f"{statistics.median(p['compute'] for p in points) / 1000:.0f}" if place else ""
    return "| " + " | ".join([name, rate, str(steps), *cells, compute]) + " |"


def plot(runs: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    """Fréchet distance and accuracy over steps, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    place = 0
    for task in tasks:
        for name in ("frechet", "accuracy"):
            place += 1
            axes = figure.add_subplot(len(tasks), 2, place)
            for number, variant in enumerate(variants):
                own = [r["curve"] for r in runs if (r["task"], r["variant"]) == (task, variant)]
                for i, curve in enumerate(own):
                    axes.plot(
                        [point["step"] for point in curve[1:]],
                        [point[f"evaluation/{HELD_OUT}/{name}"] for point in curve[1:]],
                        color=f"C{number}", linewidth=1.2, label=variant if i == 0 else None,
                    )  # fmt: skip
            start = next(r for r in runs if r["task"] == task)["curve"][0]
            axes.axhline(start[f"teacher/{HELD_OUT}/{name}"], color="black", linestyle=":")
            axes.set(title=f"{task}: {name} (dotted: teacher, 8 steps)", xlabel="student steps")
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(OUT / "two_step.png", dpi=120)


if __name__ == "__main__":
    main()
