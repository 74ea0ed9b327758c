"""The verb ``rectify compare``. Heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_measure import err, refuse, show
from cluster.doctor import gpu_count
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from recipes.schema import Recipe


def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or its name.")],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Repeatable: a run, a checkpoint or a policy directory to hold against."),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            help="Repeatable: network evaluations a sample; default compare.budgets.", min=1
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Instead of compare.samples.", min=1)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of RECIPE.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Put the chart into the reports of the runs compared.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new directory; default compare, compare-2 ...")
    ] = None,
) -> None:
    """Hold a policy, and what training made of it, against inference-time alignment at equal cost."""
    from cluster.measured import MeasureError
    from cluster.ray_cluster import ClusterError
    from cluster.sample import SampleError
    from rewards.calling import RewardFailed

    try:
        checked = _recipe(recipe, overrides or [])
        from cluster.compare import settled
        from cluster.compare_report import run_comparison

        with err.status("starting Ray") as status:
            measured = run_comparison(
                settled(checked, budget or [], samples),
                checkpoint or [],
                to,
                report,
                status.update,
            )
    except (RecipeError, MeasureError, SampleError) as error:
        refuse(str(error))
    except (ClusterError, RewardFailed) as error:
        err.print(f"[bold red]stopped:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(measured)


def _recipe(path: Path, overrides: list[str]) -> Recipe:
    """A recipe that can run here.

    Raises:
        RecipeError: it is not valid, or describes a distillation.
    """
    from recipes.check import check
    from recipes.check_comparison import unreachable
    from recipes.schema import Recipe, recipe_type
    from recipes.source import load

    loaded = load(path, recipe_type, overrides)
    check(loaded, gpu_count())
    if not isinstance(loaded.value, Recipe):
        problem = loaded.problem("distill", "a distillation follows no reward; compare its student "
                                 "by --checkpoint under a recipe with rewards")  # fmt: skip
        raise RecipeError([problem])
    if problems := [loaded.problem(key, words) for key, words in unreachable(loaded.value)]:
        raise RecipeError(problems)
    return loaded.value
