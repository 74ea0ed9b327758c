"""What the platform costs: a run's steps against the same network calls in a bare PyTorch loop.

    python benchmarks/overhead.py [--steps 24] [--rounds 3]

The network calls of the steps (inputs, shapes, with or without gradient) and the rewards' inputs are
recorded once from the recipe in one process. The bare loop replays them: forwards, backwards, AdamW,
the reward's function; no sampler, no advantages, no processes. It runs on the same two cores, once as
one process with two threads and once as two processes with a thread each that halve every step's
calls without ever waiting for one another; the faster of the two is the yardstick. The run is the
recipe on Ray with DeepSpeed, its median step once warm. Rounds alternate. Writes
docs/benchmarks/overhead.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WARM = 4
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"


def recipe(steps: int, directory: str, *overrides: str) -> Any:
    """The digits recipe as it ships, without evaluation and checkpoints inside the measured part."""
    from recipes.schema import Recipe
    from recipes.source import load

    sets = [f"steps={steps}", f"run_dir={directory}", "tracking=[]", "evaluation.samples=20"]
    sets += [f"evaluation.every={steps}", f"checkpoints.every={steps}"]
    return load(Path("digits/flash_grpo"), Recipe, [*sets, *overrides]).value


def record(steps: int) -> list[dict[str, Any]]:
    """The network calls and reward inputs of every training step."""
    import torch

    from cluster.launch import build_trainer
    from cluster.local import LocalLearner, LocalRolloutPool, LocalScorer

    wanted = recipe(steps, tempfile.gettempdir())
    pool, scorer, learner = LocalRolloutPool(wanted), LocalScorer(wanted), LocalLearner(wanted)
    recorded: list[dict[str, Any]] = []

    def hook(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        kept = {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        recorded[-1]["calls"].append((kept, torch.is_grad_enabled()))

    for module in (pool.worker.policy.module, learner.rank.policy.module):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    trainer = build_trainer(wanted, None, pool, scorer, learner, 0)  # type: ignore[arg-type]
    trainer.proved = True
    trainer.publish()
    sets = trainer.sets()
    for _ in range(steps):
        recorded.append({"calls": []})
        trainer.advance(sets)
        recorded[-1]["prompts"] = [p.text for p in trainer.prompts][:1] * 128
    return recorded


def bare(recorded: list[dict[str, Any]], threads: int, part: int, parts: int, queue: Any) -> None:
    """Replay a share of every step's calls; put the median step time into ``queue``."""
    import torch

    torch.set_num_threads(threads)
    import numpy as np

    from rewards.digits import DigitLogProbReward

    policy = recipe(1, tempfile.gettempdir()).policy.build()
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3, foreach=True)
    reward = DigitLogProbReward()
    media = [np.zeros((1, 8, 8, 1), np.uint8)] * (128 // parts)
    times: list[float] = []
    for step in recorded:
        started = time.perf_counter()
        for number, (inputs, grad) in enumerate(step["calls"]):
            if grad:
                rows = slice(part, None, parts)
                cut = {k: v[rows] if torch.is_tensor(v) else v for k, v in inputs.items()}
                policy.module(**cut)[0].square().mean().backward()
            elif parts == 1 or number % parts == part:
                with torch.no_grad():
                    policy.module(**inputs)
        reward(step["prompts"][: len(media)], media, digit=[3] * len(media))
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    queue.put(statistics.median(times[WARM:]))


def bare_seconds(recorded: list[dict[str, Any]], processes: int) -> float:
    """The bare loop's step: the slower of its processes."""
    context = get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=bare, args=(recorded, 2 // processes, i, processes, queue))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    seconds = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return max(seconds)


def run_seconds(steps: int) -> float:
    """The run's median step, from its own metrics, which cover everything from draws to sync."""
    import subprocess
    import sys

    from cluster.tracking import MetricsFile

    with tempfile.TemporaryDirectory() as directory:
        sets = [f"steps={steps}", f"run_dir={directory}", "tracking=[]", "evaluation.samples=20"]
        sets += [f"evaluation.every={steps}", f"checkpoints.every={steps}"]
        arguments = [part for s in sets for part in ("--set", s)]
        program = [sys.executable, "-c", "from cluster.cli import main; main()"]
        subprocess.run([*program, "run", "digits/flash_grpo", *arguments], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        rows = MetricsFile(Path(directory) / "digits-flash-grpo" / "metrics.jsonl").read()
    return statistics.median(r["time/step"] for r in rows[WARM:] if r["kind"] == "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    context = get_context("spawn")
    with context.Pool(1) as pool:
        recorded = pool.apply(record, (arguments.steps,))
    rounds: list[tuple[float, float, float]] = []
    for _ in range(arguments.rounds):
        rounds.append(
            (run_seconds(arguments.steps), bare_seconds(recorded, 1), bare_seconds(recorded, 2))
        )
        print([f"{value:.3f}" for value in rounds[-1]], flush=True)
    ratios = [run / min(one, two) for run, one, two in rounds]
    lines = [
        "| round | run, s/step | bare, 1 x 2 threads | bare, 2 x 1 thread | ratio |",
        "|---|---|---|---|---|",
    ]
    for number, ((run, one, two), ratio) in enumerate(zip(rounds, ratios, strict=True), 1):
        lines.append(f"| {number} | {run:.3f} | {one:.3f} | {two:.3f} | {ratio:.2f} |")
    lines.append(
        f"\nMedian ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}…{max(ratios):.2f})."
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "overhead.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
