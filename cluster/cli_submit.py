"""The verbs of ``rectify`` for clusters elsewhere. Heavy imports happen in the verbs that need them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli_measure import err, out, refuse
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from cluster.submission import Cluster, Job
    from recipes.schema import AnyRecipe
    from recipes.source import Loaded

Address = Annotated[
    str | None,
    typer.Option(help="The head's dashboard, http://HEAD:8265; default RAY_API_SERVER_ADDRESS."),
]
Run = Annotated[str, typer.Argument(help="A run id of 'rectify submit' or 'rectify list'.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: rl.clip_range=1e-3.")
]
Names = Annotated[
    list[str] | None,
    typer.Option("--env", help="Repeatable: forward this variable of here, by its name."),
]
WorkingDir = Annotated[
    Path, typer.Option(help="Upload this directory, less what .gitignore and .rayignore name.")
]
Installed = Annotated[
    bool, typer.Option("--installed", help="Upload nothing; run what is installed there.")
]
Resume = Annotated[
    str | None,
    typer.Option(help="Continue this run directory of the cluster, or STORAGE_URL/NAME."),
]
RunId = Annotated[
    str | None,
    typer.Option("--id", help="The run id; default the recipe's name and a suffix."),
]
KubeRay = Annotated[
    bool, typer.Option("--kuberay", help="Submit nothing; print a RayJob for kubectl apply.")
]
Slurm = Annotated[bool, typer.Option("--slurm", help="Submit nothing; print a script for sbatch.")]
NodeGpus = Annotated[int, typer.Option(help="For --kuberay, --slurm: GPUs of a node.", min=1)]
Image = Annotated[str | None, typer.Option(help="For --kuberay: an image of the Dockerfile.")]


def submit(
    recipe: Annotated[Path, typer.Argument(help="A file, or a name of 'recipes'.")],
    overrides: Overrides = None,
    address: Address = None,
    names: Names = None,
    working_dir: WorkingDir = Path("."),
    installed: Installed = False,
    python: Annotated[str, typer.Option(help="The interpreter on the head.")] = "python",
    resume: Resume = None,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Show what it prints.")] = True,
    run: RunId = None,
    kuberay: KubeRay = False,
    slurm: Slurm = False,
    node_gpus: NodeGpus = 8,
    image: Image = None,
) -> None:
    """Start a run on a Ray cluster, or print what starts it under KubeRay or Slurm."""
    if kuberay and slurm:
        raise typer.BadParameter("give --kuberay or --slurm")
    loaded = _resolved(recipe, overrides)
    run = run or f"{loaded.value.name}-{secrets.token_hex(3)}"
    if slurm or kuberay:
        _print_text(loaded, run, names or [], node_gpus, None if slurm else image or "")
        return
    from cluster.sent import Sent, send, variables
    from cluster.submission import Cluster, SubmissionError

    _check_directory(loaded)
    try:
        forwarded = variables(names or [])
        cluster = Cluster(address)
        directory = None if installed else working_dir
        with err.status("uploading"):
            send(cluster, Sent(run, loaded.value, forwarded, directory, resume, python))
    except SubmissionError as error:
        refuse(str(error))
    out.print(run, highlight=False, soft_wrap=True)
    if follow:
        _follow(cluster, run)
    _say_how_to_attach(cluster, run)


def logs(
    run: Run,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the run ends.")] = False,
) -> None:
    """What a submitted run has printed."""
    from cluster.submission import Cluster, SubmissionError

    try:
        cluster = Cluster(address)
        if not follow:
            _write(cluster.logs(run))
            return
    except SubmissionError as error:
        refuse(str(error))
    _follow(cluster, run)


def status(run: Run, address: Address = None) -> None:
    """How a submitted run is doing; exit status 1 where it failed or was stopped."""
    from cluster.submission import Cluster, SubmissionError, last_metrics, run_directory

    try:
        cluster = Cluster(address)
        job, printed = cluster.job(run), cluster.logs(run)
    except SubmissionError as error:
        refuse(str(error))
    rows = {
        "run": job.id,
        "recipe": job.recipe,
        "status": _said(job),
        "started": f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else "-",
        "ended": f"{job.ended:%Y-%m-%d %H:%M:%S}" if job.ended else "-",
        "run directory": run_directory(printed) or "-",
        "last": last_metrics(printed) or "-",
    }
    for name, value in rows.items():
        out.print(f"{name:14} {value}", highlight=False, markup=False, soft_wrap=True)
    if job.failed:
        raise typer.Exit(1)


def stop(run: Run, address: Address = None) -> None:
    """End a submitted run after its step, with a checkpoint; waits until it has ended."""
    from cluster.submission import Cluster, SubmissionError, run_directory

    try:
        cluster = Cluster(address)
        if cluster.job(run).finished:
            refuse(f"{run} has ended already")
        with err.status(f"stopping {run} after its step"):
            job = cluster.stop(run)
        directory = run_directory(cluster.logs(run))
    except SubmissionError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        err.print(f"{run} goes on stopping", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    said = f"{run}: {job.status.value.lower()}"
    out.print(said + (f"; {directory}" if directory else ""), highlight=False, soft_wrap=True)


def list_runs(address: Address = None) -> None:
    """The runs that were submitted to a cluster, newest first."""
    from cluster.submission import Cluster, SubmissionError

    try:
        jobs = Cluster(address).jobs()
    except SubmissionError as error:
        refuse(str(error))
    table = Table()
    for name in ("run", "recipe", "status", "started"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        started = f"{job.started:%Y-%m-%d %H:%M}" if job.started else "-"
        table.add_row(escape(job.id), escape(job.recipe), job.status.value.lower(), started)
    out.print(table)


VERBS = {"submit": submit, "status": status, "logs": logs, "stop": stop, "list": list_runs}


def _resolved(path: Path, overrides: list[str] | None) -> Loaded[AnyRecipe]:
    """A recipe to run elsewhere: what is missing on this machine only is said, not refused."""
    from recipes.check import check
    from recipes.schema import recipe_type
    from recipes.source import load

    try:
        loaded = load(path, recipe_type, [*(overrides or []), "cluster.address=auto"])
    except RecipeError as error:
        refuse(str(error))
    recipe = loaded.value
    rewards = [*recipe.rewards, *recipe.evaluation.rewards]
    try:
        check(loaded, 0, filling=True)
    except RecipeError as error:
        here = {config.problem() for config in rewards}
        notes = [p for p in error.problems if p.message in here or _elsewhere(loaded, p.key)]
        if len(notes) < len(error.problems):
            refuse("\n".join(str(p) for p in error.problems if p not in notes))
        for problem in notes:
            line = f"on this machine, the cluster looks again: {problem}"
            err.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return loaded


def _elsewhere(loaded: Loaded[AnyRecipe], key: str) -> bool:
    """Whether a value is an absolute path that is not on this machine, but may be on others."""
    value: Any = loaded.resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, str) and Path(value).is_absolute() and not Path(value).exists()


def _check_directory(loaded: Loaded[AnyRecipe]) -> None:
    """Ray deletes the directory that a job starts in; a run must write elsewhere."""
    if not loaded.value.run_dir.is_absolute():
        problem = loaded.problem(
            "run_dir",
            f"{loaded.value.run_dir} would lie in a directory of Ray's that is deleted; give one "
            "that all nodes share: --set run_dir=/shared/runs",
        )
        refuse(str(problem))


def _print_text(
    loaded: Loaded[AnyRecipe], run: str, names: list[str], node_gpus: int, image: str | None
) -> None:
    """A RayJob where there is an ``image`` ("" for the default), else a script for Slurm."""
    from cluster.manifests import ManifestError, kuberay, nodes_for, slurm

    try:
        nodes = nodes_for(loaded.value, node_gpus)
        if image is None:
            text = slurm(loaded.value, run, nodes, names)
        else:
            _check_directory(loaded)
            text = kuberay(loaded.value, run, nodes, names, image)
    except ManifestError as error:
        refuse(str(error))
    out.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def _said(job: Job) -> str:
    """The status, and why where Ray says more than that."""
    word = job.status.value.lower()
    return f"{word} ({job.message})" if word == "failed" and job.message else word


def _write(text: str) -> None:
    out.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def _follow(cluster: Cluster, run: str) -> NoReturn:
    """Until it ends; Ctrl-C leaves it running."""
    from cluster.submission import SubmissionError

    try:
        job: Job = cluster.follow(run, _write)
    except KeyboardInterrupt:
        _say_how_to_attach(cluster, run)
        raise typer.Exit(0) from None
    except SubmissionError as error:
        refuse(str(error))
    style = "red" if job.failed else "green"
    err.print(f"{run}: {_said(job)}", style=style, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1 if job.failed else 0)


def _say_how_to_attach(cluster: Cluster, run: str) -> None:
    line = f"it goes on; to attach: rectify logs {run} --follow --address {cluster.address}"
    err.print(line, highlight=False, soft_wrap=True)
