"""The verbs ``rectify env``: environments of rewards that need libraries of their own."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from cluster.cli_measure import err, out, refuse
from rewards import environment
from rewards.environment import EnvironmentFailed

env = typer.Typer(
    no_args_is_help=True, help="Environments of rewards that need libraries of their own."
)

Name = Annotated[str, typer.Argument(help="An environment of 'rectify env list'.")]


@env.command()
def create(name: Name) -> None:
    """Make an environment with pip, anew where it is outdated; minutes, and gigabytes."""
    try:
        with err.status(f"making {name}") as status:
            python = environment.create(name, status.update)
    except ValueError as error:
        refuse(str(error))
    except EnvironmentFailed as error:
        err.print(f"stopped: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    out.print(f"{name} is ready: {python}", highlight=False, soft_wrap=True)


@env.command(name="list")
def show() -> None:
    """What environments there are, and which of them are here."""
    table = Table("name", "state", "size")
    table.add_column("python", overflow="fold")
    for name in environment.names():
        state = environment.state(name)
        here = state != "absent"
        size = f"{environment.size(name) / 2**30:.1f} GiB" if here else "-"
        place = environment.place_of(name) / "bin" / "python"
        table.add_row(name, state, size, str(place) if here else "-")
    out.print(table)


@env.command()
def remove(name: Name) -> None:
    """Delete an environment."""
    try:
        if not environment.remove(name):
            refuse(f"there is no environment {name!r} here; nothing to remove")
    except (ValueError, EnvironmentFailed) as error:
        refuse(str(error))
    out.print(f"{name} is removed", highlight=False, soft_wrap=True)
