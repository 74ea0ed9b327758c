"""The verb ``rectify answer``. Heavy imports happen when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli_measure import err, out, refuse
from cluster.doctor import gpu_count
from recipes.errors import RecipeError

if TYPE_CHECKING:
    from cluster.answers import Ask, Outcome

ATTEMPTS = 6
SHOWN = 10  # failures that are named

Source = Annotated[
    Path,
    typer.Argument(
        metavar="PROMPTS|RECIPE",
        help="A .txt, .jsonl, .json or .parquet file of prompts, a directory of them, or a recipe "
        "(or its name), for what it trains on.",
    ),
]


def answer(
    prompts: Source,
    to: Annotated[Path, typer.Option("--out", help="A .jsonl file; what is in it is kept.")],
    model: Annotated[str, typer.Option(help="Its name at the endpoint; a directory or hub id.")],
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible base URL, e.g. http://localhost:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="NAME of the environment variable with the endpoint's key.")
    ] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Run the model here, with vLLM.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="vLLM: GPUs that share the model; default 1, without any the CPU.", min=0
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="vLLM: most tokens of prompt and answer.", min=1)
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0, max=2)] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="A longer answer is not taken.", min=1)] = 1024,
    concurrency: Annotated[int, typer.Option(help="Requests under way at a time.", min=1)] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.", min=1)] = 600.0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    column: Annotated[str, typer.Option(help="Where a row has its answer.")] = "answer",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of RECIPE.")
    ] = None,
) -> None:
    """Ask an autoregressive teacher, and write answers that 'rl.kind: sft' trains on."""
    from cluster import answers
    from rewards.judge_engines import Sampling

    if (endpoint is None) != vllm:
        refuse("give --endpoint URL or --vllm, one of them")
    if not vllm and (gpus is not None or context is not None):
        refuse("--gpus and --context are for --vllm; an endpoint has its own")
    if samples > 1 and temperature == 0:
        refuse(f"--samples {samples} would be {samples} times the same: give --temperature")
    sampling = Sampling(None, temperature, max_tokens, plain=True)
    try:
        wanted = answers.questions(answers.prompts_of(prompts, overrides or []), samples, column)
        file = answers.AnswerFile(to, column)
        file.expect(wanted)
        with err.status("starting the teacher") as status:
            if endpoint is None:
                ask = _vllm(model, sampling, gpus, context)
            else:
                ask = _endpoint(endpoint, model, sampling, api_key_env, concurrency, timeout)
            outcome = answers.collect(ask, file, wanted, system, model, status.update)
    except (RecipeError, ValueError) as error:
        refuse(str(error))
    except answers.TeacherFailed as error:
        err.print(f"stopped: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    _summary(to, outcome)


def _endpoint(
    url: str, model: str, sampling: Any, key_variable: str | None, concurrency: int, timeout: float
) -> Ask:
    import os

    from rewards.judge_engines import EndpointEngine, wrong_url
    from rewards.keys import wrong_key

    mistake = wrong_url(url) or wrong_key(key_variable)
    if mistake is not None:
        raise ValueError(mistake)
    key = os.environ[key_variable] if key_variable else None
    engine = EndpointEngine(url, model, sampling, key, concurrency, timeout, ATTEMPTS)
    return lambda _, conversations: engine.completed(conversations)


def _vllm(model: str, sampling: Any, gpus: int | None, context: int | None) -> Ask:
    from cluster.answers import VllmTeacher
    from rewards.clip_score import missing_model

    mistake = missing_model("model", model)
    if mistake is not None:
        raise ValueError(mistake)
    used = min(gpu_count(), 1) if gpus is None else gpus
    if used > gpu_count():
        raise ValueError(f"--gpus {used}: this machine has {gpu_count()}")
    options = {
        "max_model_len": context,
        "tensor_parallel_size": max(1, used),
        "enforce_eager": used == 0,  # compiling for a CPU takes longer than it saves
    }
    return VllmTeacher(model, sampling, options, "vllm" if used else "vllm-cpu").ask


def _summary(path: Path, outcome: Outcome) -> None:
    from cluster.answers import FAILURES_IN_A_ROW

    for key, problem in list(outcome.failures.items())[:SHOWN]:
        message = f"prompt {key!r}: {problem}"
        err.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)
    total = outcome.kept + outcome.written
    line = f"{path}: {total} answers, {outcome.kept} of them from before"
    out.print(line, highlight=False, markup=False, soft_wrap=True)
    if outcome.missing:
        failed = len(outcome.failures)
        why = f"{failed} failed"
        if failed < outcome.missing:
            why += f", {FAILURES_IN_A_ROW} one after the other, so the rest was not asked"
        message = f"{outcome.missing} answers are missing ({why}); the same command asks again"
        err.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)
