"""A chat completions server with a small LLaVA of random weights: what a judge's tests talk to.

It reads letters, and images through a CLIP tower. A ``response_format`` is kept by constrained
decoding over all texts that the schema admits (free strings are one of REASONS), log-probabilities
are the model's own.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

LETTERS = [chr(code) for code in range(32, 127)]
SPECIAL = ["<image>", "<end>", "<unknown>"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}judge: {% endif %}"
)
REASONS = ("bad", "fair", "good")
SIDE = 16


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable ASCII letter."""
    words = {word: number for number, word in enumerate(SPECIAL + LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unknown>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )


class JudgeModel:
    """The model, asked directly."""

    def __init__(self) -> None:
        """Its head favours digits, as that of a judge asked for a number does."""
        self.tokenizer = letter_tokenizer()
        self.processor = LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
            self.tokenizer,
            patch_size=SIDE // 2,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
        ends = {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": None}
        size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        config = LlavaConfig(
            text_config=LlamaConfig(
                **size, **ends, vocab_size=len(self.tokenizer), num_hidden_layers=2,
                num_key_value_heads=2, initializer_range=1.0,
            ),
            vision_config=CLIPVisionConfig(
                **size, image_size=SIDE, patch_size=SIDE // 2, num_hidden_layers=2
            ),
            image_token_index=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = LlavaForConditionalGeneration(config).eval()
            head = torch.nn.Linear(size["hidden_size"], len(self.tokenizer))
            for part in self.network.model.multi_modal_projector.parameters():
                part.data = torch.randn_like(part)
        with torch.no_grad():
            head.weight.mul_(3)
            head.bias[self.tokenizer.convert_tokens_to_ids(list("12345"))] += 9
        self.network.lm_head = head
        self.lock = threading.Lock()

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Of a conversation whose images are data URIs."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        images = [
            image_of(part["image_url"]["url"])
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        return dict(self.processor(images=images or None, text=text, return_tensors="pt"))

    def first_logprobs(self, messages: list[dict[str, Any]]) -> torch.Tensor:
        """Of every letter as the first of an answer, by one forward; fp32 (vocabulary,)."""
        with torch.no_grad():
            logits = self.network(**self.inputs(messages)).logits[0, -1]
        return logits.float().log_softmax(-1)

    def answer(
        self, messages: list[dict[str, Any]], schema: dict[str, Any] | None, max_tokens: int
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens without the end, and the logits (tokens, vocabulary) they were chosen by."""
        inputs = self.inputs(messages)
        length = inputs["input_ids"].shape[1]
        allowed = None
        if schema is not None:
            tree = self._tree(texts_of(schema))
            allowed = lambda _, tokens: tree[tuple(tokens[length:].tolist())]  # noqa: E731
        with self.lock, torch.no_grad():
            made = self.network.generate(
                **inputs, do_sample=False, max_new_tokens=max_tokens, return_dict_in_generate=True,
                output_logits=True, prefix_allowed_tokens_fn=allowed,
            )  # fmt: skip
        tokens = made.sequences[0, length:].tolist()
        logits = torch.cat(made.logits)
        return (tokens[:-1], logits[:-1]) if tokens[-1] == 1 else (tokens, logits)

    def _tree(self, texts: list[str]) -> dict[tuple[int, ...], list[int]]:
        """The tokens that may follow each beginning of a text."""
        tree: dict[tuple[int, ...], set[int]] = {}
        for text in texts:
            tokens = [*self.tokenizer.encode(text, add_special_tokens=False), 1]
            for place, token in enumerate(tokens):
                tree.setdefault(tuple(tokens[:place]), set()).add(token)
        return {beginning: sorted(following) for beginning, following in tree.items()}


def image_of(uri: str) -> Image.Image:
    """Of a data URI of a PNG."""
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/png"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def texts_of(schema: dict[str, Any]) -> list[str]:
    """All JSON texts of an object schema with enumerations and free strings."""
    assert schema["required"] == list(schema["properties"])
    choices = [part.get("enum", REASONS) for part in schema["properties"].values()]
    names = schema["properties"]
    return [
        json.dumps(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*choices)
    ]


def mean_score(model: JudgeModel, messages: list[dict[str, Any]], scale: range) -> float:
    """The expectation by hand: a softmax over the logits of the scores' tokens."""
    tokens = model.tokenizer.convert_tokens_to_ids([str(score) for score in scale])
    weights = model.first_logprobs(messages)[tokens].softmax(-1)
    return float(weights @ torch.tensor(list(scale), dtype=torch.float32))


def write_llama(directory: Path) -> LlamaForCausalLM:
    """A Llama of heads of 32, whose first number is constant and makes digits likely."""
    tokenizer = letter_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=1, eos_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        network.model.embed_tokens.weight[:, 0] = 4
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        digits = tokenizer.convert_tokens_to_ids(list("12345"))
        network.lm_head.weight[:, 0] = 0
        network.lm_head.weight[digits, 0] = 60
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return network


@dataclass
class JudgeServer:
    """What tests see of a running server, and how they disturb it.

    Attributes:
        key: wanted as a bearer token; None: none is looked at.
        faults: text in a request -> what happens to the requests with it, one after the other: a
            status, "malformed" (the answer keeps to no form), "lost" (the connection is closed), or
            a float of seconds to wait.
        headers: sent with every fault that is a status.
        seen: a request's Authorization header and body, in the order of arrival.
        busiest: the most requests that were under way at once.
    """

    model: JudgeModel
    key: str | None = None
    faults: dict[str, list[int | float | str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    finished: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, body: str) -> int | float | str | None:
        """What happens to this request."""
        with self.lock:
            return next((f.pop(0) for text, f in self.faults.items() if text in body and f), None)

    def completion(self, body: dict[str, Any], malformed: bool) -> dict[str, Any]:
        """The body of an answer."""
        form = body.get("response_format")
        schema = None if form is None or malformed else form["json_schema"]["schema"]
        tokens, logits = self.model.answer(body["messages"], schema, body["max_tokens"])
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": self.model.tokenizer.decode(tokens)},
            "finish_reason": "length" if len(tokens) == body["max_tokens"] else "stop",
        }
        if body.get("logprobs"):
            likely = logits.float().log_softmax(-1)
            choice["logprobs"] = {
                "content": [
                    self._position(token, row, body["top_logprobs"])
                    for token, row in zip(tokens, likely, strict=True)
                ]
            }
        return {"object": "chat.completion", "model": body["model"], "choices": [choice]}

    def _position(self, token: int, row: torch.Tensor, count: int) -> dict[str, Any]:
        values, places = row.topk(count)
        likely = zip(places.tolist(), values.tolist(), strict=True)
        return {
            "token": self.model.tokenizer.decode(token),
            "logprob": row[token].item(),
            "top_logprobs": [
                {"token": self.model.tokenizer.decode(place), "logprob": value}
                for place, value in likely
            ],
        }


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is its own."""

    def do_POST(self) -> None:
        """One request."""
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with self.judge.lock:
            self.judge.seen.append((self.headers["Authorization"], json.loads(text)))
            self.judge.busy += 1
            self.judge.busiest = max(self.judge.busiest, self.judge.busy)
        with suppress(ConnectionError):  # who asked need not have waited
            self._answered(text)
        with self.judge.lock:
            self.judge.busy -= 1

    def _answered(self, text: str) -> None:
        judge, body = self.judge, json.loads(text)
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": f"no {self.path}"})
        given = self.headers["Authorization"]
        if judge.key is not None and given != f"Bearer {judge.key}":
            return self._send(401, {"error": f"wrong credentials: {given}"})
        fault = judge.fault(text)
        if isinstance(fault, int):
            return self._send(fault, {"error": "try later"}, judge.headers)
        if fault == "lost":
            self.close_connection = True
            return None
        if isinstance(fault, float):
            time.sleep(fault)
        answer = judge.completion(body, fault == "malformed")
        with judge.lock:
            judge.finished.append(body)
        return self._send(200, answer)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(model: JudgeModel) -> Iterator[JudgeServer]:
    """A server on a free port of 127.0.0.1, as long as the context lasts."""
    judge = JudgeServer(model)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("BoundHandler", (Handler,), {"judge": judge})
    )
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
