"""A recipe as a RayJob of KubeRay, or as a batch script of Slurm. Nothing is started.

Sources: KubeRay's API reference of ray.io/v1 (RayJob; authOptions need KubeRay 1.5.1 or newer) and
``ray symmetric-run --help`` of Ray 2.60.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster.ray_cluster import bundles_of
from cluster.sent import VARIABLE, resolved
from cluster.submission import STOP_SECONDS
from recipes.schema import AnyRecipe

# Of a Kubernetes name: KubeRay derives longer names of services and pods from that of a RayJob.
NAME_LENGTH = 40
RECIPE_MOUNT = "/etc/rectify"
CLAIM = "rectify-runs"
SECRET = "rectify"
# What a node has beside the cores its actors declare: Ray itself, and the driver on the head.
SPARE_CPUS = 1
HEAD_CPUS, HEAD_MEMORY = 4, 16
CPU_MEMORY, GPU_MEMORY, LEAST_MEMORY = 4, 96, 16
# Ray's object store takes 30 % of a node's memory, in /dev/shm.
SHARED_MEMORY = 0.3
# Before a Slurm job's time is up: a step, an evaluation and a checkpoint.
WARNING_SECONDS = 900
RETRIES = 3  # of a job whose driver was lost, on Kubernetes


class ManifestError(ValueError):
    """The recipe does not fit nodes of this kind; says what to change."""


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike: how many, and the CPU cores and GPUs of each."""

    count: int
    cpus: int
    gpus: int

    @property
    def memory(self) -> int:
        """GiB of main memory of each, a rule of thumb."""
        return max(LEAST_MEMORY, CPU_MEMORY * self.cpus, GPU_MEMORY * self.gpus)


def nodes_for(recipe: AnyRecipe, node_gpus: int) -> Nodes:
    """As few nodes as hold all actors at once, filled first fit, those with most GPUs first.

    Raises:
        ManifestError: one actor takes more GPUs than a node has.
    """
    actors = [(bundle.get("GPU", 0.0), bundle["CPU"]) for bundle in bundles_of(recipe)[0]]
    for config in (*recipe.rewards, *recipe.evaluation.rewards):
        actors += [(config.gpus, config.cpus)] * config.replicas
    total = sum(gpus for gpus, _ in actors)
    if max(gpus for gpus, _ in actors) > node_gpus:
        raise ManifestError(
            f"an actor takes {max(actors)[0]:g} GPUs and a node has {node_gpus}: set --node-gpus, "
            "or lower workers.gpus or learner.gpus"
        )
    size = min(node_gpus, math.ceil(total))
    free: list[float] = []
    cores: list[float] = []
    for gpus, cpus in sorted(actors, reverse=True):
        place = next((i for i, left in enumerate(free) if gpus <= left + 1e-9), len(free))
        if place == len(free):
            free.append(float(size))
            cores.append(0.0)
        free[place] -= gpus
        cores[place] += cpus
    return Nodes(len(free), math.ceil(max(cores)) + SPARE_CPUS, size)


def slurm(recipe: AnyRecipe, run: str, nodes: Nodes, names: Sequence[str]) -> str:
    """A script for sbatch: the recipe within it, Ray by ``ray symmetric-run`` on whole nodes."""
    templates = Environment(
        loader=PackageLoader("cluster", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("slurm.sh.j2").render(
        run=run,
        nodes=nodes,
        names=_names(names),
        recipe=resolved(recipe),
        warning_seconds=WARNING_SECONDS,
        start_seconds=math.ceil(recipe.cluster.start_timeout),
    )


def kuberay(recipe: AnyRecipe, run: str, nodes: Nodes, names: Sequence[str], image: str) -> str:
    """A ConfigMap with the recipe and a RayJob that runs it, as YAML for ``kubectl apply -f``.

    The run directory is on the claim ``rectify-runs``, which all pods mount; variables come from the
    Secret ``rectify``, by name. The run has the id for its name: a job that failed is tried again, on a
    new cluster, and goes on with what it left.
    """
    name = kubernetes_name(run)
    labels = {"app.kubernetes.io/name": "rectify", "app.kubernetes.io/instance": name}
    document = resolved(recipe.model_copy(update={"name": name}))
    described = {"name": name, "labels": labels}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": described}
    config |= {"data": {"recipe.yaml": document}}
    image = image or f"rectify:{metadata.version('rectify')}"
    head = Nodes(1, HEAD_CPUS, 0)
    pod: dict[str, Any] = {
        "name": name,
        "names": _names(names),
        "image": image,
        "run_dir": str(recipe.run_dir),
    }
    cluster: dict[str, Any] = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # No core of the head is for actors: the driver is there.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _pod("ray-head", head, HEAD_MEMORY, **pod),
        },
        "workerGroupSpecs": [
            {
                "groupName": "actors",
                "replicas": nodes.count,
                "minReplicas": nodes.count,
                "maxReplicas": nodes.count,
                "rayStartParams": {},
                "template": _pod("ray-worker", nodes, nodes.memory, **pod),
            }
        ],
    }
    entrypoint = ["rectify", "run", f"{RECIPE_MOUNT}/recipe.yaml", "--resume", "auto"]
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": described,
        "spec": {
            "entrypoint": shlex.join(entrypoint),
            "jobId": run,
            "metadata": {"recipe": recipe.name},
            "runtimeEnvYAML": yaml.safe_dump(environment),
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster,
        },
    }
    return yaml.dump_all([config, job], Dumper=_Blocks, sort_keys=False, allow_unicode=True)


def kubernetes_name(run: str) -> str:
    """A run id as the name of an object: lower case, digits and dashes; its suffix is kept."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if len(plain) <= NAME_LENGTH:
        return plain
    start, _, suffix = plain.rpartition("-")
    return f"{start[: NAME_LENGTH - len(suffix) - 1].rstrip('-')}-{suffix}"[-NAME_LENGTH:].strip(
        "-"
    )


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as a block, to be read."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A string."""
        style = "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        """Parts that are the same object are written out each time."""
        return True


_Blocks.add_representer(str, _Blocks.represent_str)


def _pod(
    container: str,
    nodes: Nodes,
    memory: int,
    *,
    name: str,
    names: Sequence[str],
    image: str,
    run_dir: str,
) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(nodes.cpus), "memory": f"{memory}Gi"}
    if nodes.gpus:
        resources["nvidia.com/gpu"] = str(nodes.gpus)
    secrets = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}} for key in names
    ]
    shared = {"medium": "Memory", "sizeLimit": f"{math.ceil(SHARED_MEMORY * memory)}Gi"}
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "env": secrets,
                    "resources": {"requests": resources, "limits": resources},
                    "volumeMounts": [
                        {"name": "recipe", "mountPath": RECIPE_MOUNT, "readOnly": True},
                        {"name": "runs", "mountPath": run_dir},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "recipe", "configMap": {"name": name}},
                {"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}},
                {"name": "shm", "emptyDir": shared},
            ],
        }
    }


def _names(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if not VARIABLE.fullmatch(name):
            raise ManifestError(f"--env {name.partition('=')[0]}: give the name alone")
    return names
