"""The verbs of ``rectify`` that measure runs. Heavy imports happen in the verbs that need them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.errors import RecipeError

if TYPE_CHECKING:
    from cluster.measured import Measured
    from recipes.schema import AnyRecipe

out = Console()
err = Console(stderr=True)

SHORT = 24  # characters of a row's name that are not folded on a narrow terminal


def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT... RECIPE",
            help="Runs, checkpoints or policy directories; last the recipe that evaluates them.",
        ),
    ],
    step: Annotated[
        list[int] | None, typer.Option(help="Of runs: these checkpoints; default all.", min=0)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Instead of evaluation.samples.", min=1)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of RECIPE.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new directory; default evaluation, ...-2 ...")
    ] = None,
) -> None:
    """Measure checkpoints by a recipe's evaluation: its prompts, seed, rewards, held-out rewards."""
    *found, last = paths
    if not found or last.is_dir():
        refuse(f"{last}: the last argument is the RECIPE that evaluates, such as RUN/recipe.yaml")
    changed = [*(overrides or []), *([f"evaluation.samples={samples}"] if samples else [])]
    from cluster.measured import MeasureError

    try:
        recipe = _evaluator(last, changed)
        from cluster.evaluate import evaluate_checkpoints

        with err.status("evaluating") as status:
            measured = evaluate_checkpoints(found, recipe, step or [], to, status.update)
    except (RecipeError, MeasureError) as error:
        refuse(str(error))
    show(measured)


def curves(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; default every evaluated reward, and Fréchet distances."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new directory; default curves, curves-2 ...")
    ] = None,
) -> None:
    """Merge runs into curves with 95 % bands over seeds, and compare what differs otherwise."""
    from cluster.curves import compare_curves
    from cluster.measured import MeasureError

    try:
        measured = compare_curves(runs, metric or [], to)
    except MeasureError as error:
        refuse(str(error))
    show(measured)


def refuse(message: str) -> NoReturn:
    """Bad input: one message, exit status 2."""
    err.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _evaluator(path: Path, overrides: list[str]) -> AnyRecipe:
    """A recipe to evaluate by: whole, though its GPUs and its store need not be here."""
    from recipes.check import check
    from recipes.derived import needed
    from recipes.schema import recipe_type
    from recipes.source import load

    loaded = load(path, recipe_type, overrides)
    check(loaded, math.ceil(needed(loaded.value, "gpus")), filling=True)
    return loaded.value


def show(measured: Measured) -> None:
    """The table, what to know about it, and the files."""
    shown = measured.table
    table = Table(title=escape(shown.title), title_justify="left")
    short = max(len(row[0]) for row in shown.rows) <= SHORT
    for place, name in enumerate(shown.head):
        table.add_column(escape(name), no_wrap=short and place == 0, overflow="fold")
    for row in shown.rows:
        table.add_row(*map(escape, row))
    out.print(table)
    for note in measured.notes:
        err.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for path in measured.files:
        out.print(str(path), highlight=False, soft_wrap=True)
