"""What sampling, scoring and training at the same time is worth: sync, one step ahead and async.

    python benchmarks/overlap.py [--steps 30] [--seeds 3] [--modes sync "async, 2 steps" ...]

The digits recipe on Ray: two rollout actors, two learner ranks, and a reward as slow as the rollout. The
reward is the recipe's own behind a service that is asked over a network: each of its two replicas takes
as long for a sample as a rollout actor does (measured first, in sync mode without the delay), waiting
and not computing. Actors and ranks share this machine's cores.

Rollout batches of 64, 32 and 16 samples a job are tried for every mode on a seed of its own, and each
mode runs with the batch that was fastest for it. Modes alternate, seed by seed. Throughput is samples
per second from the fifth step to the last, without evaluation; rewards are the pinned evaluation's of
1,000 samples at the end, equal numbers of steps for all, and their differences from sync are paired by
seed. Writes docs/benchmarks/overlap.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "benchmarks" / "overlap.md"
DELAY = "RECTIFY_BENCHMARK_DELAY"
MODES = {
    "sync": "{mode: sync}",
    "sync, 4 parts": "{parts: 4}",
    "one step ahead": "{mode: one_step_ahead}",
    "async, 1 step": "{mode: async, max_staleness: 1}",
    "async, 2 steps": "{mode: async, max_staleness: 2}",
}
BATCHES = (64, 32, 16)
TUNING_SEED = 100
WARM = 5
KINDS = ("rollout", "reward", "learner")


class RemoteDigits:
    """The digits reward behind a service that takes its time."""

    def __init__(self) -> None:
        from rewards.digits import DigitLogProbReward

        self.reward = DigitLogProbReward()

    def __call__(self, prompts: list[str], completions: Any, **columns: Any) -> Any:
        """See ``rewards.contract.RewardFunction``."""
        ends = time.monotonic() + len(prompts) * float(os.environ[DELAY])
        scores = self.reward(prompts, completions, **columns)
        time.sleep(max(ends - time.monotonic(), 0.0))
        return scores


def run(mode: str, batch: int, seed: int, steps: int, delay: float) -> dict[str, Any]:
    """One run: samples per second, idle shares, staleness, and the rewards at its end."""
    with tempfile.TemporaryDirectory() as directory:
        reward = {
            "kind": "function",
            "path": "benchmarks.overlap:RemoteDigits",
            "name": "digit_log_prob",
            "replicas": 2,
            "batch_size": 512,
        }
        sets = [
            f"seed={seed}", f"steps={steps}", f"run_dir={directory}", "tracking=[]",
            f"evaluation.every={steps}", "evaluation.samples=1000", f"checkpoints.every={steps}",
            "checkpoints.keep_best=null", f"rollout.batch_size={batch}",
            f"schedule={MODES[mode]}", f"rewards=[{json.dumps(reward)}]",
        ]  # fmt: skip
        arguments = [part for one in sets for part in ("--set", one)]
        code = "from cluster.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", code, "run", "digits/flash_grpo", *arguments],
            check=True,
            cwd=ROOT,
            env={**os.environ, DELAY: str(delay), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        file = Path(directory) / "digits-flash-grpo" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    return described([row for row in rows if row["kind"] == "train"], rows[-1])


def described(train: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> dict[str, Any]:
    """A run's numbers from its metrics."""
    warm = train[WARM:]
    seconds = warm[-1]["time"] - train[WARM - 1]["time"]
    samples = sum(row["rollout/samples"] for row in warm)
    idle = {kind: statistics.median(row[f"idle/{kind}"] for row in warm) for kind in KINDS}
    staleness = statistics.mean(row.get("rollout/staleness_mean", 0.0) for row in warm)
    return {
        "throughput": samples / seconds,
        "per_sample": statistics.median(
            row["busy/rollout"] / row["rollout/samples"] for row in warm
        ),
        "learn": statistics.median(row["time/learn"] for row in warm),
        "idle": idle,
        "staleness": staleness,
        "log_prob": last["evaluation/digit_log_prob/mean"],
        "accuracy": last["evaluation/digit_held_out/mean"],
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]], batches: Mapping[str, int]) -> list[str]:
    """Markdown rows, a mode each; ratios are paired by seed."""
    lines = [
        "| schedule | batch | samples/s | of sync | idle rollout | reward | learner | staleness | "
        "log-probability | from sync | accuracy | from sync |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, found in runs.items():
        pairs = list(zip(found, runs["sync"], strict=True))
        ratios = [one["throughput"] / sync["throughput"] for one, sync in pairs]
        apart = {k: [one[k] - sync[k] for one, sync in pairs] for k in ("log_prob", "accuracy")}
        idle = [f"{statistics.median(one['idle'][k] for one in found):.0%}" for k in KINDS]
        cells = [
            mode, str(batches[mode]), spread([one["throughput"] for one in found], 1),
            spread(ratios, 2), *idle, f"{statistics.mean(one['staleness'] for one in found):.2f}",
            spread([one["log_prob"] for one in found], 3), spread(apart["log_prob"], 3),
            spread([one["accuracy"] for one in found], 3), spread(apart["accuracy"], 3),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    modes = list(dict.fromkeys(["sync", *arguments.modes]))  # what all is compared with
    alone = run("sync", BATCHES[0], TUNING_SEED, 12, 0.0)
    delay = alone["per_sample"]
    tried = {
        mode: {batch: run(mode, batch, TUNING_SEED, 14, delay)["throughput"] for batch in BATCHES}
        for mode in modes
    }
    batches = {mode: max(found, key=lambda b: found[b]) for mode, found in tried.items()}
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for seed in range(arguments.seeds):
        for mode in modes:
            runs[mode].append(run(mode, batches[mode], seed, arguments.steps, delay))
            print(mode, seed, json.dumps(runs[mode][-1]), flush=True)
    lines = [
        f"`python benchmarks/overlap.py --steps {arguments.steps} --seeds {arguments.seeds} --modes "
        f"{shlex.join(modes)}` "
        f"({os.cpu_count()} CPU cores)",
        "",
        f"A rollout actor takes {1000 * delay:.1f} ms a sample, a replica of the reward as long; an "
        f"update takes {alone['learn']:.2f} s of sync's step. Samples per second by batch while tuning: "
        + "; ".join(
            f"{mode} " + ", ".join(f"{b}: {t:.1f}" for b, t in found.items())
            for mode, found in tried.items()
        )
        + ".",
        "",
        *table(runs, batches),
    ]
    OUT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
