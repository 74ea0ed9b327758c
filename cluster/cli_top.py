"""The verb ``rectify top``."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from cluster.cli_measure import out, refuse

EVERY = 2.0  # seconds between looks
Pressed = Callable[[str, float], bool]


def top(
    run: Annotated[Path, typer.Argument(help="A run directory, of a run that goes on or ended.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print it once; so where no terminal is.")
    ] = False,
) -> None:
    """Watch a run: progress, rewards, where time goes, idle actors. q ends the view, not the run."""
    from cluster.top import NoRun, render, snapshot

    try:
        shot = snapshot(run, time.time())
        if once or not out.is_terminal:
            out.print(render(shot))
            return
        with _keys() as pressed, Live(render(shot), console=out, screen=True) as live:
            while not pressed("q", EVERY):
                live.update(render(snapshot(run, time.time())))
    except NoRun as error:
        refuse(str(error))
    except KeyboardInterrupt:
        return


@contextlib.contextmanager
def _keys() -> Generator[Pressed]:
    """Whether a key is pressed within some seconds, as long as the context lasts."""
    if not sys.stdin.isatty():
        yield _wait
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pressed(key: str, seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and key in os.read(sys.stdin.fileno(), 64).decode(errors="replace")


def _wait(key: str, seconds: float) -> bool:
    time.sleep(seconds)
    return False
