"""Copies of checkpoints in a storage: whole or not there, and another machine goes on from them."""

from __future__ import annotations

import io
import json
import resource
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import checkpoints
from cluster.checkpoints import CheckpointError
from cluster.cli import app
from cluster.copies import Copies
from cluster.launch import run_locally
from cluster.run import describe, new_directory
from cluster.storage import Storage, StorageError, fetch_newer, fetch_run, located, proved

SMALL = ("checkpoints.every=1", "evaluation.samples=4", "rollout.steps=4", "rl.pool=[0]")


def save(directory: Path) -> None:
    (directory / "policy").mkdir()
    (directory / "policy" / "weights.bin").write_bytes(bytes(range(256)))
    (directory / "optimizer.safetensors").write_bytes(b"moments" * 3000)


def make(run: Path, *steps: int) -> Path:
    """A run directory with checkpoints and a line of metrics for each."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text("name: run\n")
    (run / "data.sha256").write_text("0\n")
    (run / "versions.json").write_text("{}")
    (run / "secret.txt").write_text("stays here")
    for step in steps:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "train", "step": step}) + "\n")
        checkpoints.write(run / "checkpoints", step, save, {"costs": {"nfe": step}})
    return run


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = f"{tmp_path}/storage" if request.param == "file" else f"/{secrets.token_hex(8)}"
    return Storage(f"{request.param}://{place}")


def copied(storage: Storage, run: Path, *steps: int, keep_last: int = 9) -> list[str]:
    """Copy checkpoints one after another; returns what was said."""
    said: list[str] = []
    copies = Copies(storage, run, keep_last, said.append)
    for step in steps:
        copies.copy(step, None)
        copies.finish(30)
    return said


def test_another_machine_gets_what_it_needs_and_nothing_else(storage: Storage, tmp_path: Path):
    run = make(tmp_path / "here" / "run", 1, 2)
    storage.prove()
    storage.describe(run)
    assert copied(storage, run, 2) == []
    assert storage.names() == {"run"}
    assert storage.names("run") == {"recipe.yaml", "data.sha256", "versions.json", "step_000002"}
    there = fetch_run(storage, "run", tmp_path / "there" / "run", str)
    found = checkpoints.latest(there / "checkpoints")
    assert found is not None and (found.step, found.state) == (2, {"costs": {"nfe": 2}})
    for name in ("recipe.yaml", "data.sha256", "metrics.jsonl"):
        assert (there / name).read_bytes() == (run / name).read_bytes()
    assert {p.name for p in there.parent.iterdir()} == {"run"}
    with pytest.raises(StorageError, match="is there already: continue it by --resume"):
        fetch_run(storage, "run", there, str)


def test_pruning_keeps_the_newest_and_the_best_there_too(storage: Storage, tmp_path: Path):
    run = make(tmp_path / "run", 1, 2, 3, 4)
    said: list[str] = []
    copies = Copies(storage, run, 2, said.append)
    for step in (1, 2, 3, 4):
        copies.copy(step, 1)
        copies.finish(30)
    assert storage.steps("run") == [1, 3, 4] and not said


def test_a_copy_without_its_manifest_is_not_there(storage: Storage, tmp_path: Path):
    run = make(tmp_path / "run", 1, 2, 3)
    copied(storage, run, 1, 2)
    storage.files.rm_file(f"{storage.root}/run/step_000002/manifest.json")
    assert storage.steps("run") == [1]
    copied(storage, run, 3)
    assert "step_000002" not in storage.names("run")


def test_a_copy_that_breaks_off_leaves_no_manifest_and_is_tried_again(tmp_path: Path):
    run, storage = make(tmp_path / "run", 1, 2), Storage(f"file://{tmp_path}/storage")
    said: list[str] = []
    copies = Copies(storage, run, 9, said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        copies.copy(1, None)
        copies.finish(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    there = storage.names("run/step_000001")
    assert "optimizer.safetensors" in there and "manifest.json" not in there
    assert storage.steps("run") == []
    assert [message.count("step_000001 was not copied") for message in said] == [1, 1, 0]
    assert "File too large" in said[0]
    assert "step_000001 is NOT in file://" in said[2] and "rectify run --resume" in said[2]
    copies.copy(2, None)
    copies.finish(30)
    assert storage.steps("run") == [2] and len(said) == 3


def test_training_does_not_wait_and_one_copy_is_made_at_a_time(tmp_path: Path):
    class Slow(Storage):
        """Waits to be told to go on."""

        copying, most = 0, 0
        began, go = threading.Semaphore(0), threading.Semaphore(0)

        def copy(self, run: str, checkpoint: Path, metrics: bytes) -> None:
            Slow.copying += 1
            Slow.most = max(Slow.most, Slow.copying)
            self.began.release()
            assert self.go.acquire(timeout=30)
            super().copy(run, checkpoint, metrics)
            Slow.copying -= 1

    run, storage = make(tmp_path / "run", 1, 2, 3), Slow(f"file://{tmp_path}/storage")
    said: list[str] = []
    copies = Copies(storage, run, 9, said.append)
    copies.copy(1, None)
    assert storage.began.acquire(timeout=30)
    copies.copy(2, None)
    assert copies.in_use() == {1, 2}
    copies.copy(3, None)  # 2 has not begun: the newest takes its place
    assert copies.in_use() == {1, 3}
    copies.finish(0.01)
    assert "step_000003 is NOT in" in said.pop() and not said
    storage.go.release(2)
    copies.finish(30)
    assert storage.steps("run") == [1, 3] and Slow.most == 1 and not said


def test_the_newest_valid_of_both_is_taken(storage: Storage, tmp_path: Path):
    run = make(tmp_path / "one" / "run", 1, 2, 3)
    copied(storage, run, 1, 2, 3)
    other, said = make(tmp_path / "two" / "run", 1), []
    storage.files.pipe_file(f"{storage.root}/run/step_000003/state.json", b'{"step": 4}')
    fetch_newer(storage, "run", other, said.append)
    found = checkpoints.latest(other / "checkpoints")
    assert found is not None and found.step == 2
    assert (other / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    (damaged,) = [line for line in said if "passed over" in line]
    assert "step_000003 is damaged: state.json" in damaged
    ahead = make(tmp_path / "three" / "run", 5)
    before = (ahead / "metrics.jsonl").read_bytes()
    fetch_newer(storage, "run", ahead, said.append)
    assert checkpoints.steps_in(ahead / "checkpoints") == [5]
    assert (ahead / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "policy/../../escaped"])
def test_a_manifest_cannot_write_outside(name: str, storage: Storage, tmp_path: Path):
    run = make(tmp_path / "run", 1)
    copied(storage, run, 1)
    manifest = json.loads((run / "checkpoints" / "step_000001" / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    place = f"{storage.root}/run/step_000001/manifest.json"
    storage.files.pipe_file(place, json.dumps(manifest).encode())
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        storage.fetch("run", 1, tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


def test_another_run_of_the_same_name_is_left_alone(
    storage: Storage, digits_recipe: Callable[..., Any], tmp_path: Path
):
    run = make(tmp_path / "run", 1)
    storage.describe(run)
    storage.describe(run)
    (run / "recipe.yaml").write_text("name: run\nseed: 1\n")
    with pytest.raises(StorageError, match="holds another run"):
        storage.describe(run)
    assert storage.read("run", "recipe.yaml") == b"name: run\n"
    recipe = digits_recipe("name=run", f"run_dir={tmp_path}/elsewhere")
    assert new_directory(recipe, storage.names()).name == "run-2"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/prefix", "pip install 'rectify[s3]'"),
        ("gs://bucket/prefix", "pip install 'rectify[gs]'"),
        ("hdf://bucket", "did you mean 'hdfs'?"),
        ("/shared/checkpoints", "expected a URL of s3://"),
        ("s3:///prefix", "names no bucket"),
        ("file://shared/checkpoints", "file:///shared/checkpoints"),
        ("s3://KEY:hunter2@bucket/prefix", "credentials do not belong in a URL"),
        ("s3://KEY:hunt/er2@bucket/prefix", "credentials do not belong in a URL"),
        ("hdfs://user:hunter2@namenode:8020/x", "credentials do not belong in a URL"),
    ],
)
def test_a_url_is_checked_before_anything_is_started(url: str, words: str, tmp_path: Path):
    if "pip install" in words and has_driver(url):
        pytest.skip("its driver is installed")
    setting = f"checkpoints.storage={url}"
    result = CliRunner().invoke(app, ["validate", "digits/flash_grpo", "--set", setting])
    assert result.exit_code == 2 and words in result.output
    assert "er2" not in result.output.replace(setting, "")
    continued = CliRunner().invoke(app, ["run", "--resume", f"{url}/run"])
    assert continued.exit_code == 2
    assert "Traceback" not in continued.output and "er2" not in continued.output


def has_driver(url: str) -> bool:
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except ImportError:
        return False
    return True


def test_a_storage_that_takes_nothing_is_found_before_the_run(tmp_path: Path):
    settings = ["checkpoints.storage=file:///proc/nowhere", f"run_dir={tmp_path}/runs"]
    sets = [part for setting in settings for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "digits/flash_grpo", *sets])
    assert result.exit_code == 2
    assert "cannot write to file:///proc/nowhere" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("storage/other", "holds no run other; there are: broken, empty, run"),
        ("storage/empty", "holds no checkpoint"),
        ("storage/run --changed-seed", "begun with another seed"),
        ("storage/broken", "none of its checkpoints is valid"),
    ],
)
def test_a_url_without_a_run_to_continue_is_refused(
    url: str, words: str, digits_recipe: Callable[..., Any], tmp_path: Path
):
    storage, recipe = Storage(f"file://{tmp_path}/storage"), digits_recipe()
    for name in ("run", "empty", "broken"):
        run = make(tmp_path / name, 1)
        describe(run, recipe, recipe.prompts.load())
        storage.describe(run)
        if name != "empty":
            copied(storage, run, 1)
    storage.files.pipe_file(f"{storage.root}/broken/step_000001/optimizer.safetensors", b"")
    url, *changed = url.split()
    runs = tmp_path / "runs"
    sets = [f"run_dir={runs}", *(["seed=7"] if changed else [])]
    arguments = [part for setting in sets for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "--resume", f"file://{tmp_path}/{url}", *arguments])
    assert result.exit_code == 2 and words in result.output.replace("\n", " "), result.output
    assert isinstance(result.exception, SystemExit)
    assert not runs.exists() or list(runs.iterdir()) == []


def test_a_run_continues_elsewhere_to_the_same_bytes(
    digits_recipe: Callable[..., Any], tmp_path: Path
):
    url, quiet = f"memory:///{secrets.token_hex(8)}", Console(quiet=True)
    whole = digits_recipe(*SMALL, "steps=2", f"checkpoints.storage={url}")
    half = digits_recipe(*SMALL, "steps=1", f"checkpoints.storage={url}")
    here = tmp_path / "here" / "run"
    here.mkdir(parents=True)
    storage = proved(whole)
    assert storage is not None
    describe(here, whole, whole.prompts.load())
    storage.describe(here)
    run_locally(half, here, quiet)
    assert storage.steps("run") == [1]
    there = fetch_run(*located(f"{url}/run"), tmp_path / "there" / "run", str)
    console = Console(record=True, width=300, file=io.StringIO())
    run_locally(whole, there, console)
    assert "continuing after step 1" in console.export_text()
    assert storage.steps("run") == [1, 2]
    run_locally(whole, here, quiet)
    weights = "checkpoints/step_000002/optimizer.safetensors"
    assert (there / weights).read_bytes() == (here / weights).read_bytes()
    assert [json.loads(line)["step"] for line in (there / "metrics.jsonl").open()] == [
        *(0, 1, 1),
        *(2, 2),
    ]


S3 = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {**S3, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
        yield "s3://bucket/prefix"
    finally:
        server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server of Google's protocol on this machine."""
    # Else it asks for the kind of the bucket by gRPC with a certificate; read as it is imported.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        port = server._api._httpd.server_port
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield "gs://bucket/prefix"
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket_takes_and_gives_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    bucket: str = request.getfixturevalue(kind)
    storage, run = Storage(bucket), make(tmp_path / "here" / "run", 1, 2, 3)
    storage.prove()
    assert storage.names() == set()
    storage.describe(run)
    assert copied(storage, run, 1, 2, 3, keep_last=2) == []
    assert Storage(bucket).steps("run") == [2, 3]
    there = fetch_run(*located(f"{bucket}/run"), tmp_path / "there" / "run", str)
    found = checkpoints.latest(there / "checkpoints")
    assert found is not None and found.step == 3
    storage.files.pipe_file(f"{storage.root}/run/step_000003/state.json", b"{}")
    shutil.rmtree(there)
    fetch_run(storage, "run", there, str)
    assert checkpoints.steps_in(there / "checkpoints") == [2]


@pytest.mark.slow
def test_a_missing_bucket_or_a_wrong_key_is_found_by_the_proof(
    s3: str, monkeypatch: pytest.MonkeyPatch
):
    import os

    import requests

    with pytest.raises(StorageError, match=r"cannot write to s3://bucke/x .*credentials: AWS"):
        Storage("s3://bucke/x").prove()
    requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"0")
    try:
        with pytest.raises(StorageError, match="cannot write to s3://bucket/prefix") as refused:
            Storage(s3).prove()
        assert "hunter2" not in str(refused.value)
    finally:
        requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"inf")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot write to s3://bucket/prefix"):
        Storage(s3).prove()
