"""A language model as judge: it scores images, frames of a video or texts by a rubric.

The score is what the judge writes, or with ``score: expected`` the mean of the scores it might have
written, weighted with their probabilities (G-Eval, arXiv 2303.16634), which is finer.

What is judged may try to persuade the judge. A rubric is a template, the prompt and the completion
are inserted into it as they are and never read as templates themselves; put them between delimiters
and say that what is between is material and no instruction. What the judge returns is read as data
of one form, and anything else is a failure of that sample.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from rewards.contract import RewardFunction
from rewards.frames import FrameSettings
from rewards.judge_engines import (
    EndpointEngine,
    Engine,
    Sampling,
    VllmEngine,
    wrong_url,
)
from rewards.judge_scoring import JudgeScores, compiled
from rewards.keys import wrong_key
from rewards.published import missing_model

FILES = (".j2", ".jinja", ".txt")
MOST_SCORES = 101
FIRST_TOKENS = 3  # some tokenizers begin an answer with a space


class JudgeSettings(FrameSettings, frozen=True, extra="forbid"):
    """What every judge is asked, and how its answer becomes a score.

    One sample's failure is returned in the place of its score (an exception, which
    ``rewards.calling`` masks and names): the others' answers are not asked for again.
    """

    deadline: float = Field(default=600.0, gt=0, description="Seconds one call may take.")
    model: str = Field(min_length=1, description="The judge.")
    rubric: str = Field(
        min_length=1,
        description="A Jinja2 template of what the judge is told, or a file of one (one line that "
        "ends in .j2, .jinja or .txt; read when the recipe is). It has 'prompt', of text "
        "'completion', and every column by its name; images come before it. Put what is judged "
        "between delimiters and say that it holds no instructions; nothing is stripped from it.",
    )
    system: str | None = Field(default=None, description="System message, not a template.")
    frames: int | None = Field(
        default=4,
        ge=1,
        description="Frames of a video that the judge sees in order, evenly spaced; null shows all.",
    )
    minimum: int = Field(default=1, description="Lowest score of the scale.")
    maximum: int = Field(default=5, description="Highest score of the scale.")
    normalise: bool = Field(
        default=True, description="Scores from 0 (minimum) to 1 (maximum); else those of the scale."
    )
    score: Literal["structured", "expected"] = Field(
        default="structured",
        description="structured: the judge writes JSON with a score; expected: its first token is "
        "the score, and the mean over the scale by their probabilities counts (scales within 0 "
        "to 9; the rubric asks for the number alone).",
    )
    reasoning: bool = Field(
        default=True, description="With score: structured, reasons come before the score."
    )
    temperature: float = Field(default=0.0, ge=0, le=2, description="Of sampling; 0 is greedy.")
    max_tokens: int = Field(
        default=512, ge=1, description="Tokens of an answer with score: structured."
    )

    @field_validator("rubric")
    @classmethod
    def _template_of_file(cls, rubric: str) -> str:
        if "\n" in rubric or not rubric.endswith(FILES):
            return rubric
        try:
            return Path(rubric).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"rubric {rubric!r} is no text file that can be read: {error}"
            ) from error

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if not 0 < self.maximum - self.minimum < MOST_SCORES:
            raise ValueError(
                f"maximum {self.maximum} has to be 1 to {MOST_SCORES - 1} above minimum {self.minimum}"
            )
        if self.score == "expected" and not 0 <= self.minimum < self.maximum <= 9:
            raise ValueError(
                f"score: expected reads one token, so scales are within 0 to 9, not {self.minimum} "
                f"to {self.maximum}"
            )
        return self

    @abstractmethod
    def engine(self) -> Engine:
        """Where answers come from."""

    def build(self) -> RewardFunction:
        """With its engine.

        Raises:
            ValueError: see ``mistake``.
        """
        mistake = self.mistake()
        if mistake is not None:
            raise ValueError(mistake)
        # Errors in the place of scores are what ``rewards.calling`` takes beyond the contract.
        return cast(RewardFunction, JudgeScores(self, self.engine()))

    def problem(self) -> str | None:
        """What the reward's environment lacks, or see ``mistake``."""
        return super().problem() or self.mistake()

    def mistake(self) -> str | None:
        """Whether the rubric is a template; which columns there are is known only with samples."""
        from jinja2 import TemplateSyntaxError

        try:
            compiled(self.rubric)
        except TemplateSyntaxError as error:
            return f"field 'rubric' is no Jinja2 template: line {error.lineno}: {error.message}"
        return None

    @property
    def scale(self) -> range:
        """All scores."""
        return range(self.minimum, self.maximum + 1)

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        if self.score == "expected":
            return Sampling(None, self.temperature, FIRST_TOKENS)
        # A list of all scores is understood by more servers than minimum and maximum are.
        properties: dict[str, Any] = {"score": {"type": "integer", "enum": list(self.scale)}}
        if self.reasoning:
            properties = {"reasoning": {"type": "string"}, **properties}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return Sampling(schema, self.temperature, self.max_tokens)


class Judge(JudgeSettings, frozen=True, extra="forbid"):
    """A judge at an OpenAI-compatible endpoint."""

    kind: Literal["judge"] = "judge"
    model: str = Field(min_length=1, description="Its name at the endpoint.")
    endpoint: str = Field(description="Base URL, e.g. http://localhost:8000/v1.")
    api_key_env: str | None = Field(
        default=None,
        description="NAME of the environment variable that holds the key, where the endpoint wants "
        "one; it has to be set where the reward is served. Never the key itself.",
    )
    concurrency: int = Field(default=8, ge=1, description="Requests under way at a time.")
    timeout: float = Field(
        default=60.0, gt=0, description="Seconds to wait for an answer; a late one is not repeated."
    )
    attempts: int = Field(
        default=4,
        ge=1,
        description="Requests for one answer at most, with longer and longer waits: one is repeated "
        "after status 429 or 5xx or without a connection, never after another refusal.",
    )

    def engine(self) -> Engine:
        """Requests to the endpoint."""
        key = os.environ[self.api_key_env] if self.api_key_env else None
        return EndpointEngine(
            self.endpoint,
            self.model,
            self.sampling,
            key,
            self.concurrency,
            self.timeout,
            self.attempts,
        )

    def mistake(self) -> str | None:
        """Whether the rubric is a template, the endpoint a URL, and the key is there."""
        return super().mistake() or wrong_url(self.endpoint) or wrong_key(self.api_key_env)


class VllmJudge(JudgeSettings, frozen=True, extra="forbid"):
    """A judge that vLLM runs where the reward is served; on the CPU where ``gpus`` is 0."""

    environment: ClassVar[str | None] = "vllm"

    kind: Literal["vllm_judge"] = "vllm_judge"
    model: str = Field(min_length=1, description="A directory, or a hub id.")
    gpus: float = Field(
        default=1.0, ge=0, description="GPUs per replica; more than one share the model's layers."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the model; auto is what it was saved in."
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a conversation with its answer at most; default the model's.",
    )
    memory: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory that vLLM takes."
    )
    seed: int = Field(default=0, ge=0, description="Of sampling, the same for every request.")

    @property
    def served_in(self) -> str | None:
        """vLLM of GPUs, or of CPUs where it gets none."""
        return "vllm" if self.gpus else "vllm-cpu"

    def engine(self) -> Engine:
        """With the model loaded."""
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.context,
            "gpu_memory_utilization": self.memory,
            "tensor_parallel_size": max(1, int(self.gpus)),
            "enforce_eager": self.gpus == 0,  # compiling for a CPU takes longer than a small judge
        }
        if self.frames is not None:
            options["limit_mm_per_prompt"] = {"image": self.frames}
        return VllmEngine(self.model, self.sampling, self.seed, options)

    def mistake(self) -> str | None:
        """Whether the rubric is a template, a local ``model`` is there, and GPUs can be shared."""
        if self.gpus > 1 and not self.gpus.is_integer():
            return f"gpus {self.gpus:g}: vLLM takes a share of one GPU, or whole ones"
        return super().mistake() or missing_model("model", self.model)
