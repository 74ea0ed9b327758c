"""The verb ``rectify audit``. Heavy imports happen when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from cluster.cli_measure import out, refuse
from recipes.errors import RecipeError


def audit(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a policy directory.")],
    step: Annotated[int | None, typer.Option(help="Of a run: this checkpoint.", min=0)] = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable: noise level to return to; default 0.1, 0.3 ... 0.9."),
    ] = None,
    count: Annotated[int, typer.Option(help="Samples, prompts in turn.", min=2)] = 16,
    cycles: Annotated[int, typer.Option(help="Times each is noised and denoised.", min=1)] = 5,
    references: Annotated[
        Path | None,
        typer.Option(
            help="Directory of images or .npy to measure distances to; default the training images "
            "of an embedded model.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    start: Annotated[
        Literal["samples", "references"], typer.Option(help="What is noised and denoised.")
    ] = "samples",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default the evaluation prompts.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the run's.", min=0)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler and of each denoising.", min=1)
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new directory; default audit, audit-2 ...")
    ] = None,
) -> None:
    """Audit memorisation: noise samples, denoise them, count those that come back."""
    from cluster.audit import GAMMAS, write
    from cluster.audit import audit as run
    from cluster.sample import SampleError, check_output, open_checkpoint

    try:
        check_output(to, "gif")
        source = open_checkpoint(checkpoint, step)
        audited = run(
            source, gamma or GAMMAS, count, cycles, references, seed,
            start=start, prompts=prompt or [], steps=steps,
        )  # fmt: skip
        path = write(audited, to)
    except (SampleError, RecipeError) as error:
        refuse(str(error))
    table = Table("gamma", "fixed points", "moved (1: another sample)", "nearest reference")
    for level in audited.levels:
        moved = level.moved
        near = "-" if moved.nearest is None else f"{float(moved.nearest[-1].median()):.3f}"
        fixed = float(moved.fixed[-1].double().mean())
        table.add_row(
            f"{level.gamma:g}", f"{fixed:.0%}", f"{float(moved.step[-1].median()):.3f}", near
        )
    out.print(table)
    out.print(f"audit: {path}", highlight=False, soft_wrap=True)
