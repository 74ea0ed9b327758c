"""The command ``rectify``. Heavy imports happen in the verbs that need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from cluster.doctor import diagnose, gpu_count
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from recipes.schema import Recipe
    from recipes.source import Loaded

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: rl.clip_range=1e-3.")
]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A file, or a name of 'recipes'.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Continue although recipe or data changed.")
    ] = False,
) -> None:
    """Train a recipe."""
    if recipe is None and resume is None:
        raise typer.BadParameter("give a RECIPE, or --resume RUN")
    source = recipe if recipe is not None else resume / "recipe.yaml"  # type: ignore[operator]
    loaded = _checked(source, overrides)
    from cluster.launch import ResumeError
    from cluster.launch import run as launch
    from cluster.learner_group import LearnerLost
    from cluster.ray_cluster import ClusterError
    from rewards.calling import RewardFailed
    from rl.metrics import DriftError

    try:
        path = launch(loaded.value, out, resume, changed)
    except ResumeError as error:
        _refuse(str(error))
    except (ClusterError, RewardFailed, DriftError, LearnerLost) as error:
        err.print(f"[bold red]stopped:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    _summary(path)


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(help="Files or names.")],
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Build the network without weights; estimate memory.")
    ] = False,
) -> None:
    """Check recipes without starting anything, and print the numbers that follow from them."""
    from recipes.check import derived

    for path in recipes:
        loaded = _checked(path, overrides)
        table = Table(title=f"{path}: valid", show_header=False, title_justify="left")
        for name, value in derived(loaded.value).items():
            table.add_row(name, value)
        if plan:
            for name, value in _planned(loaded.value).items():
                table.add_row(name, value)
        out.print(table)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html."""
    from cluster.report import write_report

    try:
        path = write_report(run)
    except ValueError as error:
        _refuse(str(error))
    out.print(str(path), highlight=False, soft_wrap=True)


@app.command(name="recipes")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    from recipes.source import PACKAGED, packaged

    for name in packaged():
        first = (PACKAGED / f"{name}.yaml").read_text().splitlines()[0]
        out.print(f"{name:32} {first.lstrip('# ')}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """What this machine has, which optional parts work, and what to install for the rest."""
    facts, wrong = diagnose()
    table = Table(show_header=False)
    for name, value in facts:
        table.add_row(name, value)
    out.print(table)
    for line in wrong:
        err.print(line, highlight=False)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def schema() -> None:
    """Print the recipes' JSON schema, for an editor."""
    from recipes.schema import Recipe
    from recipes.source import editor_schema

    out.print_json(json.dumps(editor_schema(Recipe)))


def main() -> None:
    """Entry point: a recipe's mistakes are printed, not raised."""
    app()


def _checked(path: Path, overrides: list[str] | None) -> Loaded[Recipe]:
    from cluster.tracking import missing
    from recipes.check import check
    from recipes.schema import Recipe
    from recipes.source import load

    try:
        loaded = load(path, Recipe, overrides or [])
        check(loaded, gpu_count())
        absent = {kind: remedy for kind in loaded.value.tracking if (remedy := missing(kind))}
        if absent:
            raise RecipeError(
                loaded.problem("tracking", f"{kind} is not installed: {remedy}")
                for kind, remedy in absent.items()
            )
    except RecipeError as error:
        _refuse(str(error))
    return loaded


def _planned(recipe: Recipe) -> dict[str, str]:
    """Shapes and memory, as rows."""
    from recipes.memory import plan
    from recipes.shapes import shapes

    try:
        memory = plan(recipe)
        rows = shapes(recipe)
    except (ValueError, OSError) as error:
        _refuse(f"no plan: {error}")
    for process, parts in memory.items():
        rows[f"memory of a {process}"] = ", ".join(f"{k} {v}" for k, v in parts.items())
    return rows


def _refuse(message: str) -> NoReturn:
    err.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _summary(path: Path) -> None:
    from cluster.report import changes
    from cluster.tracking import MetricsFile

    rows = MetricsFile(path / "metrics.jsonl").read()
    for change in changes([row for row in rows if row["kind"] == "evaluation"]):
        line = f"{change['name']:36} {change['before']:>9.4f} -> {change['after']:>9.4f}"
        out.print(line, highlight=False)
    out.print(f"report: {path / 'report.html'}", highlight=False, soft_wrap=True)
