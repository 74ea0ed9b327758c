"""What is printed for KubeRay and for Slurm: complete, sized by the recipe, and without a secret."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
from typer.testing import CliRunner

from cluster.cli import app
from cluster.manifests import ManifestError, Nodes, kubernetes_name, nodes_for
from recipes.derived import needed
from recipes.schema import AnyRecipe, Recipe, recipe_type
from recipes.source import load, packaged

ROOT = Path(__file__).parents[2]
# ray.io/v1, from KubeRay's API reference: RayJobSpec, RayClusterSpec and the two kinds of groups.
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
    "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER_FIELDS = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
    "headGroupSpec", "headServiceAnnotations", "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
GROUP_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams",
    "template",
}  # fmt: skip
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["submit", *arguments, "--set", "run_dir=/shared/runs"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def rayjob(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, job = yaml.safe_load_all(printed(*arguments, "--kuberay"))
    return config, job


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_a_rayjob_has_what_kuberay_asks_for_and_no_field_it_does_not_know(tmp_path: Path):
    config, job = rayjob("digits/flash_grpo", "--id", "Digits_1.a", "--image", "registry/rectify:1")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (config["apiVersion"], config["kind"]) == ("v1", "ConfigMap")
    assert job["metadata"]["name"] == config["metadata"]["name"] == "digits-1-a"
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= JOB_FIELDS and set(cluster) <= CLUSTER_FIELDS
    assert cluster["authOptions"] == {"mode": "token"}
    assert {"rayStartParams", "template"} == set(cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS and DNS_LABEL.fullmatch(group["groupName"])
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == 1
    for values in (cluster["headGroupSpec"]["rayStartParams"], spec["metadata"]):
        assert all(isinstance(value, str) for value in values.values())
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["image"] == "registry/rectify:1"
        assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
        mounts = {v["mountPath"]: v["name"] for v in container["volumeMounts"]}
        assert mounts["/shared/runs"] == "runs" and mounts["/dev/shm"] == "shm"
        assert all(isinstance(v, str) for v in container["resources"]["limits"].values())
    # The submission id and the metadata are what 'rectify status' and 'rectify list' go by.
    assert (spec["jobId"], spec["metadata"]) == ("Digits_1.a", {"recipe": "digits-flash-grpo"})
    seconds = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(seconds) >= 600

    # A retry goes on with the run of this job's own name.
    assert spec["backoffLimit"] == 3
    verb, action, path, *resumed = shlex.split(spec["entrypoint"])
    assert resumed == ["--resume", "auto"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config["data"][Path(path).name])
    checked = CliRunner().invoke(app, ["validate", str(recipe)])
    assert (verb, action, checked.exit_code) == ("rectify", "run", 0), checked.stderr
    assert load(recipe, Recipe).value.cluster.address == "auto"
    assert load(recipe, Recipe).value.name == config["metadata"]["name"]
    assert path in {f"{v['mountPath']}/recipe.yaml" for v in container["volumeMounts"]}


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hidden-value")
    forwarded = ["digits/flash_grpo", "--env", "HF_TOKEN"]
    _, job = rayjob(*forwarded)
    expected = {"secretKeyRef": {"name": "rectify", "key": "HF_TOKEN"}}
    for pod in pods(job):
        assert pod["containers"][0]["env"] == [{"name": "HF_TOKEN", "valueFrom": expected}]
    script = printed(*forwarded, "--slurm")
    assert '"${HF_TOKEN:?export HF_TOKEN before sbatch}"' in script
    assert "hidden-value" not in json.dumps(job) + script


def test_nodes_hold_all_actors_of_every_recipe():
    """Every packaged recipe on nodes of 8 GPUs: enough in all, and no more than one node too many."""
    names = packaged()
    assert len(names) > 20
    for name in names:
        recipe: AnyRecipe = load(Path(name), recipe_type, []).value
        nodes, gpus = nodes_for(recipe, 8), needed(recipe, "gpus")
        assert nodes.count * nodes.gpus >= gpus, name
        assert nodes.count * nodes.cpus >= needed(recipe, "cpus"), name
        assert (nodes.count - 1) * 8 < max(gpus, 1), name


def test_actors_that_do_not_divide_a_node_take_more_of_them():
    """Three workers of 3 GPUs and a rank of 2 on nodes of 4: 3 | 3 | 3 | 2."""
    sets = ["workers={count: 3, gpus: 3, cpus: 2}", "learner={ranks: 1, gpus: 2, cpus: 7}",
            "cluster.colocated=false"]  # fmt: skip
    recipe = load(Path("digits/flash_grpo"), Recipe, sets).value
    assert nodes_for(recipe, 4) == Nodes(4, 8, 4)
    assert nodes_for(recipe, 8) == Nodes(2, 12, 8)
    with pytest.raises(ManifestError, match="takes 3 GPUs and a node has 2"):
        nodes_for(recipe, 2)
    cpu = nodes_for(load(Path("digits/flash_grpo"), Recipe, []).value, 8)
    assert cpu == Nodes(1, 3, 0)
    _, job = rayjob("wan-1.3b/flash_grpo_ocr_96gpu")
    limits = pods(job)[1]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 12


def test_a_name_fits_what_kuberay_derives_from_it():
    long = kubernetes_name("a_Very.Long" * 9 + "-0f3a9c")
    assert len(long) <= 47 - 6 and DNS_LABEL.fullmatch(long) and long.endswith("-0f3a9c")
    assert kubernetes_name("digits-flash-grpo-0f3a9c") == "digits-flash-grpo-0f3a9c"


FAKES = {
    "scontrol": "printf 'node-a\\nnode-b\\n'",
    "hostname": "echo '10.0.0.7 10.0.0.8'",
    # Options end where the command begins.
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "ray": 'printf "%s\\n" "$@" > "$SPOOL/ray"; env > "$SPOOL/env"; '
    'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
}
RECTIFY = """
import os, signal, shutil, sys, time
spool = os.environ["SPOOL"]
shutil.copy(sys.argv[2], f"{spool}/recipe.yaml")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
open(f"{spool}/ready", "w").close()
while not stopped:
    time.sleep(0.05)
sys.exit(7)
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """Slurm's and Ray's commands, which note what they are told, and a run that waits for a stop."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "spool").mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
    (programs / "rectify").write_text(f"#!{sys.executable}\n{RECTIFY}")
    for program in programs.iterdir():
        program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node-[a-b]"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "SPOOL": str(tmp_path / "spool")}
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | slurm | path


def test_a_batch_script_starts_ray_as_it_wants_and_passes_a_stop_on(
    allocation: dict[str, str], tmp_path: Path
):
    """Slurm's warning is SIGUSR1: the driver ends after its step, its status is the job's."""
    script = tmp_path / "job.sh"
    text = printed("digits/flash_grpo", "--slurm", "--set", "workers={count: 12, gpus: 1}")
    script.write_text(text)
    spool = tmp_path / "spool"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options | {"nodes": "2", "gpus-per-node": "8", "exclusive": ""} == options
    assert options["signal"].startswith("B:USR1@")
    process = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=allocation)
    deadline = time.monotonic() + 60
    while not (spool / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 7
    assert list(tmp_path.glob(".rectify-*")) == []

    verb, *arguments = (spool / "ray").read_text().splitlines()
    before = arguments[: arguments.index("--")]
    assert verb == "symmetric-run"
    assert before[:4] == ["--address", "10.0.0.7:6379", "--min-nodes", "2"]
    started = curate_and_validate_ray_start_args(before)
    assert started == [f"--num-cpus={options['cpus-per-task']}", "--num-gpus=8"]
    environment = dict(line.split("=", 1) for line in (spool / "env").read_text().splitlines()
                       if "=" in line)  # fmt: skip
    assert environment["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    assert environment["RAY_AUTH_TOKEN"] not in text
    assert load(spool / "recipe.yaml", Recipe).value.workers.count == 12


def test_a_ray_that_does_not_start_fails_the_batch_job(allocation: dict[str, str], tmp_path: Path):
    """ray symmetric-run itself ends with status 0 then."""
    (tmp_path / "bin" / "ray").write_text("#!/bin/bash\nexit 0\n")
    script = tmp_path / "job.sh"
    script.write_text(printed("digits/flash_grpo", "--slurm"))
    result = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=allocation, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "the run did not start" in result.stderr


def test_the_image_is_built_from_the_constraints_and_runs_the_command():
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    body = "\n".join(lines)
    assert "ARG BASE=" in body and "FROM ${BASE}" in body
    assert "-c constraints.txt" in body and '"$(head -n 1 constraints.txt)"' in body
    assert (ROOT / "constraints.txt").read_text().startswith("torch==")
    assert 'CMD ["rectify", "--help"]' in body
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    copied = re.findall(r"^COPY (.+) \S+$", body, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and name not in ignored, name
