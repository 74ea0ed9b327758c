"""What a submitted job is made of: a recipe, resolved and in full, variables, a working directory.

What ``cluster.submitted`` does with it there. Ray shows a job's runtime environment, with the values
of its variables, to whoever asks for the job: forwarded ones travel in a file instead.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import submitted
from cluster.ray_cluster import bundles_of
from cluster.submission import STOP_SECONDS, Cluster, SubmissionError
from cluster.submitted import PACKAGE, RECIPE, VARIABLES
from cluster.upload import check_size
from recipes.derived import needed
from recipes.schema import AnyRecipe

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Sent:
    """What a job is made of.

    Attributes:
        run: its id. recipe: with ``cluster.address: auto``. variables: forwarded, by name.
        working_dir: uploaded; None takes the package that is installed there.
        resume: a run directory on the cluster, or a run's URL, to continue. python: its interpreter there.
    """

    run: str
    recipe: AnyRecipe
    variables: dict[str, str]
    working_dir: Path | None
    resume: str | None
    python: str


def send(cluster: Cluster, sent: Sent) -> None:
    """Upload and start.

    Raises:
        SubmissionError: the cluster has too little for it as it is now, or the directory is too
            large, or the cluster refuses.
    """
    directory = sent.working_dir
    problem = misfit(sent.recipe, cluster.nodes())
    problem = problem or (check_size(directory) if directory is not None else None)
    if problem is not None:
        raise SubmissionError(problem)
    with tempfile.TemporaryDirectory() as scratch:
        environment = runtime_environment(sent, stage(Path(scratch), sent))
        cluster.submit(sent.run, sent.recipe.name, entrypoint(sent), environment)


def misfit(recipe: AnyRecipe, nodes: Sequence[dict[str, float]]) -> str | None:
    """What nodes with these resources lack for a recipe, and what to do."""
    for key, kind in (("CPU", "cpus"), ("GPU", "gpus")):
        need, have = needed(recipe, kind), sum(node.get(key, 0) for node in nodes)
        if need > have:
            return (
                f"the recipe needs {need:g} {key} and the cluster has {have:g}: lower workers.count "
                f"or learner.ranks, their {kind}, or set cluster.colocated: true"
            )
    for bundle in bundles_of(recipe)[0]:
        if not any(all(node.get(k, 0) >= v for k, v in bundle.items()) for node in nodes):
            wanted = " and ".join(f"{value:g} {key}" for key, value in bundle.items())
            return f"an actor needs {wanted} on one node, and no node has that much"
    return None


def variables(names: Sequence[str]) -> dict[str, str]:
    """The values of variables here.

    Raises:
        SubmissionError: one is not set, or is no name.
    """
    for name in names:
        if not VARIABLE.fullmatch(name):
            raise SubmissionError(
                f"--env {name.partition('=')[0]}: give the name alone; its value is taken from here"
            )
        if name not in os.environ:
            raise SubmissionError(f"--env {name}: is not set here; export it, or leave it out")
    return {name: os.environ[name] for name in names}


def stage(scratch: Path, sent: Sent) -> Path:
    """Write the package that travels; only the owner may read the variables."""
    package = scratch / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(submitted.__file__, package / "__main__.py")
    (package / RECIPE).write_text(resolved(sent.recipe), encoding="utf-8")
    if sent.variables:
        file = package / VARIABLES
        file.touch(mode=0o600)
        file.write_text(json.dumps(sent.variables), encoding="utf-8")
    return package


def resolved(recipe: AnyRecipe) -> str:
    """The whole recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def entrypoint(sent: Sent) -> str:
    """The shell command of a job; exec, so that a stop reaches the driver itself."""
    resume = ["--resume", sent.resume] if sent.resume is not None else []
    return "exec " + shlex.join([sent.python, "-m", PACKAGE, *resume])


def runtime_environment(sent: Sent, package: Path) -> dict[str, Any]:
    """Ray's runtime environment of a job."""
    environment: dict[str, Any] = {
        "py_modules": [str(package)],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    if sent.variables:
        environment["worker_process_setup_hook"] = f"{PACKAGE}.__main__.take_variables"
    if sent.working_dir is not None:
        environment["working_dir"] = str(sent.working_dir)
    return environment
