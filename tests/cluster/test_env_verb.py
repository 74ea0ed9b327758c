"""``rectify env`` as a user meets it: what is here, one message for bad input, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli_env import env
from rewards import environment


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def rectify_env(*arguments: str) -> Result:
    return CliRunner().invoke(env, arguments)


def standing(name: str, **marker: str) -> Path:
    """An environment that looks made."""
    directory = environment.place_of(name)
    (directory / "bin").mkdir(parents=True)
    with (directory / "weights").open("wb") as file:
        file.truncate(3 * 2**27)
    found = environment.requirements(name).marker | marker
    (directory / environment.MARKER).write_text(json.dumps(found))
    return directory


def test_the_list_has_every_environment_with_its_state(root: Path):
    standing("hpsv2")
    standing("vllm", ray="1.2.3")
    (root / "hpsv3").mkdir()
    result = rectify_env("list")
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    found = {row[0]: row[1:] for row in rows if row and row[0] in environment.names()}
    assert found == {
        "hpsv2": ["ready", "0.4", "GiB", f"{root}/hpsv2/bin/python"],
        "hpsv3": ["unfinished", "0.0", "GiB", f"{root}/hpsv3/bin/python"],
        "image-reward": ["absent", "-", "-"],
        "vllm": ["outdated", "0.4", "GiB", f"{root}/vllm/bin/python"],
        "vllm-cpu": ["absent", "-", "-"],
    }


@pytest.mark.parametrize("verb", ["create", "remove"])
def test_an_unknown_name_is_one_message_with_the_names(verb: str, root: Path):
    result = rectify_env(verb, "hpsv4")
    assert result.exit_code == 2
    names = "hpsv2, hpsv3, image-reward, vllm, vllm-cpu"
    assert result.stderr == f"no environment 'hpsv4'; there are: {names}\n"
    assert list(root.iterdir()) == []


def test_remove_deletes_it_and_says_so_where_there_is_none(root: Path):
    directory = standing("hpsv2")
    result = rectify_env("remove", "hpsv2")
    assert (result.exit_code, result.stdout) == (0, "hpsv2 is removed\n")
    assert not directory.exists()
    again = rectify_env("remove", "hpsv2")
    assert again.exit_code == 2
    assert again.stderr == "there is no environment 'hpsv2' here; nothing to remove\n"


def test_what_is_ready_is_not_made_again(root: Path):
    directory = standing("hpsv2")
    result = rectify_env("create", "hpsv2")
    assert result.exit_code == 0
    assert result.stdout == f"hpsv2 is ready: {directory}/bin/python\n"


def test_a_step_that_fails_stops_with_its_words(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(root / "nowhere"))
    result = rectify_env("create", "hpsv2")
    assert result.exit_code == 1
    assert "stopped: " in result.stderr and "torch==2.13.0" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert environment.state("hpsv2") == "unfinished"
