"""The command ``rectify``. Heavy imports happen in the verbs that need them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli_answer import answer
from cluster.cli_audit import audit
from cluster.cli_compare import compare
from cluster.cli_env import env
from cluster.cli_measure import curves, err, evaluate, out, refuse
from cluster.cli_submit import VERBS
from cluster.cli_top import top
from cluster.doctor import diagnose, gpu_count
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from recipes.schema import AnyRecipe
    from recipes.source import Loaded

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: rl.clip_range=1e-3.")
]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A file, or a name of 'recipes'.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue this run directory, or STORAGE_URL/NAME; auto: that of the recipe's name, "
            "where it was begun."
        ),
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Continue although recipe or data changed.")
    ] = False,
) -> None:
    """Train a recipe."""
    if recipe is None and resume is None:
        raise typer.BadParameter("give a RECIPE, or --resume RUN")
    if resume == "auto":
        if recipe is None:
            raise typer.BadParameter("--resume auto wants the RECIPE")
        resume = _left(_checked(recipe, overrides).value)
    if resume is not None and "://" in resume:
        loaded, continued = _stored(resume, recipe, overrides, changed)
    else:
        continued = Path(resume) if resume is not None else None
        source = recipe if recipe is not None else continued / "recipe.yaml"  # type: ignore[operator]
        loaded = _checked(source, overrides)
    from cluster.checkpoints import CheckpointError
    from cluster.disk import DiskFull
    from cluster.launch import ResumeError
    from cluster.launch import run as launch
    from cluster.learner_group import LearnerLost
    from cluster.lock import RunLocked
    from cluster.ray_cluster import ClusterError
    from cluster.storage import StorageError
    from distill.train import MismatchError
    from rewards.calling import RewardFailed
    from rl.metrics import DriftError

    try:
        path = launch(loaded.value, out, continued, changed)
    except (ResumeError, StorageError, CheckpointError, RunLocked) as error:
        refuse(str(error))
    except (ClusterError, RewardFailed, DriftError, MismatchError, LearnerLost, DiskFull) as error:
        err.print(f"[bold red]stopped:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    _summary(path)


@app.command()
def teacher(
    recipe: Annotated[Path, typer.Argument(help="A distillation recipe, or its name.")],
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples in all; default: what the run uses.")
    ] = None,
) -> None:
    """Draw a recipe's teacher samples into its store (rollout.store); goes on where it stopped."""
    loaded = _checked(recipe, overrides, filling=True)
    from cluster.ray_cluster import ClusterError
    from cluster.teacher_store import fill
    from distill.store import StoreError
    from recipes.schema import DistillRecipe

    described = loaded.value
    if not isinstance(described, DistillRecipe):
        refuse(f"{recipe}: has no 'distill:', so there is no teacher to draw from")
    if described.rollout.store is None:
        refuse(f"{recipe}: name the store: --set rollout.store=DIRECTORY")
    try:
        path = fill(described, out, samples)
    except StoreError as error:
        refuse(str(error))
    except ClusterError as error:
        err.print(f"[bold red]stopped:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    out.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(help="Files or names.")],
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Build the network without weights; estimate memory.")
    ] = False,
) -> None:
    """Check recipes without starting anything, and print the numbers that follow from them."""
    from recipes.derived import derived

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
        refuse(str(error))
    out.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a policy directory.")],
    step: Annotated[int | None, typer.Option(help="Of a run: this checkpoint.", min=0)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default the evaluation prompts.")
    ] = None,
    count: Annotated[int, typer.Option(help="Samples, prompts in turn.", min=1)] = 16,
    seed: Annotated[int | None, typer.Option(help="Default: the run's.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of text; default 0, as in evaluation.", min=0)
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A new directory; default samples, samples-2 ...")
    ] = None,
    video: Annotated[
        Literal["gif", "mp4"], typer.Option("--format", help="What videos become.")
    ] = "mp4",
) -> None:
    """Draw samples from a checkpoint and write them as files."""
    from cluster.sample import SampleError, check_output, draw, open_checkpoint, write

    try:
        check_output(to, video)
        source = open_checkpoint(checkpoint, step)
        drawn = draw(
            source, prompt or [], count=count, seed=seed, steps=steps, temperature=temperature
        )
        path = write(drawn, to, video)
    except (SampleError, RecipeError) as error:
        refuse(str(error))
    out.print(f"samples: {path}", highlight=False, soft_wrap=True)


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
        table.add_row(name, escape(value))
    out.print(table)
    for line in wrong:
        err.print(line, highlight=False)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def schema() -> None:
    """Print the recipes' JSON schema, for an editor."""
    from recipes.schema import KINDS
    from recipes.source import editor_schema

    out.print_json(json.dumps(editor_schema(KINDS)))


for verb in (answer, compare, evaluate, curves, audit, top):
    app.command()(verb)
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(env, name="env")


def main() -> None:
    """Entry point: a recipe's mistakes are printed, not raised, and so is a disk without room."""
    try:
        app()
    except Exception as error:
        from cluster.disk import is_full, no_room

        if not is_full(error):
            raise
        err.print(f"[bold red]stopped:[/] {escape(no_room(error))}", soft_wrap=True)
        raise SystemExit(1) from None


def _checked(path: Path, overrides: list[str] | None, filling: bool = False) -> Loaded[AnyRecipe]:
    from cluster.tracking import missing
    from recipes.check import check
    from recipes.schema import recipe_type
    from recipes.source import load

    try:
        loaded = load(path, recipe_type, overrides or [])
        check(loaded, gpu_count(), filling)
        absent = {kind: remedy for kind in loaded.value.tracking if (remedy := missing(kind))}
        if absent:
            raise RecipeError(
                loaded.problem("tracking", f"{kind} is not installed: {remedy}")
                for kind, remedy in absent.items()
            )
    except RecipeError as error:
        refuse(str(error))
    return loaded


def _left(recipe: AnyRecipe) -> str | None:
    from cluster.storage import StorageError, begun

    try:
        return begun(recipe)
    except StorageError as error:
        refuse(str(error))


def _stored(
    url: str, recipe: Path | None, overrides: list[str] | None, changed: bool
) -> tuple[Loaded[AnyRecipe], Path]:
    """The recipe of a run in a storage, and the run's new directory here; its copies go on there."""
    from cluster.launch import ResumeError, check_resume
    from cluster.storage import StorageError, describing, fetch_run, located

    try:
        storage, name = located(url)
        with describing(storage, name) as described:
            own = [f"checkpoints.storage={storage.url}", *(overrides or [])]
            loaded = _checked(recipe or described / "recipe.yaml", own)
            check_resume(described, loaded.value, changed)
        tell = partial(out.print, highlight=False, soft_wrap=True)
        return loaded, fetch_run(storage, name, loaded.value.run_dir / name, tell)
    except (StorageError, ResumeError) as error:
        refuse(str(error))


def _planned(recipe: AnyRecipe) -> dict[str, str]:
    """Shapes and memory, as rows."""
    from recipes.memory import plan
    from recipes.shapes import shapes

    try:
        memory = plan(recipe)
        rows = shapes(recipe)
    except (ValueError, OSError) as error:
        refuse(f"no plan: {error}")
    for process, parts in memory.items():
        rows[f"memory of a {process}"] = ", ".join(f"{k} {v}" for k, v in parts.items())
    return rows


def _summary(path: Path) -> None:
    from cluster.report import changes
    from cluster.tracking import MetricsFile

    rows = MetricsFile(path / "metrics.jsonl").read()
    for change in changes([row for row in rows if row["kind"] == "evaluation"]):
        line = f"{change['name']:36} {change['before']:>9.4f} -> {change['after']:>9.4f}"
        out.print(line, highlight=False)
    out.print(f"report: {path / 'report.html'}", highlight=False, soft_wrap=True)
