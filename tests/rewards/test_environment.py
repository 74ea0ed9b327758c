"""Environments made for real, of wheels that are made here: nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rewards import environment
from rewards.environment import EnvironmentFailed

ROOT = Path(__file__).parents[2]
TINY = """# What nothing needs.
torch==9.1
widget==1.0
# A comment, and then words to the installer.
# alone: gadget==2.0
# remove: vision audio
# empty: clip
# imports: widget gadget
"""
# Made in another process that dies as soon as the libraries are to be installed.
KILLED = """
import os, signal
from rewards import environment
from pathlib import Path
import sys
environment.FILES = Path(sys.argv[1])
def report(step):
    if step.startswith("installing"):
        os.kill(os.getpid(), signal.SIGKILL)
environment.create("tiny", report)
"""


def wheel(
    directory: Path, name: str, version: str, needs: str = "", files: dict[str, str] | None = None
) -> None:
    """A package of ``files``, or of one empty module ``name``."""
    info = f"{name}-{version}.dist-info"
    contents = {f"{name}.py": ""} if files is None else dict(files)
    contents |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs.split()),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)


def answers(python: Path, code: str, **variables: str) -> str:
    done = subprocess.run(
        [str(python), "-P", "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **variables},
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_every_packaged_file_begins_with_torch_and_says_what_proves_it():
    assert environment.names() == ["hpsv2", "hpsv3", "image-reward", "vllm", "vllm-cpu"]
    for name in environment.names():
        wanted = environment.requirements(name)
        assert wanted.torch.startswith("torch=="), name
        assert set(wanted.imports) >= {"numpy", "pydantic"}, name
        assert len(wanted.imports) == 3, name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    """Requirements and wheels in place of the index, and an empty place for environments."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "tiny.txt").write_text(TINY)
    (directory / "broken.txt").write_text("torch==9.1\nnowhere==1.0\n")
    for name, version, needs in (
        ("torch", "9.1", ""),
        ("torch", "9.2", ""),
        ("widget", "1.0", "torch>=9 vision audio"),
        ("vision", "1.0", ""),
        ("audio", "1.0", ""),
        ("gadget", "2.0", "torch<9"),
        ("ray", metadata.version("ray"), ""),
    ):
        wheel(directory, name, version, needs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "FILES", directory)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(directory))
        patch.setenv("RECTIFY_ENVIRONMENTS", str(tmp_path_factory.mktemp("environments")))
        yield directory


@pytest.fixture(scope="module")
def killed(files: Path) -> tuple[str, str | None]:
    """What is said of an environment whose making was killed."""
    code = [sys.executable, "-c", KILLED, str(files)]
    assert subprocess.run(code, cwd=ROOT, capture_output=True).returncode == -9
    return environment.state("tiny"), environment.missing("tiny")


@pytest.fixture(scope="module")
def made(killed: object) -> tuple[Path, list[str]]:
    steps: list[str] = []
    return environment.create("tiny", steps.append), steps


def test_what_was_killed_does_not_count_and_is_made_anew(
    killed: tuple[str, str], made: tuple[Path, list[str]]
):
    assert killed[0] == "unfinished"
    assert "was not finished: run 'rectify env create tiny'" in killed[1]
    assert environment.state("tiny") == "ready" and environment.missing("tiny") is None
    assert environment.python_of("tiny") == made[0]
    assert [step for step in made[1] if "torch==9.1" in step] != []


def test_the_file_decides_what_is_there(made: tuple[Path, list[str]]):
    found = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    packages = set(answers(made[0], found).split())
    assert packages >= {"torch", "widget", "gadget", "ray"}
    assert packages & {"vision", "audio"} == set()
    version = "import importlib.metadata as m; print(m.version('torch'))"
    assert answers(made[0], version) == "9.1"
    assert answers(made[0], "import clip; print(clip.__name__)") == "clip"


def test_a_process_there_sees_the_package_and_nothing_beside_it(made: tuple[Path, list[str]]):
    variables = environment.variables(threads=3)
    code = "import importlib.util as u, rewards; print(rewards.__file__, *map(u.find_spec, {}))"
    said = answers(made[0], code.format(["cluster", "recipes", "tests", "numpy"]), **variables)
    assert said == f"{variables['PYTHONPATH']}/rewards/__init__.py None None None None"
    assert answers(made[0], "import os; print(os.environ['OMP_NUM_THREADS'])", **variables) == "3"
    assert environment.variables(threads=3) == variables


def test_what_is_ready_is_left_as_it_is(made: tuple[Path, list[str]]):
    steps: list[str] = []
    before = (environment.place_of("tiny") / environment.MARKER).stat()
    assert environment.create("tiny", steps.append) == made[0]
    assert steps == []
    assert (environment.place_of("tiny") / environment.MARKER).stat() == before


def test_other_requirements_or_another_ray_make_it_outdated(
    made: tuple[Path, list[str]], files: Path, monkeypatch: pytest.MonkeyPatch
):
    file = files / "tiny.txt"
    file.write_text(TINY.replace("What nothing needs", "Reworded"))
    assert environment.state("tiny") == "ready"
    for changed in ("widget==1.1", "widget==1.0\n# remove: torch"):
        file.write_text(TINY.replace("widget==1.0", changed))
        assert environment.state("tiny") == "outdated"
        assert environment.python_of("tiny") is None
    assert "run 'rectify env create tiny'" in (environment.missing("tiny") or "")
    file.write_text(TINY)
    assert environment.state("tiny") == "ready"
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert environment.state("tiny") == "outdated"


def test_only_one_process_makes_an_environment(made: tuple[Path, list[str]]):
    with (
        environment._alone(environment.place_of("tiny")),  # pyright: ignore[reportPrivateUsage]
        pytest.raises(EnvironmentFailed, match="another process"),
    ):
        environment.remove("tiny")
    assert environment.state("tiny") == "ready"


def test_what_pip_says_of_a_failure_is_told(files: Path):
    with pytest.raises(EnvironmentFailed, match="No matching distribution found for nowhere"):
        environment.create("broken", lambda step: None)
    assert environment.state("broken") == "unfinished"
    assert environment.remove("broken") and not environment.remove("broken")
    assert environment.state("broken") == "absent"


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_torch_can_be_imported(files: Path):
    """With the platform's own torch, and a torchvision that does on import what the real one does."""
    wheel(files, "torch", "9.0", files={"platform.pth": str(Path(torch.__file__).parents[1])})
    needs_operator = "import torch\ntorch.library.register_fake('torchvision::nms')(print)\n"
    wheel(files, "torchvision", "9.0", files={"torchvision/__init__.py": needs_operator})
    with pytest.raises(RuntimeError, match=environment.NO_OPERATORS):
        torch.library.register_fake("torchvision::nms")(print)
    shim = f"{environment.OPERATORS}.py"
    shutil.copy(Path(environment.__file__).parent / "environments" / shim, files / shim)
    (files / "seeing.txt").write_text("torch==9.0\ntorchvision==9.0\n# imports: torchvision\n")
    python = environment.create("seeing", lambda step: None)
    # That it can be imported has been tried; torch is not imported before it is.
    assert answers(python, "import sys; print('torch' in sys.modules)") == "False"
    assert environment.remove("seeing")
    (files / "seeing.txt").unlink()


def test_an_unknown_name_is_answered_with_the_names(files: Path):
    for call in (environment.state, environment.missing, environment.remove):
        with pytest.raises(ValueError, match="no environment 'tinny'; there are: broken, tiny"):
            call("tinny")
