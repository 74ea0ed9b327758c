"""SPG, FPO, and what DiPOD's term changes, on Sudoku and Countdown from one base at equal compute.

    python benchmarks/dipod_sudoku.py [--seeds 3] [--processes 2] [--tasks sudoku countdown]

Six variants a task: SPG, SPG with DiPOD (joint, alternating), the control without a baseline (which
on-policy the joint term equals but for a shift), FPO, FPO with DiPOD. All are full-parameter runs from
the embedded base with the packaged recipes, forward passes in bfloat16. The learning rate of every
variant is the best of a grid on a seed of its own, by the mean held-out score over the run. Compute
counts network evaluations: rollout and learner forwards 1 (a cached one too), backwards 2; every run
ends at the same compute. Held-out prompts are the validation split, decoded at temperature 0 without
a cache, with averaged weights; the test split is read once, by the last weights. Writes
docs/benchmarks/dipod_sudoku.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

VARIANTS = {
    "SPG": "spg",
    "SPG + DiPOD, joint": "spg_dipod",
    "SPG + DiPOD, alternating": "spg_dipod_alternating",
    "no baseline": "no_baseline",
    "FPO": "fpo",
    "FPO + DiPOD": "fpo_dipod",
}
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
# Network evaluations: about 35 steps of SPG on Sudoku (64 completions of 24 steps, and 2 passes of 2
# masks with a backward) and 52 on Countdown (12 steps).
BUDGET = 80_000
TUNING_BUDGET = 34_000
EVALUATE_EVERY = 12
SCORE = {"sudoku": "sudoku/cell_accuracy", "countdown": "countdown/solved_rate"}
SOLVED = {"sudoku": "sudoku/solved_rate", "countdown": "countdown/solved_rate"}
TUNING_SEED = 100
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
RUNS = Path(__file__).parents[1] / "runs" / "dipod_sudoku.jsonl"


@dataclass
class Recorder:
    """The loop's view of a run directory: keeps a curve in memory."""

    budget: float
    compute: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.compute += metrics["work/rollout_forwards"]
        self.compute += metrics.get("work/learner_forwards", 0) + 2 * metrics.get(
            "work/backwards", 0
        )

    def evaluated(self, step: int, metrics: dict[str, float], scored: Sequence[Any]) -> None:
        kept = {k: v for k, v in metrics.items() if k.startswith(("evaluation/", "gap/"))}
        self.curve.append({"step": step, "compute": self.compute, **kept})

    def checkpoint(self, step: int) -> None:
        """Nothing is kept."""

    def interrupted(self) -> bool:
        return self.compute >= self.budget


def one_run(task: str, variant: str, rate: float, seed: int, budget: float) -> dict[str, Any]:
    """Train one variant on one core; finished runs are kept in RUNS and not repeated."""
    key = [task, variant, rate, seed, budget]
    known = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    if finished := [run for run in known if run["key"] == key]:
        return finished[0]
    import torch

    torch.set_num_threads(1)
    from cluster.launch import build_trainer
    from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer
    from recipes.schema import Recipe
    from recipes.source import load

    overrides = [f"optimizer.learning_rate={rate}", f"seed={seed}", "steps=100000"]
    overrides += [f"evaluation.every={EVALUATE_EVERY}", "evaluation.samples=96"]
    overrides += ["evaluation.gap={samples: 6, orders: 4}", "policy.dtype=bfloat16"]
    overrides += ["learner.ranks=1", "learner.micro_batch=128", "rollout.batch_size=64"]
    recipe = load(Path(f"{task}/{VARIANTS[variant]}"), Recipe, overrides).value
    recorder = Recorder(budget)
    pool, scorer, learner = LocalRolloutPool(recipe), LocalScorer(recipe), LocalLearner(recipe)
    trainer = build_trainer(recipe, recorder, pool, scorer, learner, 0)  # type: ignore[arg-type]
    trainer.train()
    trainer._evaluate()
    run = {"key": key, "task": task, "variant": variant, "rate": rate, "seed": seed}
    run["curve"] = recorder.curve
    run["test"] = test_scores(recipe, trainer)
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    with RUNS.open("a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def test_scores(recipe: Any, trainer: Any) -> dict[str, float]:
    """The last averaged weights on the test split."""
    from dataclasses import replace

    prompts = recipe.evaluation.prompts.model_copy(update={"split": "test"})
    final = replace(trainer.evaluation, prompts=prompts.load(), gap_samples=0)
    metrics, _ = final.run(trainer.learner, trainer.pool, trainer.scorer, trainer.step)
    return {k: v for k, v in metrics.items() if k.startswith("evaluation/")}


def mean_score(run: dict[str, Any]) -> float:
    """The mean held-out score over a run after its start: fast and lasting is better."""
    return statistics.mean(p[f"evaluation/{SCORE[run['task']]}"] for p in run["curve"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=list(SCORE), choices=list(SCORE))
    arguments = parser.parse_args()
    from rollout.policies.llada.pretraining import ensure_base

    for task in arguments.tasks:
        ensure_base(task)
    pairs = [(task, variant) for task in arguments.tasks for variant in VARIANTS]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        grid = [(*p, rate, TUNING_SEED, TUNING_BUDGET) for p in pairs for rate in LEARNING_RATES]
        tuning = list(pool.map(one_run, *zip(*grid, strict=True)))
        chosen = {
            pair: max((r for r in tuning if (r["task"], r["variant"]) == pair), key=mean_score)[
                "rate"
            ]
            for pair in pairs
        }
        jobs = [(*p, chosen[p], seed, BUDGET) for seed in range(arguments.seeds) for p in pairs]
        runs = list(pool.map(one_run, *zip(*jobs, strict=True)))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "dipod_sudoku.json").write_text(json.dumps({"tuning": tuning, "runs": runs}))
    tables = [write_table(task, [r for r in runs if r["task"] == task]) for task in arguments.tasks]
    (OUT / "dipod_sudoku.md").write_text("\n".join(tables))
    write_plot(runs, arguments.tasks)


def write_table(task: str, runs: Sequence[dict[str, Any]]) -> str:
    """Medians and ranges over seeds as Markdown."""
    columns = {
        "solved, start": lambda r: r["curve"][0][f"evaluation/{SOLVED[task]}"],
        "solved, end": lambda r: r["curve"][-1][f"evaluation/{SOLVED[task]}"],
        "solved, lowest after step 1": lambda r: min(
            p[f"evaluation/{SOLVED[task]}"] for p in r["curve"][1:]
        ),
        "score, end": lambda r: r["curve"][-1][f"evaluation/{task}/mean"],
        "test solved": lambda r: r["test"][f"evaluation/{SOLVED[task]}"],
        "gap, start": lambda r: r["curve"][0]["gap/gap"],
        "gap, end": lambda r: r["curve"][-1]["gap/gap"],
        "cosine, end": lambda r: r["curve"][-1]["gap/cosine"],
    }
    rows = [f"### {task}", "", "| variant | lr | " + " | ".join(columns) + " |"]
    rows.append("|---" * (2 + len(columns)) + "|")
    for variant in VARIANTS:
        own = [r for r in runs if r["variant"] == variant]
        cells = [variant, f"{own[0]['rate']:g}"]
        for column in columns.values():
            values = [column(run) for run in own]
            middle = statistics.median(values)
            cells.append(f"{middle:.3f} ({min(values):.3f}…{max(values):.3f})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def write_plot(runs: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    """Solved rate and gap against compute, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    colors = ["#dc2626", "#2563eb", "#0891b2", "#4b5563", "#d97706", "#059669"]
    place = 0
    for task in tasks:
        quantities = {f"evaluation/{SOLVED[task]}": "held-out solved rate", "gap/gap": "gap (nats)"}
        for key, label in quantities.items():
            place += 1
            axes = figure.add_subplot(len(tasks), 2, place)
            for color, variant in zip(colors, VARIANTS, strict=True):
                own = [r["curve"] for r in runs if (r["task"], r["variant"]) == (task, variant)]
                for i, curve in enumerate(own):
                    axes.plot(
                        [point["compute"] / 1000 for point in curve],
                        [point[key] for point in curve],
                        color=color, alpha=0.85, linewidth=1.3, label=variant if i == 0 else None,
                    )  # fmt: skip
            axes.set(title=task, ylabel=label,
                     xlabel="network evaluations (thousands, backward = 2)")  # fmt: skip
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(OUT / "dipod_sudoku.png", dpi=120)


if __name__ == "__main__":
    main()
