"""The judge reward against a real server with a small model of random weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rewards import judge_engines
from rewards.calling import Scores, call_reward
from rewards.environment import python_of
from rewards.judge import Judge, VllmJudge
from rewards.judge_engines import Answer, Token, wrong_url
from rewards.judge_scoring import data_uri, expected_score, text_of, written_score
from rewards.keys import wrong_key
from rewards.serving import EnvironmentProcess
from tests.rewards.judge_server import (
    JudgeModel,
    JudgeServer,
    image_of,
    letter_tokenizer,
    mean_score,
    serving,
    write_llama,
)

RUBRIC = "Rate <text>{{ completion }}</text> for {{ prompt }}."
SEEN = "Rate the image for {{ prompt }}."
KEY = "sk-SECRET-4711"
LETTERS = ["a", "bb", "ccc", "a cat sat", "7 * 8", "zzzzzz"]


@pytest.fixture(scope="module")
def model() -> JudgeModel:
    return JudgeModel()


@pytest.fixture
def server(model: JudgeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr(judge_engines, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(model) as running:
        yield running


def judge(server: JudgeServer, **fields: Any) -> Any:
    """The reward; its name at the endpoint is not looked at."""
    return Judge(**{"model": "tiny", "endpoint": server.url, "rubric": RUBRIC, **fields}).build()


def told(text: str, prompt: str = "p") -> list[dict[str, Any]]:
    """What RUBRIC makes of a text."""
    return [{"role": "user", "content": f"Rate <text>{text}</text> for {prompt}."}]


def shown(frames: np.ndarray) -> list[dict[str, Any]]:
    """What SEEN makes of frames, for the prompt p."""
    images = [{"type": "image_url", "image_url": {"url": data_uri(frame)}} for frame in frames]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": "Rate the image for p."}]}
    ]


def noise(seed: int, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), np.uint8)


def called(function: Any, completions: list[Any], **columns: list[Any]) -> Scores:
    return call_reward("judge", function, ["p"] * len(completions), completions, columns, 64)


def test_written_scores_are_the_model_s_own_in_order_while_requests_overlap(server: JudgeServer):
    server.faults = {"<text>a<": [0.5]}
    reward = judge(server, concurrency=3)
    scores = reward(["p"] * len(LETTERS), LETTERS)
    schema: Any = Judge(model="m", endpoint="http://h", rubric="r").sampling.schema
    direct = [server.model.answer(told(text), schema, 512)[0] for text in LETTERS]
    wanted = [json.loads(server.model.tokenizer.decode(tokens))["score"] for tokens in direct]
    assert scores == [(score - 1) / 4 for score in wanted] and len(set(scores)) > 1
    assert "<text>a<" not in json.dumps(server.finished[0]), "the first was not the last to end"
    assert server.busiest == 3


def test_a_schema_without_reasons_and_another_scale_are_kept(server: JudgeServer):
    reward = judge(server, reasoning=False, minimum=-3, maximum=12, normalise=False)
    scores = reward(["p"] * 3, LETTERS[:3])
    form = server.seen[0][1]["response_format"]["json_schema"]
    assert form["strict"] and list(form["schema"]["properties"]) == ["score"]
    direct = [server.model.answer(told(t), form["schema"], 99)[0] for t in LETTERS[:3]]
    assert scores == [
        json.loads(server.model.tokenizer.decode(tokens))["score"] for tokens in direct
    ]


def test_expected_scores_are_the_mean_by_the_first_token_s_probabilities(server: JudgeServer):
    scores = judge(server, score="expected", normalise=False)(["p"] * len(LETTERS), LETTERS)
    wanted = [mean_score(server.model, told(text), range(1, 6)) for text in LETTERS]
    assert scores == pytest.approx(wanted, abs=1e-4) and max(scores) - min(scores) > 0.1
    zero_to_one = judge(server, score="expected")(["p"] * len(LETTERS), LETTERS)
    assert zero_to_one == pytest.approx([(score - 1) / 4 for score in wanted], abs=1e-4)


def test_an_image_is_looked_at(server: JudgeServer):
    media = [noise(0), noise(1), noise(0)[..., :1]]
    reward = judge(server, rubric=SEEN, score="expected", normalise=False)
    scores = reward(["p"] * 3, media)
    colour = [*media[:2], np.repeat(media[2], 3, axis=-1)]
    wanted = [mean_score(server.model, shown(frames), range(1, 6)) for frames in colour]
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert min(abs(scores[0] - scores[1]), abs(scores[0] - scores[2])) > 0.01


def test_chosen_frames_of_a_video_are_sent_unchanged_and_in_order(server: JudgeServer):
    video = noise(5, frames=11)
    [score] = judge(server, rubric=SEEN, frames=3, score="expected", normalise=False)(
        ["p"], [video]
    )
    parts = server.seen[0][1]["messages"][0]["content"]
    sent = np.stack([image_of(part["image_url"]["url"]) for part in parts[:-1]])
    np.testing.assert_array_equal(sent, video[[1, 5, 9]])
    assert parts[-1] == {"type": "text", "text": "Rate the image for p."}
    wanted = mean_score(server.model, shown(video[[1, 5, 9]]), range(1, 6))
    backwards = mean_score(server.model, shown(video[[9, 5, 1]]), range(1, 6))
    assert score == pytest.approx(wanted, abs=1e-4) != pytest.approx(backwards, abs=1e-4)


def test_the_key_is_sent_whatever_netrc_says(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.key = KEY
    assert called(judge(server, api_key_env="JUDGE_KEY"), ["a"]).failures == ()
    server.key = None
    assert called(judge(server), ["a"]).failures == ()
    assert [header for header, _ in server.seen] == [f"Bearer {KEY}", None]


@pytest.mark.parametrize("wrong", [True, False])
def test_a_refused_key_is_named_once_and_never_shown(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, wrong: bool
):
    server.key = "another"
    monkeypatch.setenv("JUDGE_KEY", KEY)
    reward = judge(server, **({"api_key_env": "JUDGE_KEY"} if wrong else {}))
    [failure] = called(reward, ["a"]).failures
    assert "401" in failure.message and "api_key_env" in failure.message
    assert ("***" in failure.message) == wrong and KEY not in failure.message
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [429, 503, "lost"])
def test_what_can_pass_is_tried_again(server: JudgeServer, fault: int | str):
    server.faults = {"<text>bb<": [fault, fault]}
    undisturbed = called(judge(server), ["ccc"]).values[0]
    scores = called(judge(server, attempts=3), ["bb", "ccc"])
    assert scores.failures == () and scores.values[1] == undisturbed
    assert len(server.seen) == 1 + 3 + 1


def test_what_does_not_pass_ends_with_the_attempts(server: JudgeServer):
    server.faults = {"<text>bb<": [503] * 9}
    scores = called(judge(server, attempts=2), ["a", "bb"])
    [failure] = scores.failures
    assert failure.index == 1 and "503" in failure.message and "2 attempts" in failure.message
    assert len(server.seen) == 3 and not np.isnan(scores.values[0])


def test_the_wait_a_server_asks_for_is_kept(server: JudgeServer):
    server.faults, server.headers = {"bb": [429]}, {"Retry-After": "1"}
    started = time.monotonic()
    assert called(judge(server), ["bb"]).failures == ()
    assert time.monotonic() - started > 1


@pytest.mark.parametrize("status", [302, 400, 404])
def test_another_refusal_is_not_tried_again_and_no_redirect_followed(
    server: JudgeServer, status: int
):
    server.faults, server.headers = {"bb": [status]}, {"Location": server.url + "/chat/completions"}
    [failure] = called(judge(server), ["bb"]).failures
    assert f'status {status}: \'{{"error": "try later"}}\'' in failure.message
    assert len(server.seen) == 1


def test_where_nobody_listens_the_endpoint_is_named(model: JudgeModel):
    with serving(model) as gone:
        url = gone.url
    reward = Judge(model="m", endpoint=url, rubric="r", attempts=1).build()
    [failure] = called(reward, ["a"]).failures
    assert "see field 'endpoint'" in failure.message and "refused" in failure.message


def test_a_malformed_answer_fails_its_sample_alone_and_is_not_paid_for_again(server: JudgeServer):
    server.faults = {"<text>bb<": ["malformed"]}
    scores = called(judge(server, max_tokens=60), ["a", "bb", "ccc"])
    [failure] = scores.failures
    tokens, _ = server.model.answer(told("bb"), None, 60)
    assert repr(server.model.tokenizer.decode(tokens)) in failure.message
    assert failure.index == 1 and "raise 'max_tokens'" in failure.message
    assert np.isfinite(scores.values[[0, 2]]).all() and len(server.seen) == 3


def test_a_late_answer_is_a_failure_and_not_asked_for_twice(server: JudgeServer):
    server.faults = {"<text>bb<": [1.0]}
    called(judge(server), ["a"])
    scores = called(judge(server, timeout=0.5, attempts=3), ["bb"])
    assert "no answer within 0.5 s" in scores.failures[0].message and len(server.seen) == 2


def test_an_endless_answer_is_not_read(server: JudgeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_engines, "MAX_BODY", 50)
    [failure] = called(judge(server), ["a"]).failures
    assert "more than 50 bytes" in failure.message


def test_the_rubric_has_columns_conversations_and_a_system_message(server: JudgeServer):
    rubric = "{{ prompt }}|{{ completion }}|{{ answer }}{% for tag in tags %}-{{ tag }}{% endfor %}"
    reward = judge(server, rubric=rubric, system="Be {{ strict }}.")
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    reply = [{"role": "assistant", "content": [{"type": "text", "text": "{{ 7 * 7 }}"}]}]
    assert None not in reward([prompt], [reply], answer=[42], tags=[["x", "y"]])
    assert server.seen[0][1]["messages"] == [
        {"role": "system", "content": "Be {{ strict }}."},
        {"role": "user", "content": "system: S\n\nuser: U|{{ 7 * 7 }}|42-x-y"},
    ]


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ("{{ gold }}", "'gold' is undefined; a sample here has answer, completion, prompt"),
        ("{{ prompt.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ answer.append(1) }}", "access to attribute 'append'"),
        ("{{ prompt + 1 }}", "field 'rubric'"),
    ],
)
def test_a_rubric_that_cannot_be_filled_is_one_message_and_no_request(
    server: JudgeServer, rubric: str, message: str
):
    failures = called(judge(server, rubric=rubric), ["a", "b"], answer=[[1], [2]]).failures
    assert len(failures) == 2 and len({failure.message for failure in failures}) == 1
    assert message in failures[0].message and server.seen == []


def test_what_is_no_text_or_image_fails_its_sample_alone(server: JudgeServer):
    completions: list[Any] = ["a", 3, [], [{"role": "assistant", "content": None}], noise(0)[0]]
    scores = called(judge(server, rubric="{{ prompt }}"), completions)
    assert [failure.index for failure in scores.failures] == [1, 2, 3, 4]
    assert len(server.seen) == 1 and "uint8" in scores.failures[3].message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": "localhost:8000/v1"}, "not a base URL"),
        ({"endpoint": "file:///etc/passwd"}, "not a base URL"),
        ({"endpoint": "http://h:port/v1"}, "no URL"),
        ({"endpoint": "https://me:hush@h/v1"}, "api_key_env"),
        ({"endpoint": "https://h/v1?key=hush"}, "api_key_env"),
        ({"rubric": "line\n{% if %}"}, "no Jinja2 template: line 2"),
        ({"api_key_env": "JUDGE_NO_KEY"}, "JUDGE_NO_KEY is not set"),
    ],
)
def test_a_mistake_is_named_at_validation_and_when_built(fields: dict[str, str], message: str):
    config = Judge(**{"model": "m", "endpoint": "https://h/v1", "rubric": RUBRIC, **fields})
    problem = config.problem()
    assert problem is not None and message in problem and "hush" not in problem
    with pytest.raises(ValueError) as raised:
        config.build()
    assert str(raised.value) == problem


def test_a_key_in_place_of_its_name_or_of_strange_letters_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
):
    assert KEY not in str(wrong_key(KEY)) and "NAME" in str(wrong_key(KEY))
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert KEY not in str(wrong_key("JUDGE_KEY")) and "JUDGE_KEY" in str(wrong_key("JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert wrong_key("JUDGE_KEY") is None and wrong_url("http://[::1]:8000/v1") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minimum": 5, "maximum": 5}, "1 to 100 above"),
        ({"maximum": 102}, "1 to 100 above"),
        ({"score": "expected", "maximum": 10}, "within 0 to 9"),
        ({"rubric": "nowhere.j2"}, "'nowhere.j2' is no text file"),
    ],
)
def test_scales_and_files_that_cannot_be(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Judge(**{"model": "m", "endpoint": "http://h", "rubric": "r", **fields})


def test_a_rubric_s_file_is_read_with_the_recipe(tmp_path: Path):
    (tmp_path / "rubric.j2").write_text(f"{RUBRIC}\n")
    config = Judge(model="m", endpoint="http://h", rubric=str(tmp_path / "rubric.j2"))
    assert config.rubric == f"{RUBRIC}\n"
    assert Judge.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 4.0}',
        '{"score": "4"}',
        '{"score": true}',
        '{"score": 6}',
        '{"score": 4, "weight": 9}',
        '{"reasoning": null}',
        '```json\n{"score": 4}\n```',
        "[4]",
        "",
    ],
)
def test_other_forms_of_an_answer_are_no_score(text: str):
    with pytest.raises(ValueError, match="the judge's"):
        written_score(Answer(text, cut=False, tokens=()), range(1, 6))


def test_a_score_may_come_with_reasons_or_alone():
    assert written_score(Answer('{"score": 4}', False, ()), range(1, 6)) == 4
    assert written_score(Answer(' {"score":1,"reasoning":"x"}', True, ()), range(1, 6)) == 1


def test_the_expectation_takes_spaces_together_and_leaves_out_what_is_no_score():
    likely = {"4": 0.4, " 4": 0.2, "2": 0.2, "7": 0.1, "four": 0.1}
    first = Token("4", tuple((text, math.log(p)) for text, p in likely.items()))
    blank = Token(" \n", (("5", 0.0),))
    score = expected_score(Answer("\n4", False, (blank, first, blank)), range(1, 6))
    assert score == pytest.approx((4 * 0.6 + 2 * 0.2) / 0.8, abs=1e-12)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "no log-probabilities"),
        ((Token("I", (("I", -0.2), ("4", -1.7))),), "18.3% of the probability"),
    ],
)
def test_an_answer_that_does_not_begin_with_a_score_has_no_expectation(
    tokens: tuple[Token, ...], message: str
):
    with pytest.raises(ValueError, match=message) as raised:
        expected_score(Answer("I think" + "!" * 900, False, tokens), range(1, 6))
    assert "!" * 193 in str(raised.value) and "!" * 194 not in str(raised.value)


def test_text_of_other_things_is_refused():
    assert text_of("as it is\n") == "as it is\n"
    with pytest.raises(ValueError, match="a judge reads text"):
        text_of([{"role": "user", "content": [{"type": "image"}]}])


def test_a_vllm_judge_s_mistakes(tmp_path: Path):
    config = VllmJudge(model=str(tmp_path), rubric=RUBRIC)
    assert "no directory of a model" in str(config.mistake())
    assert "whole ones" in str(VllmJudge(model="a/b", rubric=RUBRIC, gpus=1.5).mistake())
    assert VllmJudge(model="a/b", rubric=RUBRIC, gpus=0.5).mistake() is None


@pytest.mark.slow
def test_vllm_scores_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if python_of("vllm-cpu") is None:
        pytest.skip("no environment with vLLM is ready: run 'rectify env create vllm-cpu'")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    network, tokenizer = write_llama(tmp_path), letter_tokenizer()
    digits = tokenizer.convert_tokens_to_ids(list("12345"))
    wanted: list[float] = []
    for text in LETTERS:
        ids = tokenizer.apply_chat_template(
            told(text), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            weights = network(**ids).logits[0, -1, digits].softmax(-1)
        wanted.append(float(weights @ torch.arange(5.0)) / 4)
    fields: dict[str, Any] = {"model": str(tmp_path), "rubric": RUBRIC, "gpus": 0, "context": 256}
    prompts = ["p"] * len(LETTERS)
    fields["dtype"] = "float32"
    expected = EnvironmentProcess(VllmJudge(**fields, score="expected"), 1)
    scores, _ = expected.score(prompts, {}, LETTERS)
    assert scores.failures == () and np.ptp(scores.values) > 0.05
    np.testing.assert_allclose(scores.values, wanted, atol=1e-3)
    written = EnvironmentProcess(VllmJudge(**fields, reasoning=False, max_tokens=20), 1)
    scores, _ = written.score(prompts, {}, LETTERS)
    assert scores.failures == () and set(scores.values) == {0, 0.75}
