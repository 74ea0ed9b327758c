"""What the user sees while a run is on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rl.contracts import Metrics

PLAIN_LINES = 40


class Progress:
    """Steps, rewards and timings of one run."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.total, self.console = total, console
        # The clock starts with the first step: starting actors says nothing about the rest.
        self.started: float | None = None
        self.first = done
        self.every = max(total // PLAIN_LINES, 1)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, step: int, metrics: Metrics) -> None:
        """After each training step."""
        numbers = summary(metrics)
        now = time.monotonic()
        self.started = self.started or now - metrics["time/step"]
        self.bar.update(self.task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step % self.every == 0 or step == self.total):
            pace = (now - self.started) / max(step - self.first, 1)
            left = pace * (self.total - step)
            self.message(f"step {step}/{self.total}  {numbers}  ETA {left:.0f} s")

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """After each evaluation."""
        means = [
            f"{key.split('/')[1]} {value:.3f}"
            for key, value in metrics.items()
            if key.startswith("evaluation/") and key.endswith("/mean")
        ]
        distances = [f"Fréchet {v:.3f}" for k, v in metrics.items() if k.endswith("/frechet")]
        self.message(f"evaluation at step {step}: " + "  ".join(means + distances))

    def message(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)


def summary(metrics: Metrics) -> str:
    """Rewards and where a step's time went."""
    rewards = [
        f"{key.split('/')[1]} {value:.3f}"
        for key, value in metrics.items()
        if key.startswith("reward/") and key.endswith("/mean")
    ]
    phases = [
        f"{name} {metrics.get(f'time/{name}', 0.0):.2f}" for name in ("rollout", "learn", "sync")
    ]
    return "  ".join(rewards) + f"  | {metrics['time/step']:.2f} s ({', '.join(phases)})"
