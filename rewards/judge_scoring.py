"""A judge's scores: what it is told of a sample, and how its answer is read."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from rewards.judge_engines import Answer, Conversation, Engine, shown

if TYPE_CHECKING:
    from jinja2 import Template

    from rewards.judge import JudgeSettings

LEAST_MASS = 0.5


class JudgeScores:
    """See ``JudgeSettings``."""

    def __init__(self, settings: JudgeSettings, engine: Engine) -> None:
        self.settings = settings
        self.engine = engine
        self.template = compiled(settings.rubric)

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[float | ValueError]:
        """Scores of texts, conversations, or media uint8 (frames, height, width, 1 or 3).

        An error in the place of a score says why that sample has none.
        """
        asked = [
            self._asked(prompt, completion, {name: column[i] for name, column in columns.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        sent = [each for each in asked if not isinstance(each, ValueError)]
        answers = iter(self.engine.answers(sent) if sent else [])
        return [
            each if isinstance(each, ValueError) else self._score(next(answers)) for each in asked
        ]

    def _asked(
        self, prompt: Any, completion: Any, row: dict[str, Any]
    ) -> Conversation | ValueError:
        try:
            return self._conversation(prompt, completion, row)
        except ValueError as error:
            return error

    def _conversation(self, prompt: Any, completion: Any, row: dict[str, Any]) -> Conversation:
        values = {**row, "prompt": text_of(prompt)}
        content: Any
        if isinstance(completion, np.ndarray):
            [frames] = self.settings.chosen_frames([completion])
            images = [{"type": "image_url", "image_url": {"url": data_uri(f)}} for f in frames]
            content = [*images, {"type": "text", "text": rendered(self.template, values)}]
        else:
            content = rendered(self.template, {**values, "completion": text_of(completion)})
        system = self.settings.system
        opening = [] if system is None else [{"role": "system", "content": system}]
        return [*opening, {"role": "user", "content": content}]

    def _score(self, answer: Answer | ValueError) -> float | ValueError:
        if isinstance(answer, ValueError):
            return answer
        scale = self.settings.scale
        read = expected_score if self.settings.score == "expected" else written_score
        try:
            score = read(answer, scale)
        except ValueError as error:
            return error
        return (score - scale[0]) / (scale[-1] - scale[0]) if self.settings.normalise else score


class Verdict(BaseModel, frozen=True, extra="forbid", strict=True):
    """The form of a structured answer."""

    reasoning: str | None = None
    score: int


def written_score(answer: Answer, scale: range) -> float:
    """The score in a structured answer.

    Raises:
        ValueError: it is not JSON of the form of ``Verdict``, or its score is not of the scale.
    """
    try:
        score = Verdict.model_validate_json(answer.text).score
    except ValidationError as error:
        remedy = "; it was cut, raise 'max_tokens'" if answer.cut else ""
        raise ValueError(
            f"the judge's answer is no JSON with a score: {shown(answer.text)}{remedy}"
        ) from error
    if score not in scale:
        raise ValueError(
            f"the judge's score is not of the scale {scale[0]} to {scale[-1]}: {shown(answer.text)}"
        )
    return float(score)


def expected_score(answer: Answer, scale: range) -> float:
    """The mean over the scale, by the probabilities of the first token that is not blank.

    Equal scores with and without spaces count together; what is no score is left out.

    Raises:
        ValueError: there are no log-probabilities, or scores have less than half the probability.
    """
    first = next((token for token in answer.tokens if token.text.strip()), None)
    if first is None:
        raise ValueError(
            "the judge gave no log-probabilities of its answer (choose score: structured where it "
            f"has none): {shown(answer.text)}"
        )
    scores = {str(score): score for score in scale}
    weighted = [
        (scores[text.strip()], math.exp(likely))
        for text, likely in first.likely
        if text.strip() in scores
    ]
    mass = math.fsum(weight for _, weight in weighted)
    if mass < LEAST_MASS:
        raise ValueError(
            f"the judge's answer does not begin with a score of {scale[0]} to {scale[-1]} (they "
            f"have {mass:.1%} of the probability), let the rubric ask for the number alone: "
            f"{shown(answer.text)}"
        )
    return math.fsum(score * weight for score, weight in weighted) / mass


def compiled(rubric: str) -> Template:
    """The template, in a sandbox.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(rubric)


def rendered(template: Template, values: dict[str, Any]) -> str:
    """What the judge is told of one sample.

    Raises:
        ValueError: the rubric names what the sample does not have, or cannot be worked out with it.
    """
    from jinja2 import TemplateError

    try:
        return template.render(values)
    except (TemplateError, TypeError) as error:
        there = ", ".join(sorted(values))
        raise ValueError(f"field 'rubric': {error}; a sample here has {there}") from error


def data_uri(frame: np.ndarray) -> str:
    """A frame uint8 RGB (height, width, 3) as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class _Part(BaseModel, frozen=True):
    type: Literal["text"]
    text: str


class _Message(BaseModel, frozen=True):
    role: str
    content: str | list[_Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


_CONVERSATION = TypeAdapter(Annotated[list[_Message], Field(min_length=1)])


def text_of(given: Any) -> str:
    """A text as it is; of a conversation the only message's text, or all with their roles.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(given, str):
        return given
    try:
        messages = _CONVERSATION.validate_python(given)
    except ValidationError as error:
        raise ValueError(
            "a judge reads text, conversations of text (role, content) and uint8 media, not "
            f"{shown(repr(given))}"
        ) from error
    if len(messages) == 1:
        return messages[0].text()
    return "\n\n".join(f"{message.role}: {message.text()}" for message in messages)
