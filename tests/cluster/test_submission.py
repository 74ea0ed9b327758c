"""Submitting to a real Ray cluster of two nodes with token authentication, as a user does it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import yaml
from typer.testing import CliRunner

from cluster import submission
from cluster.cli import app
from cluster.sent import Sent, entrypoint, misfit, runtime_environment, stage, variables
from cluster.submission import SubmissionError, last_metrics, run_directory
from cluster.upload import check_size
from recipes.schema import Recipe
from recipes.source import load
from tests.chaos.arena import arena, wait_for

SMALL = [
    "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.batch_size=8",
    "rollout.steps=4", "learner.micro_batch=4", "learner.ranks=1", "workers.count=1",
    "evaluation.samples=4", "checkpoints={every: 900}", "tracking=[]", "cluster.colocated=false",
]  # fmt: skip
TINY = [*SMALL, "steps=2", "evaluation.every=2", "evaluation.rewards=[]"]
REWARD = """
import os

def length(completions, **columns):
    return [float(len(os.environ["RECTIFY_TEST_SECRET"]))] * len(completions)
"""
SECRET = "open-sesame-" + secrets.token_hex(8)
LONG = 240  # seconds; others may keep this machine busy


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cluster.cli import main; main()", *arguments]


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@dataclass
class Head:
    """The cluster: its dashboard, the environment that reaches it, where Ray writes."""

    url: str
    environment: dict[str, str]
    scratch: Path

    def rectify(self, *arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments, "--address", self.url),
            capture_output=True, text=True, cwd=cwd, timeout=LONG,
            env=self.environment | extra,
        )  # fmt: skip

    def start(self, log: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments, "--address", self.url),
            stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, cwd=cwd,
            env=self.environment, start_new_session=True,
        )  # fmt: skip

    def ask(self, path: str) -> Any:
        token = self.environment["RAY_AUTH_TOKEN"]
        answer = requests.get(
            f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=60
        )
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with arena(tuned={}) as cluster:
        yield Head(cluster.dashboard, cluster.environment, cluster.scratch)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a reward of its own, and much that is ignored."""
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "my_reward.py").write_text(REWARD)
    (directory / ".rayignore").write_text("*.bin\n")
    with (directory / "huge.bin").open("wb") as file:
        file.truncate(2**30)
    return directory


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def traces(directory: Path, text: str) -> set[str]:
    """Names of the files below that hold ``text``."""
    return {
        path.name
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    }


@pytest.mark.slow
def test_a_run_is_followed_to_its_end_and_shows_no_secret(head: Head, work: Path, tmp_path: Path):
    """Its two actors need both nodes; its reward is a file of here and needs the variable."""
    arguments = [
        "submit", "digits/flash_grpo", "--id", "followed", "--env", "RECTIFY_TEST_SECRET",
        *sets(*TINY, f"run_dir={tmp_path / 'runs'}",
              "evaluation.rewards=[{kind: function, path: 'my_reward:length', name: length}]"),
    ]  # fmt: skip
    done = head.rectify(*arguments, cwd=work, RECTIFY_TEST_SECRET=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "followed"
    assert "step 2/2" in done.stdout and "followed: succeeded" in done.stderr

    run = tmp_path / "runs" / "digits-flash-grpo"
    assert [row["step"] for row in rows(run, "train")] == [1, 2]
    lengths = {row["evaluation/length/mean"] for row in rows(run, "evaluation")}
    assert lengths == {float(len(SECRET))}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["cluster"]["address"] == "auto"

    told = json.dumps(head.ask("/api/jobs/")) + head.rectify("logs", "followed", cwd=work).stdout
    assert "followed" in told and "step 2/2" in told
    assert SECRET not in told + done.stdout + done.stderr
    assert traces(run, SECRET) == set()
    assert traces(head.scratch, SECRET) == {"variables.json"}
    (kept,) = {p.stat().st_mode & 0o777 for p in head.scratch.rglob("variables.json")}
    assert kept == stat.S_IRUSR | stat.S_IWUSR

    status = head.rectify("status", "followed", cwd=work)
    assert status.returncode == 0
    for words in ("succeeded", "digits-flash-grpo", str(run), "evaluation at step 2"):
        assert words in status.stdout
    again = head.rectify(*arguments, cwd=work, RECTIFY_TEST_SECRET=SECRET)
    assert again.returncode == 2
    assert "there is a job followed" in again.stderr and "another --id" in again.stderr


@pytest.mark.slow
def test_it_goes_on_without_its_submitter_and_stops_with_a_checkpoint(
    head: Head, work: Path, tmp_path: Path
):
    log, attached = tmp_path / "submit.txt", tmp_path / "attached.txt"
    overrides = [*SMALL, "steps=900", "evaluation={every: 900, samples: 4, rewards: []}"]
    where = f"run_dir={tmp_path / 'runs'}"
    submitter = head.start(
        log, "submit", "digits/flash_grpo", "--installed", "--id", "long",
        *sets(*overrides, where, "checkpoints={every: 900, keep_last: 1}"), cwd=work,
    )  # fmt: skip
    wait_for(lambda: "/900" in log.read_text() or submitter.poll() is not None)
    os.kill(submitter.pid, signal.SIGINT)
    assert submitter.wait(60) == 0, log.read_text()
    attach = f"it goes on; to attach: rectify logs long --follow --address {head.url}"
    assert log.read_text().splitlines()[-1] == attach

    run = tmp_path / "runs" / "digits-flash-grpo"
    follower = head.start(attached, "logs", "long", "--follow", cwd=work)
    seen = len(rows(run, "train"))
    wait_for(lambda: len(rows(run, "train")) > seen)
    status = head.rectify("status", "long", cwd=work)
    assert status.returncode == 0 and "running" in status.stdout

    stopped = head.rectify("stop", "long", cwd=work)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"long: stopped; {run}\n"
    last = rows(run, "train")[-1]["step"]
    assert seen < last < 900
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{last:06d}"]
    assert follower.wait(LONG) == 1
    assert "step " in attached.read_text() and "long: stopped" in attached.read_text()
    assert head.rectify("status", "long", cwd=work).returncode == 1
    assert "ended already" in head.rectify("stop", "long", cwd=work).stderr

    resumed = head.rectify(
        "submit", "digits/flash_grpo", "--installed", "--resume", str(run),
        *sets(*overrides, where, f"steps={last + 1}"), cwd=work,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stdout
    assert f"continuing after step {last}" in resumed.stdout
    assert [row["step"] for row in rows(run, "train")] == list(range(1, last + 2))


@pytest.mark.slow
def test_what_the_cluster_refuses_is_one_message(head: Head, work: Path, tmp_path: Path):
    here = sets(*TINY, f"run_dir={tmp_path / 'runs'}")
    cases = [
        (["list"], {"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        (["list"], {"RAY_AUTH_MODE": "disabled"}, "Set RAY_AUTH_MODE=token"),
        (["status", "nobody"], {}, "there is no job nobody"),
        (["logs", "nobody", "--follow"], {}, "'rectify list' shows"),
        (["submit", "digits/flash_grpo", *here, "--set", "workers.gpus=1"], {}, "needs 1 GPU"),
        (["submit", "digits/flash_grpo", *here, "--set", "workers.count=2"], {}, "needs 3 CPU"),
    ]
    for arguments, changed, words in cases:
        result = head.rectify(*arguments, cwd=work, **changed)
        assert (result.returncode, result.stdout) == (2, ""), arguments
        assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_detached_run_is_listed_and_a_broken_one_fails(head: Head, work: Path, tmp_path: Path):
    sent = head.rectify(
        "submit", "digits/flash_grpo", "--detach", "--installed",
        *sets(*TINY, f"run_dir={tmp_path / 'runs'}", "policy.checkpoint=/nowhere"), cwd=work,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert "on this machine, the cluster looks again" in sent.stderr and "/nowhere" in sent.stderr
    name, suffix = sent.stdout.strip().rsplit("-", 1)
    assert name == "digits-flash-grpo" and len(suffix) == 6
    listed = head.rectify("list", cwd=work).stdout
    assert f"{name}-{suffix}" in listed
    followed = head.rectify("logs", f"{name}-{suffix}", "--follow", cwd=work)
    assert followed.returncode == 1
    assert "/nowhere" in followed.stdout
    why = "failed (Job entrypoint command failed with exit code 2)"
    assert f"{name}-{suffix}: {why}" in followed.stderr
    status = head.rectify("status", f"{name}-{suffix}", cwd=work)
    assert status.returncode == 1 and why in status.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "run_dir=runs"], "run_dir=/shared/runs"),
        (["--env", "RECTIFY_ABSENT"], "--env RECTIFY_ABSENT: is not set here"),
        (["--env", "KEY=hidden"], "--env KEY: give the name alone"),
        ([], "which cluster? give --address"),
        (["--address", "ray://head:10001"], "is no dashboard"),
        (["--address", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        (["--set", "rl.clip_rang=1"], "did you mean 'clip_range'"),
        (["--set", "policy.checkpoint=nowhere"], "nowhere has no transformer/config.json"),
        (["--slurm", "--set", "workers.gpus=9"], "an actor takes 9 GPUs and a node has 8"),
        (["--kuberay", "--set", "run_dir=runs"], "run_dir=/shared/runs"),
    ],
)
def test_bad_input_is_one_message_before_anything_is_sent(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    submit = ["submit", "digits/flash_grpo", "--set", "run_dir=/shared/runs"]
    result = CliRunner().invoke(app, [*submit, *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert "hidden" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_falls_silent_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Head(BaseHTTPRequestHandler):
        """Tells its version and then nothing."""

        def do_GET(self) -> None:
            if self.path == "/api/version":
                answer = json.dumps({"version": "4", "ray_version": ray.__version__}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
            else:
                silent.wait(60)

        def log_message(self, format: str, *args: object) -> None:
            pass

    silent = threading.Event()
    monkeypatch.setattr(submission, "SILENCE_SECONDS", 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        result = CliRunner().invoke(app, ["status", "digits-1", "--address", address])
        silent.set()
        server.shutdown()
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"no answer from {address} (ReadTimeout)" in result.stderr


@pytest.fixture
def recipe() -> Recipe:
    return load(Path("digits/flash_grpo"), Recipe, [*SMALL, "cluster.address=auto"]).value


def test_the_recipe_travels_whole_and_variables_in_a_file_of_their_own(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RECTIFY_TEST_SECRET", SECRET)
    values = variables(["RECTIFY_TEST_SECRET"])
    sent = Sent("one", recipe, values, tmp_path, "/runs/a b", "python3")
    package = stage(tmp_path, sent)
    assert load(package / "recipe.yaml", Recipe).value == recipe
    assert traces(package, SECRET) == {"variables.json"}
    assert (package / "variables.json").stat().st_mode & 0o777 == 0o600
    assert SECRET not in json.dumps(runtime_environment(sent, package))
    assert entrypoint(sent) == "exec python3 -m rectify_submitted --resume '/runs/a b'"
    # A worker without the platform: Python's own library and the package.
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "from rectify_submitted.__main__ import take_variables; take_variables();"
        "print(os.environ['RECTIFY_TEST_SECRET'])"
    )
    bare = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    worker = subprocess.run(bare, capture_output=True, text=True, env={})
    assert worker.stdout == f"{SECRET}\n", worker.stderr
    with pytest.raises(SubmissionError, match="RECTIFY_ABSENT: is not set here"):
        variables(["RECTIFY_TEST_SECRET", "RECTIFY_ABSENT"])


def test_the_upload_is_counted_as_ray_packs_it(work: Path):
    (work / ".venv").mkdir()
    shutil.copy(work / "my_reward.py", work / ".venv")
    assert check_size(work) is None
    (work / ".rayignore").unlink()
    problem = check_size(work)
    assert problem is not None
    assert "1024 MiB in 2 files" in problem and "huge.bin (1024 MiB)" in problem
    assert ".rayignore" in problem
    (work / ".gitignore").write_text("huge.*\n")
    assert check_size(work) is None
    assert "no such directory" in (check_size(work / "absent") or "")


def test_a_recipe_fits_a_cluster_as_a_whole_and_by_the_node(recipe: Recipe):
    """One worker and one rank, a core each."""
    assert misfit(recipe, [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 8.0}]) is None
    assert "needs 2 CPU and the cluster has 1" in (misfit(recipe, [{"CPU": 1.0}]) or "")
    wide = load(Path("digits/flash_grpo"), Recipe, [*SMALL, "workers.cpus=3"]).value
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert misfit(wide, nodes) == "an actor needs 3 CPU on one node, and no node has that much"
    gpus = load(Path("digits/flash_grpo"), Recipe, [*SMALL, "workers.gpus=1"]).value
    assert "needs 1 GPU and the cluster has 0" in (misfit(gpus, nodes) or "")


def test_the_newest_numbers_are_read_from_what_a_run_prints():
    printed = (
        "starting Ray (auto); run directory /shared/runs/a-2\n"
        "evaluation at step 0: ink 0.1\nstep 1/9  ink 0.2\nstep 2/9  ink 0.3  | 1 s\nother\n"
    )
    assert run_directory(printed) == "/shared/runs/a-2"
    assert last_metrics(printed) == "step 2/9  ink 0.3  | 1 s"
    assert (run_directory(""), last_metrics("")) == (None, None)
