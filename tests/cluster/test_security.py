"""What comes from outside is data: no pickles, no code, no markup; what is secret stays inside."""

from __future__ import annotations

import ast
import base64
import http.server
import io
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.compare import Point
from cluster.compare_report import write_comparison
from cluster.curves import compare_curves
from cluster.launch import run_locally
from cluster.media import write_evaluated
from cluster.report import write_report
from cluster.run import describe
from cluster.timeline import Timeline
from cluster.tracking import MetricsFile
from recipes.schema import Recipe
from rewards.calling import RewardFailed

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "recipes", "distill", "rl", "rollout", "rewards")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Modules that run what a file says, and modules that would open a port of our own.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
SERVERS = {"http.server", "socketserver", "uvicorn", "fastapi", "flask", "aiohttp.web", "starlette"}


def problems(source: str) -> list[str]:
    """Every way in which a file would run what it reads, or serve anyone who asks."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", (node.module or "").split(".")[0]}
        else:
            names = set[str]()
        found += [f"imports {name}" for name in names & (UNSAFE | SERVERS)]
        if isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    last = name.rpartition(".")[2]
    rules = {
        "eval or exec": name in ("eval", "exec", "os.system", "os.popen"),
        "a shell": given.get("shell", "False") != "False",
        "torch.load": name == "torch.load" and given.get("weights_only") != "True",
        "allow_pickle": given.get("allow_pickle", "False") != "False",
        "yaml.load": name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
        "trust_remote_code": given.get("trust_remote_code", "False") != "False",
        "a hub's code": last == "from_pretrained"
        and name.startswith("Auto")
        and not name.startswith("Autoencoder")
        and given.get("trust_remote_code") != "False",
        "pickled weights": last == "from_pretrained"
        and name.startswith(("Wan", "ZImage", "Autoencoder"))
        and given.get("use_safetensors") != "True"
        and "state_dict" not in given,
        "every interface": any(
            isinstance(a, ast.Constant) and a.value == "0.0.0.0" for a in node.args
        ),
    }
    return [f"{rule}: {ast.unparse(node)[:80]}" for rule, broken in rules.items() if broken]


def test_no_file_runs_what_it_reads_or_serves_strangers():
    found = {str(p.relative_to(ROOT)): problems(p.read_text()) for p in FILES}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "import http.server", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "yaml.load(t, Loader)",
        "eval(t)", "exec(t)", "subprocess.run(t, shell=True)", "f(n, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(n)", "WanModel.from_pretrained(n)", "s.bind(('0.0.0.0'))",
    ],
)  # fmt: skip
def test_the_search_finds_each_of_them(line: str):
    assert problems(line)


def test_validate_names_the_code_that_a_recipe_runs(tmp_path: Path):
    told = "rewards=[{kind: function, path: 'rewards.ink:Ink'}]"
    result = CliRunner().invoke(app, ["validate", "digits/flash_grpo", "--set", told])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "code of yours that runs" in line)
    assert "rewards.ink:Ink" in line


HOSTILE = (
    '"><script>alert(1)</script></style></pre><img src=x onerror=alert(2)> '
    "{{ 7 * 7 }} ' onload='x \N{RIGHT-TO-LEFT OVERRIDE}txt.exe $\\frac{$ &lt;b&gt;"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "p", "table", "tr",
        "th", "td", "pre", "b", "br", "a", "figure", "figcaption", "img", "video"}  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def check_harmless(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags <= TAGS, page.tags - TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = [value or "" for name, value in page.attributes if name in ("src", "href")]
    assert all(a.startswith(("data:image/", "data:video/", "logs/", "samples/")) for a in addresses)
    return page


def hostile_run(path: Path) -> Path:
    """A run directory where everything that a model, a data set or a plugin names is hostile."""
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump({"name": HOSTILE, "rl": {"kind": HOSTILE}}))
    (path / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (path / "evaluation").mkdir()
    metrics = MetricsFile(path / "metrics.jsonl")
    name = HOSTILE.replace("/", "")
    for step in (0, 10):
        costs = {
            f"cost/{HOSTILE}": 3.0,
            "cost/forwards": 5.0,
            "cost/seconds": 1.0,
            "time/step": 1.0,
        }
        numbers = {f"reward/{name}/mean": 0.5, f"reward/{name}/failed": 2}
        metrics.append({"kind": "train", "step": step, "time": 1.0, **numbers, **costs})
        numbers = {f"evaluation/{name}/mean": 0.5 + step, f"evaluation/{name}/frechet": 1.0}
        metrics.append({"kind": "evaluation", "step": step, "time": 1.0, **numbers})
        texts = path / "samples" / f"step_{step:06d}"
        texts.mkdir(parents=True)
        row = {"prompt": HOSTILE, "completion": HOSTILE, "scores": {HOSTILE: HOSTILE}}
        (texts / "completions.jsonl").write_text(json.dumps(row) + "\n")
        write_evaluated(texts, np.zeros((1, 2, 8, 8, 1), np.uint8), [HOSTILE])
        sample = {"prompt": HOSTILE, "scores": {HOSTILE: [0.5]}}
        (path / "evaluation" / f"step_{step:06d}.json").write_text(
            json.dumps({"step": step, "samples": [sample]})
        )
    line = Timeline(path / "logs" / "attempt-1" / "timeline.json", 0.0)
    line.span(f"reward-{HOSTILE}-0", HOSTILE, 0.0, 1.0)
    line.instant("rollout-0", HOSTILE, 0.5)
    line.span("rollout-0", "generate", 1.0, 1.0)
    line.close()
    return path


def test_a_report_of_hostile_names_prompts_and_completions_is_only_text(tmp_path: Path):
    page = check_harmless(write_report(hostile_run(tmp_path / "run")))
    # Prompt and completion of both evaluations, the score's name and words, the video's prompt ...
    assert page.words.count(HOSTILE) >= 10
    assert "49" not in page.words
    assert f"reward-{HOSTILE}-0" in page.words
    assert any(name == "alt" and HOSTILE in (value or "") for name, value in page.attributes)


def test_curves_of_hostile_runs_are_only_text(tmp_path: Path):
    run = hostile_run(tmp_path / "run & <b> $\\frac{$")
    other = hostile_run(tmp_path / "_other")
    (other / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "rl": {"kind": "$\\bad{$"}}))
    compare_curves([run, other], out=tmp_path / "out")
    page = check_harmless(tmp_path / "out" / "curves.html")
    assert HOSTILE.replace("/", "") in page.words


def test_a_comparison_of_hostile_names_is_only_text(tmp_path: Path):
    work = dict.fromkeys(
        ["forwards", "backwards", "decodes", "rewards", "reward_backwards", "fallbacks",
         "equivalents"], 4.0,
    )  # fmt: skip
    metrics = {f"{HOSTILE}/mean": 0.5}
    points = [
        Point(policy, method, 4, 0, 0.5, work, 0.1, metrics)
        for policy, method in (("base", "plain"), (HOSTILE, HOSTILE))
    ]
    write_comparison(tmp_path / "out", points, [], HOSTILE)
    page = check_harmless(tmp_path / "out" / "compare.html")
    assert page.words.count(HOSTILE) >= 3


SECRET = 'sk-"Zq7&/+Xn4kP<9'  # what JSON, HTML and addresses write in another way
FORMS = ("Zq7&/+Xn4kP", "Zq7&amp;/+Xn4kP", "Zq7%26%2F%2BXn4kP", "Zq7\\u0026")


class Echo(http.server.BaseHTTPRequestHandler):
    """Fails in a way that the path names, and repeats what it was told in every form there is."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        """One request."""
        self.rfile.read(int(self.headers["Content-Length"]))
        way, told = self.path.split("/")[1], self.headers["Authorization"]
        if way == "slow":
            time.sleep(1.0)
        key = told.removeprefix("Bearer ")
        said = [told, escape(told), quote(key, safe=""), base64.b64encode(key.encode()).decode()]
        content = json.dumps({"headers": said, "html": f"<p>{escape(key)}</p>"})
        message = {"message": {"content": " ".join(said)}, "finish_reason": "stop"}
        body, status = {
            "refused": (content, 401),
            "failing": (content, 500),
            "garbage": (f"<html>{told}</html>", 200),
            "shape": (json.dumps({"choices": told}), 200),
            "slow": (content, 200),
            "chatty": (json.dumps({"choices": [message]}), 200),
        }[way]
        data = body.encode()
        try:
            self.send_response(status, f"no {told}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("WWW-Authenticate", told)
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            return


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server on loopback that repeats what it gets."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def leaks(*texts: bytes) -> list[str]:
    forms = [SECRET, *FORMS, base64.b64encode(SECRET.encode()).decode(), json.dumps(SECRET)[1:-1]]
    return [form for form in forms for text in texts if form.encode() in text]


WAYS = ("refused", "failing", "garbage", "shape", "slow", "chatty", "nobody")


def test_a_judge_s_key_is_in_nothing_that_a_run_writes(
    echo: str,
    digits_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("JUDGE_TEST_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    addresses = {way: "http://127.0.0.1:9" if way == "nobody" else f"{echo}/{way}" for way in WAYS}
    judges = [
        f"{{kind: judge, name: {way}, weight: 1.0, model: m, rubric: 'Rate it.', endpoint: '{at}',"
        f" api_key_env: JUDGE_TEST_KEY, attempts: 1, timeout: 0.3, max_failures: 1}}"
        for way, at in addresses.items()
    ]
    rewards = f"rewards=[{{kind: ink}}, {', '.join(judges)}]"
    settings = (
        f"run_dir={tmp_path}", rewards, "steps=1", "evaluation.samples=2", "evaluation.every=1",
        "evaluation.rewards=[]", "rollout.steps=2", "rollout.prompts_per_step=1",
        "rollout.group_size=2", "optimizer.learning_rate=1e-4",
    )  # fmt: skip
    recipe, path = digits_recipe(*settings), tmp_path / "run"
    console = Console(record=True, file=io.StringIO())
    path.mkdir()
    describe(path, recipe, recipe.prompts.load())
    run_locally(recipe, path, console)
    write_report(path)
    rows = [row for row in MetricsFile(path / "metrics.jsonl").read() if row["kind"] == "train"]
    assert [rows[0][f"reward/{way}/failed"] for way in WAYS] == [2.0] * len(WAYS)
    written = [file.read_bytes() for file in path.rglob("*") if file.is_file()]
    assert b"JUDGE_TEST_KEY" in b"".join(written)
    assert leaks(*written, console.export_text().encode(), caplog.text.encode()) == []

    # Where such failures end a run, its message quotes the server.
    for way in ("refused", "shape", "chatty"):
        one = rewards.replace("max_failures: 1", "max_failures: 0")
        one = f"rewards=[{one[one.index(f'{{kind: judge, name: {way}') :].partition('}')[0]}}}]"
        with pytest.raises(RewardFailed, match=way) as stopped:
            run_locally(digits_recipe(*settings, one), tmp_path / way, Console(quiet=True))
        told = "".join(traceback.format_exception(stopped.value))
        assert "sample" in told and leaks(told.encode()) == [], way


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9/v1?key=KEY",
        "http://user:KEY@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1#KEY",
    ],
)
def test_a_key_within_an_address_is_refused_without_being_shown(endpoint: str, tmp_path: Path):
    endpoint = endpoint.replace("KEY", "sk-Zq7Xn4kP9")
    reward = f"rewards=[{{kind: judge, model: m, rubric: 'Rate it.', endpoint: '{endpoint}'}}]"
    arguments = ["run", "digits/flash_grpo", "--set", reward, "--set", f"run_dir={tmp_path / 'r'}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "api_key_env" in result.output and "Zq7Xn4kP9" not in result.output
    assert not (tmp_path / "r").exists()
