"""How a judge's or teacher's answers are had: from an OpenAI-compatible endpoint, or vLLM here.

Both take conversations as the chat completions API has them (messages with a role and content;
images are data URIs) and give one answer for each. What fails for one conversation is returned in
its place, never raised: requests of a batch are paid for, and none is to be sent twice because
another one failed.

Run as a program this module answers what comes through a connection, with vLLM: see ``serve``.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from rewards.keys import hidden

if TYPE_CHECKING:
    import requests

Conversation = list[dict[str, Any]]

TOP_LOGPROBS = 20  # the most that OpenAI and, by default, vLLM give
MAX_BODY = 4 << 20
CHUNK = 1 << 16
SHOWN = 200
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class Sampling:
    """How every answer is sampled.

    Attributes:
        schema: the JSON schema it keeps to; None asks for log-probabilities of its tokens instead.
        plain: neither a schema nor log-probabilities: text alone.
    """

    schema: dict[str, Any] | None
    temperature: float
    max_tokens: int
    plain: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the log-probabilities of the likeliest there, itself included."""

    text: str
    likely: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """What the judge wrote; ``cut`` where it reached ``max_tokens``, ``tokens`` without a schema."""

    text: str
    cut: bool
    tokens: tuple[Token, ...]


class Engine(Protocol):
    """Where answers come from."""

    def answers(self, conversations: list[Conversation]) -> list[Answer | ValueError]:
        """One for each, in their order; an error in the place of one that could not be had."""
        ...


class EndpointEngine:
    """Requests to ``URL/chat/completions``, several at a time.

    Not ``huggingface_hub.InferenceClient``: for a base URL it drops the JSON schema (it sends TGI's
    json_object), sends the Hugging Face token where no key is given, and refuses to work offline.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        key: str | None,
        concurrency: int,
        timeout: float,
        attempts: int,
    ) -> None:
        """``key`` is sent as a bearer token, and is in no message; see ``Judge`` for the rest."""
        import requests
        from requests.adapters import HTTPAdapter

        self.url = f"{url.rstrip('/')}/chat/completions"
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self._key = key
        self._options = {"model": model, **_sampling_options(sampling)}
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency))
        # As ``auth``, not as a header: a header gives way to what ~/.netrc has for the host.
        self._session.auth = _bearer(key)

    def answers(self, conversations: list[Conversation]) -> list[Answer | ValueError]:
        """See ``Engine``; at most ``concurrency`` requests are under way."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, conversations))

    def completed(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[int, Answer | ValueError]]:
        """Place and answer of each as they come; those not yet sent are dropped with the iterator."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            sent = {pool.submit(self._answer, c): place for place, c in enumerate(conversations)}
            for future in as_completed(sent):
                yield sent[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, conversation: Conversation) -> Answer | ValueError:
        request = {**self._options, "messages": conversation}
        for attempt in range(self.attempts):
            try:
                return self._sent(request)
            except _Passing as error:
                if attempt + 1 == self.attempts:
                    return ValueError(f"{error} ({self.attempts} attempts)")
                time.sleep(max(error.wait, FIRST_WAIT * 2**attempt * random.uniform(1, 1.5)))
            except ValueError as error:
                return error
        raise AssertionError("attempts is at least 1")

    def _sent(self, request: dict[str, Any]) -> Answer:
        """One attempt.

        Raises:
            _Passing: it failed, and a later attempt may not.
            ValueError: it failed for good.
        """
        import requests

        try:
            with self._session.post(
                self.url, json=request, timeout=self.timeout, allow_redirects=False, stream=True
            ) as response:
                # Here, so that an answer that repeats the key is nowhere shown or written either.
                body = self._hidden(_limited(response))
        except requests.ReadTimeout as error:
            # Repeated it would be computed, and paid for, twice at a time.
            raise ValueError(
                f"{self.url} gave no answer within {self.timeout:g} s; raise 'timeout' or lower "
                "'concurrency'"
            ) from error
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            reason = self._shown(str(error).rpartition("Caused by ")[2])
            raise _Passing(
                f"no connection to {self.url}, see field 'endpoint': {reason}"
            ) from error
        except requests.RequestException as error:
            raise ValueError(f"{self.url}: {self._shown(str(error))}") from error
        if response.status_code != requests.codes.ok:
            raise self._refusal(response, body)
        try:
            return _read(body)
        except ValidationError as error:
            raise ValueError(
                f"{self.url} did not answer as chat completions do: {self._shown(body)}"
            ) from error

    def _refusal(self, response: requests.Response, body: str) -> ValueError:
        status = response.status_code
        message = f"{self.url} answered with status {status}: {self._shown(body)}"
        if status in (401, 403):
            have = (
                "'api_key_env' names" if self._key else "'api_key_env' should name (it is not set)"
            )
            return ValueError(f"{message}; check the key in the environment variable that {have}")
        if status == 404:
            return ValueError(f"{message}; check 'model', and 'endpoint', which mostly ends in /v1")
        if status == 429 or status >= 500:
            after = response.headers.get("Retry-After", "")
            return _Passing(message, min(float(after), LONGEST_WAIT) if after.isdecimal() else 0)
        return ValueError(message)

    def _shown(self, text: str) -> str:
        """The first characters of a foreign text."""
        return shown(self._hidden(text))

    def _hidden(self, text: str) -> str:
        """A foreign text without the key, which servers may repeat."""
        return hidden(text, self._key) if self._key else text


class VllmEngine:
    """vLLM in this process (it starts its own for the model)."""

    def __init__(self, model: str, sampling: Sampling, seed: int, options: dict[str, Any]) -> None:
        """``options`` are ``vllm.LLM``'s."""
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            StructuredOutputsParams,
        )

        schema = sampling.schema
        self.sampling: Any = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=TOP_LOGPROBS if schema is None and not sampling.plain else None,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        )
        # A weak judge would fill its answer with spaces between the parts of the JSON.
        form = {"backend": "xgrammar", "disable_any_whitespace": True}
        self.llm: Any = LLM(model=model, seed=seed, structured_outputs_config=form, **options)

    def answers(
        self, conversations: list[Conversation], seeds: Sequence[int] | None = None
    ) -> list[Answer | ValueError]:
        """See ``Engine``; ``seeds``: of each conversation's own.

        Raises:
            ValueError: a conversation is longer than the model's context; none is answered then.
        """
        sampling = self.sampling
        if seeds is not None:
            sampling = [deepcopy(self.sampling) for _ in seeds]
            for each, seed in zip(sampling, seeds, strict=True):
                each.seed = seed
        outputs = self.llm.chat(conversations, sampling, use_tqdm=False)
        return [_generated(output.outputs[0]) for output in outputs]


def wrong_url(endpoint: str) -> str | None:
    """Why field ``endpoint`` is no base URL; None if it is one."""
    remedy = "give one like http://localhost:8000/v1"
    try:
        url = urlsplit(endpoint)
        url.port  # noqa: B018  it is read here to be checked
    except ValueError:
        return f"field 'endpoint' is no URL; {remedy}"
    if url.username is not None or url.query or url.fragment:  # not shown: keys are put there
        return "field 'endpoint' has a user or a query in it; name the key with 'api_key_env'"
    if url.scheme not in ("http", "https") or not url.hostname:
        return f"field 'endpoint' is {endpoint!r}, not a base URL of http or https; {remedy}"
    return None


def shown(text: str) -> str:
    """The first 200 characters, as they go into a message."""
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")


class _Passing(ValueError):
    """A failure that a later attempt may not meet; ``wait`` is what the server asks for, seconds."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _Likely(BaseModel, frozen=True):
    token: str
    logprob: float = Field(le=0.01, allow_inf_nan=False)  # rounding may pass 0


class _Position(_Likely, frozen=True):
    top_logprobs: list[_Likely]


class _Logprobs(BaseModel, frozen=True):
    content: list[_Position] | None = None


class _Message(BaseModel, frozen=True):
    content: str | None = None


class _Choice(BaseModel, frozen=True):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Body(BaseModel, frozen=True):
    choices: list[_Choice] = Field(min_length=1)


def _read(body: str) -> Answer:
    choice = _Body.model_validate_json(body).choices[0]
    positions = (choice.logprobs and choice.logprobs.content) or []
    tokens = [
        Token(p.token, tuple((likely.token, likely.logprob) for likely in p.top_logprobs))
        for p in positions
    ]
    return Answer(choice.message.content or "", choice.finish_reason == "length", tuple(tokens))


def _generated(output: Any) -> Answer:
    """Of a ``vllm.CompletionOutput``."""
    tokens = [
        Token(
            likely[token].decoded_token,
            tuple((each.decoded_token, each.logprob) for each in likely.values()),
        )
        for token, likely in zip(output.token_ids, output.logprobs or [], strict=False)
    ]
    return Answer(output.text, output.finish_reason == "length", tuple(tokens))


def _sampling_options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.plain:
        return options
    if sampling.schema is None:
        return {**options, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    form = {"name": "verdict", "strict": True, "schema": sampling.schema}
    return {**options, "response_format": {"type": "json_schema", "json_schema": form}}


def _bearer(key: str | None) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return sign


def _limited(response: requests.Response) -> str:
    """The body; what is not UTF-8 is replaced.

    Raises:
        ValueError: it is larger than any answer.
    """
    body = bytearray()
    for chunk in response.iter_content(CHUNK):
        body += chunk
        if len(body) > MAX_BODY:
            raise ValueError(f"{response.url} answered with more than {MAX_BODY} bytes")
    return body.decode(errors="replace")


def serve(connection: Any) -> None:
    """Answer with vLLM until the other side is gone; only plain types cross.

    First comes (model, temperature, max_tokens, options of ``vllm.LLM``), then (conversations, seeds).
    The answer is (a list with (text, cut) for each, None), or (None, an error's type and words).
    """
    engine: VllmEngine | None = None
    made: list[Any] = []
    with suppress(EOFError, ConnectionResetError):
        while True:
            words = connection.recv()
            try:
                if engine is None:
                    model, temperature, max_tokens, options = words
                    sampling = Sampling(None, temperature, max_tokens, plain=True)
                    engine = VllmEngine(model, sampling, 0, options)
                else:
                    found = engine.answers(*words)
                    made = [(a.text, a.cut) for a in found if isinstance(a, Answer)]
            except Exception as error:  # noqa: BLE001  what vLLM raises is for the one who asked
                connection.send((None, (type(error).__name__, str(error))))
            else:
                connection.send((made, None))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
