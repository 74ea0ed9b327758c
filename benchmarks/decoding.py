"""Faster decoding of masked-diffusion models: what caches and thresholds save, and what they cost.

    python benchmarks/decoding.py [--checkpoint sudoku LABEL=DIRECTORY ...] [--rounds 5]

Six modes: one token a forward without a cache (naive), the prefix and the dual cache, threshold
decoding at --tau, and the threshold with each cache.

Accuracy is measured on trained checkpoints: 4x4 Sudokus of the validation split, temperature 0, the
same puzzles in every mode, each decoded alone, so that the forwards counted are a puzzle's own.

Speed is measured on one larger LLaDA with random weights (--width, --layers; the embedded models are
so small that calls, not arithmetic, take their time): --batch prompts of --prompt tokens, completions
of --length tokens in blocks of --block, no token of which ends a text. Random weights are never sure
of anything, so that a threshold would commit one token a forward there. They are given the rate
of the trained checkpoint, measured in the same mode at the same tau:

    rate = answer tokens (through the first EOS) / forwards that committed at least one of them

which leaves out the padding behind an answer, committed by the handful, and is exactly 1 for naive.
The completion then takes round(length / rate) forwards, spread evenly over blocks, and each block's
tokens evenly over its forwards: that many places' best tokens are raised to certainty after the
forward, and the sampler runs as ever, threshold included. So measured is what a forward of each mode
costs; how many there are is the trained model's, at --task-block tokens a block.

Every round runs all modes (every other round backwards), speedups are ratios within a round, and
tables show medians (min…max) over rounds. Writes docs/benchmarks/decoding.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.sudoku import cell_accuracy, solved
from rollout.draws import EVALUATION_STEP, Group, Prompt, groups_for
from rollout.masked import DecodePlan, MaskedSampler, MaskedSamplerConfig, transfer_counts
from rollout.policies.base import MaskedDiffusionPolicy
from rollout.policies.llada.policy import LladaConfig, LladaPolicy
from rollout.sudoku import SudokuPrompts

# Cache, and whether a threshold decides what is committed.
MODES: dict[str, tuple[str, bool]] = {
    "naive": ("none", False),
    "prefix": ("prefix", False),
    "dual": ("dual", False),
    "threshold": ("none", True),
    "prefix + threshold": ("prefix", True),
    "dual + threshold": ("dual", True),
}
COLORS = ("#4b5563", "#0891b2", "#2563eb", "#7c3aed", "#d97706", "#dc2626")
MARKERS = "os^Dv<>p"
TARGET = 6.0
TOLERANCE = 0.01
# The logit of a certain token; all others' are below 10.
CERTAIN = 1e3
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"


class PacedPolicy(LladaPolicy):
    """Random weights that are certain of as many tokens as ``pace`` says, and end no text.

    Attributes:
        pace: per block of a completion, how many of its masked tokens a forward makes certain, by
            how many are masked; None: leave the logits as they are.
        prompt, block: tokens of the prompt and of a block.
    """

    def __init__(self, directory: Path, device: str, prompt: int, block: int) -> None:
        super().__init__(LladaConfig(checkpoint=str(directory)), directory, device, 0, False)
        self.eos_token_id = -1
        self.pace: list[dict[int, int]] | None = None
        self.prompt, self.block = prompt, block

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        where: Tensor,
        cache: Any = None,
        start: int = 0,
    ) -> Tensor:
        """See ``LladaPolicy``. Rows keep in step, since all are given the same pace."""
        logits = super().logits(tokens, attention_mask, where, cache, start)
        if self.pace is not None:
            masked = len(logits) // len(where)
            place = int(where[0].int().argmax()) + start - self.prompt
            sure = logits.view(len(where), masked, -1)[:, : self.pace[place // self.block][masked]]
            sure.scatter_(2, sure.argmax(dim=2, keepdim=True), CERTAIN)
        return logits


def pace_of(rate: float, length: int, block: int) -> list[dict[int, int]]:
    """The ``PacedPolicy.pace`` that commits ``rate`` tokens a forward, as evenly as integers can."""
    blocks = length // block
    forwards = min(max(round(length / rate), blocks), length)
    pace: list[dict[int, int]] = []
    for own in transfer_counts(forwards, blocks):
        commits = transfer_counts(block, own)
        pace.append({sum(commits[i:]): count for i, count in enumerate(commits)})
    return pace


def sampler(
    policy: MaskedDiffusionPolicy, mode: str, length: int, block: int, tau: float
) -> MaskedSampler:
    """A sampler in one of MODES, at temperature 0."""
    cache, by_threshold = MODES[mode]
    config = {"length": length, "block_length": block, "steps": length, "temperature": 0.0}
    threshold = tau if by_threshold else None
    return MaskedSampler(
        MaskedSamplerConfig.model_validate({**config, "cache": cache, "threshold": threshold}),
        policy,
    )


def solve(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A trained checkpoint's puzzles in every mode: cells, solved, forwards of each; its rate."""
    policy = LladaConfig(checkpoint=name).build(arguments.device)
    prompts = SudokuPrompts(split="validation", count=arguments.puzzles).load()
    groups = groups_for(prompts, seed=0, step=EVALUATION_STEP, count=len(prompts), size=1)
    results: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        decoding = sampler(policy, mode, arguments.task_length, arguments.task_block, arguments.tau)
        rollouts = [decoding.sample([group], [DecodePlan()])[0] for group in groups]
        answers = [
            (g.columns["puzzle"], g.columns["solution"], r.media[0])
            for g, r in zip(groups, rollouts, strict=True)
        ]
        useful = sum(len(set(r.replay.decode_step[0].tolist()) - {-1}) for r in rollouts)
        results[mode] = {
            "cells": [cell_accuracy(*answer) for answer in answers],
            "solved": [float(solved(*answer)) for answer in answers],
            "forwards": [r.forwards for r in rollouts],
            "rate": sum(int(r.replay.lengths[0]) for r in rollouts) / useful,
        }
        print(name, mode, f"{statistics.mean(results[mode]['cells']):.3f}", flush=True)
    return results


def build_random(arguments: argparse.Namespace, directory: Path) -> PacedPolicy:
    """The model whose speed is measured; its sizes are in proportion to the embedded ones."""
    from rollout.policies.llada.configuration import LLaDAConfig
    from rollout.policies.llada.modeling import LLaDAModelLM
    from rollout.policies.llada.pretraining import build_tokenizer, model_sizes

    width, heads = arguments.width, max(arguments.width // 64, 1)
    sizes = {
        **model_sizes("sudoku"),
        "d_model": width,
        "n_layers": arguments.layers,
        "mlp_hidden_size": 3 * width,
    }
    sizes |= {"n_heads": heads, "n_kv_heads": heads, "max_sequence_length": 4096}
    tokenizer = build_tokenizer("sudoku")
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("mask", "eos", "pad")}
    torch.manual_seed(0)
    LLaDAModelLM(LLaDAConfig(**sizes, **ids)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return PacedPolicy(directory, arguments.device, arguments.prompt, arguments.block)


def speed_group(policy: PacedPolicy, size: int) -> Group:
    """``size`` samples of a prompt of exactly ``policy.prompt`` tokens (a digit is one).

    Raises:
        ValueError: the chat template alone is longer.
    """
    digits = policy.prompt - len(policy.encode(["1"])[0]) + 1
    if digits < 1:
        raise ValueError(f"--prompt {policy.prompt} is shorter than the chat template")
    prompt = Prompt("speed", ("1234" * digits)[:digits], {})
    return groups_for([prompt], seed=0, step=0, count=1, size=size)[0]


def race(
    arguments: argparse.Namespace, rates: dict[str, float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round, and forwards per sample, by ``mode`` or ``mode@checkpoint``.

    Args:
        arguments: the command line.
        rates: tokens per forward by ``mode@checkpoint``; what a fixed schedule runs needs none.
    """
    length, block = arguments.length, arguments.block
    runs: dict[str, list[dict[int, int]] | None] = {
        mode: None for mode, (_, by_threshold) in MODES.items() if not by_threshold
    }
    runs |= {key: pace_of(rate, length, block) for key, rate in rates.items()}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    forwards: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        policy = build_random(arguments, Path(directory))
    group = speed_group(policy, arguments.batch)
    sampler(policy, "dual", length, block, arguments.tau).sample([group], [DecodePlan()])
    for number in range(arguments.rounds):
        for key in list(runs)[:: -1 if number % 2 else 1]:
            policy.pace = runs[key]
            decoding = sampler(policy, key.split("@")[0], length, block, arguments.tau)
            started = time.perf_counter()
            (rollout,) = decoding.sample([group], [DecodePlan()])
            seconds[key].append(time.perf_counter() - started)
            forwards[key] = rollout.forwards / group.size
        latest = {key: round(values[-1], 2) for key, values in seconds.items()}
        print(f"round {number + 1}", latest, flush=True)
    return seconds, forwards


def summarise(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per checkpoint and mode; differences and speedups are against naive, in pairs."""
    seconds, forwards = document["seconds"], document["forwards"]
    arguments = document["arguments"]
    tokens = arguments["length"] * arguments["batch"]
    rows: list[dict[str, Any]] = []
    for label, results in document["task"].items():
        for mode, result in results.items():
            key = f"{mode}@{label}" if MODES[mode][1] else mode
            row: dict[str, Any] = {"checkpoint": label, "mode": mode, "rate": result["rate"]}
            for what in ("cells", "solved"):
                pairs = zip(result[what], results["naive"][what], strict=True)
                differences = [value - base for value, base in pairs]
                row[what] = statistics.mean(result[what])
                row[f"{what}_change"] = statistics.mean(differences)
                row[f"{what}_error"] = statistics.stdev(differences) / len(differences) ** 0.5
            row["task_forwards"] = statistics.mean(result["forwards"])
            row["forwards"] = forwards[key]
            row["tokens_per_second"] = [tokens / value for value in seconds[key]]
            pairs = zip(seconds["naive"], seconds[key], strict=True)
            row["speedup"] = [naive / value for naive, value in pairs]
            row["equal"] = min(row["cells_change"], row["solved_change"]) >= -TOLERANCE
            rows.append(row)
    return rows


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    show = [form.format(v) for v in (statistics.median(values), min(values), max(values))]
    return f"{show[0]} ({show[1]}…{show[2]})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ["checkpoint", "mode", "cell accuracy", "solved", "change of solved, points"]
    columns += ["forwards per puzzle", "tokens per forward", "forwards, speed run", "tokens/s"]
    lines = ["| " + " | ".join([*columns, "speedup"]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        change = f"{100 * row['solved_change']:+.1f} ± {100 * row['solved_error']:.1f}"
        cells = [row["checkpoint"], row["mode"], f"{row['cells']:.3f}", f"{row['solved']:.3f}"]
        cells += [change, f"{row['task_forwards']:.1f}", f"{row['rate']:.2f}"]
        cells += [f"{row['forwards']:.0f}", spread(row["tokens_per_second"], "{:.1f}")]
        lines.append("| " + " | ".join([*cells, spread(row["speedup"], "{:.2f}")]) + " |")
    return "\n".join(lines)


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """Each mode's speedup in words, and whether the target is reached at equal accuracy."""
    lines: list[str] = []
    for label in dict.fromkeys(row["checkpoint"] for row in rows):
        own = [row for row in rows if row["checkpoint"] == label]
        lines.append(
            f"* {label}, naive: cell accuracy {own[0]['cells']:.3f}, solved {own[0]['solved']:.3f}."
        )
        for row in own[1:]:
            lines.append(
                f"* {label}, {row['mode']}: {spread(row['speedup'], '{:.2f}')} times naive; cell "
                f"accuracy {100 * row['cells_change']:+.1f} ± {100 * row['cells_error']:.1f}, "
                f"solved {100 * row['solved_change']:+.1f} ± {100 * row['solved_error']:.1f} "
                f"points: {'equal' if row['equal'] else 'not equal'}."
            )
        equal = [row for row in own if row["equal"]]
        best = max(equal, key=lambda row: statistics.median(row["speedup"]))
        median = statistics.median(best["speedup"])
        reached = "is reached" if median >= TARGET else "is **not** reached"
        lines.append(
            f"* {label}: {TARGET:g} times naive at equal accuracy {reached}: the fastest mode that "
            f"loses at most {100 * TOLERANCE:g} point of both is {best['mode']}, {median:.2f} times."
        )
    return "\n".join(lines)


def write_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Solved rate against speedup: a colour for each mode, a marker for each checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))
    for row in rows:
        middle = statistics.median(row["speedup"])
        ends = [[middle - min(row["speedup"])], [max(row["speedup"]) - middle]]
        place = labels.index(row["checkpoint"])
        axes.errorbar(
            [middle], [row["solved"]], xerr=ends, color=COLORS[list(MODES).index(row["mode"])],
            marker=MARKERS[place % len(MARKERS)], capsize=2, linestyle="none",
            label=f"{row['mode']}, {row['checkpoint']}",
        )  # fmt: skip
    axes.axvline(TARGET, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="speed against naive", ylabel="solved, validation", xscale="log")
    axes.set_xticks(ticks := [1, 2, 3, 4, 6, 8, 12, 16, 24], labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", nargs="+", default=["sudoku"], help="[label=]name or dir")
    parser.add_argument("--puzzles", type=int, default=512)
    parser.add_argument("--task-length", type=int, default=24)
    parser.add_argument("--task-block", type=int, default=8)
    parser.add_argument("--tau", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    task: dict[str, dict[str, dict[str, Any]]] = {}
    for text in arguments.checkpoint:
        label, _, name = text.rpartition("=")
        task[label or name] = solve(name, arguments)
    rates = {
        f"{mode}@{label}": results[mode]["rate"]
        for label, results in task.items()
        for mode, (_, by_threshold) in MODES.items()
        if by_threshold
    }
    seconds, forwards = race(arguments, rates)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "checkpoint")}
    document = {"arguments": settings, "task": task, "seconds": seconds, "forwards": forwards}
    rows = summarise(document)
    text = f"{table(rows)}\n\n{verdicts(rows)}\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "decoding.json").write_text(json.dumps(document))
    (arguments.out / "decoding.md").write_text(text)
    write_plot(rows, arguments.out / "decoding.png")
    print(text)


if __name__ == "__main__":
    main()
