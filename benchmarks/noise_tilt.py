"""NoiseTilt against the other inference-time methods on the digit models, at equal cost.

    python benchmarks/noise_tilt.py [--seeds 3] [--tasks digits moving]

The reward is the log-probability of the asked digit under one classifier; another classifier is never
followed: its accuracy, the Fréchet distance to real digits in its features, and diversity sit beside, and
the ink (PNG size). 25 steps. Search and particle methods get 25, 100 and 500 network evaluations a sample
(temperatures and widths tuned by reward on a seed of their own, at 100); methods that follow the gradient
take one pass of 25 at several strengths, all of which are shown, because strength trades reward
against distance. Finished points are kept in runs/noise_tilt.jsonl. Writes
docs/benchmarks/noise_tilt.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

BUDGETS = (25, 100, 500)
TUNED_AT, TUNING_SEED = 100, 100
SEARCH: dict[str, list[dict[str, Any]]] = {
    "Best-of-N": [{"kind": "best_of_n"}],
    "SVDD": [{"kind": "svdd"}],
    "RBF": [{"kind": "rbf"}],
    "beam": [{"kind": "beam", "width": 2}, {"kind": "beam", "width": 4}],
    "SMC (FK)": [{"kind": "smc", "beta": beta} for beta in (0.03, 0.1, 0.3, 1.0)],
    "DAS": [{"kind": "das", "beta": beta} for beta in (0.1, 0.3, 1.0)],
}
GRADIENT: dict[str, list[dict[str, Any]]] = {
    "DPS": [
        {"kind": "dps", "beta": beta} for beta in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
    ],
    "FreeDoM": [
        {"kind": "freedom", "scale": scale, "repeats": 1} for scale in (0.02, 0.05, 0.1, 0.2, 0.4)
    ],
    "NTRK": [{"kind": "ntrk", "rho": rho} for rho in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)],
    # Of 64 entries few are outside bounds at 1e-4: a larger alpha whitens more.
    "NTRK, α 0.1": [
        {"kind": "ntrk", "rho": rho, "whitening": {"alpha": 0.1}}
        for rho in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    ],
    "NTRK, rescale": [
        {"kind": "ntrk", "rho": rho, "whitening": {"operator": "rescale"}}
        for rho in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    ],
}
COMBINED = {"kind": "ntrk", "rho": 0.005}
TASKS = {"digits": [], "moving": ["policy.checkpoint=moving-digits", "prompts.moving=true"]}
SAMPLES = {"digits": 100, "moving": 40}
REWARD, HELD_OUT = "digit_log_prob", "evaluation/digit_held_out"
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
RUNS = Path(__file__).parents[1] / "runs" / "noise_tilt.jsonl"


class Bench:
    """Points of one task, measured once and kept."""

    def __init__(self, task: str) -> None:
        from cluster.compare import in_process
        from recipes.schema import Recipe
        from recipes.source import load

        self.task, self.samples = task, SAMPLES[task]
        overrides = ["rollout.steps=25", "policy.lora=null", *TASKS[task]]
        overrides.append("evaluation.rewards=[{kind: digit_held_out}, {kind: ink}]")
        self.recipe = load(Path("digits/flash_grpo"), Recipe, overrides).value
        self.parts = in_process(self.recipe)

    def points(self, method: dict[str, Any] | None, budget: int, seed: int) -> dict[str, Any]:
        """One point; without a method the plain sampler."""
        from cluster.compare import BASE, Cells

        key = [self.task, method, budget, seed, self.samples]
        known = [json.loads(row) for row in RUNS.read_text().splitlines()] if RUNS.exists() else []
        if finished := [row for row in known if row["key"] == key]:
            return finished[0]
        compare = {
            "kind": "flow",
            "reward": REWARD,
            "budgets": [budget],
            "samples": self.samples,
            "methods": [method] if method else [],
        }
        document = self.recipe.model_dump(mode="json") | {"compare": compare, "seed": seed}
        recipe = type(self.recipe).model_validate(document)
        cells, pool = Cells(recipe, self.parts.scorer, seed), self.parts.pool
        if method:
            (point,) = cells.guided(pool, BASE, recipe.comparison.methods)
        else:
            point = cells.plain(pool, BASE)
        row = {"key": key, **asdict(point)}
        RUNS.parent.mkdir(parents=True, exist_ok=True)
        with RUNS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def run(bench: Bench, seeds: int) -> list[dict[str, Any]]:
    """Every line of the table: label, budget, its points over seeds."""
    lines: list[dict[str, Any]] = []

    def line(label: str, method: dict[str, Any] | None, budget: int) -> None:
        points = [bench.points(method, budget, seed) for seed in range(seeds)]
        lines.append({"label": label, "budget": budget, "method": method, "points": points})
        print(row(lines[-1]), flush=True)

    line("plain", None, 25)
    for label, grid in GRADIENT.items():
        for method in grid:
            line(f"{label} {strength(method)}", method, 25)
    for budget in BUDGETS[1:]:
        line("NTRK + Best-of-N", COMBINED, budget)
    for label, grid in SEARCH.items():
        best = max(grid, key=lambda m: bench.points(m, TUNED_AT, TUNING_SEED)["reward"])
        for budget in BUDGETS:
            if label != "DAS" or budget < 500:
                line(f"{label} {strength(best)}".strip(), best, budget)
    return lines


def strength(method: dict[str, Any]) -> str:
    """What was varied."""
    shown = {"beta": "β", "rho": "ρ", "scale": "scale", "width": "B"}
    return ", ".join(f"{name} {method[key]:g}" for key, name in shown.items() if key in method)


def row(line: dict[str, Any]) -> str:
    """One line as Markdown: medians and ranges over seeds."""
    points = line["points"]
    reads = (
        [p["reward"] for p in points],
        [p["metrics"][f"{HELD_OUT}/accuracy"] for p in points],
        [p["metrics"][f"{HELD_OUT}/frechet"] for p in points],
        [p["metrics"][f"{HELD_OUT}/diversity"] for p in points],
        [p["metrics"]["evaluation/ink/mean"] for p in points],
    )
    cells = [
        f"{statistics.median(values):.3f} ({min(values):.3f}…{max(values):.3f})" for values in reads
    ]
    costs = [statistics.median(p["work"][k] for p in points) for k in ("forwards", "equivalents")]
    cost = [f"{value:.0f}" for value in costs]
    return "| " + " | ".join([line["label"], *cost, *cells]) + " |"


def table(task: str, lines: Sequence[dict[str, Any]]) -> str:
    """All lines of a task."""
    head = ["", "NFE", "forward equivalents", "reward", "held-out accuracy", "Fréchet"]
    head += ["diversity", "ink"]
    rows = [f"### {task}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*rows, *map(row, lines)]) + "\n"


def plot(found: dict[str, list[dict[str, Any]]]) -> None:
    """Minus the reward (it ends at 0) against forward equivalents, and Fréchet distance against it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4 * len(found)), layout="constrained")
    grid: Any = figure.subplots(len(found), 2, squeeze=False)
    for panels, (task, lines) in zip(grid, found.items(), strict=True):
        families: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            family = line["label"].split(" ")[0] if "NTRK" not in line["label"] else line["label"]
            families.setdefault(family.split(" ρ")[0], []).append(line)
        for place, (family, own) in enumerate(families.items()):

            def median(line: dict[str, Any], *path: str) -> float:
                values: list[Any] = line["points"]
                for key in path:
                    values = [value[key] for value in values]
                return statistics.median(values)

            cost = [median(line, "work", "equivalents") for line in own]
            reward = [-median(line, "reward") for line in own]
            distance = [median(line, "metrics", f"{HELD_OUT}/frechet") for line in own]
            look: dict[str, Any] = {"color": f"C{place % 10}", "markersize": 4}
            look["marker"] = "o" if place < 10 else "s"
            line = "-" if len(set(cost)) > 1 else ""
            panels[0].plot(cost, reward, linestyle=line, label=family, **look)
            panels[1].plot(reward, distance, linestyle="-", **look)
        below = "minus reward (lower is better)"
        panels[0].set(xscale="log", yscale="log", ylabel=below, title=task)
        panels[0].set(xlabel="forward equivalents a sample")
        panels[1].set(xscale="log", xlabel=below, ylabel="Fréchet distance (held-out features)")
        panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(OUT / "noise_tilt.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found = {task: run(Bench(task), arguments.seeds) for task in arguments.tasks}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "noise_tilt.json").write_text(json.dumps(found))
    (OUT / "noise_tilt.md").write_text("\n".join(table(t, lines) for t, lines in found.items()))
    plot(found)


if __name__ == "__main__":
    main()
