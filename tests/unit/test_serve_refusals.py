"""The HTTP API: what it refuses, and how."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from tests.folders import MAX_LENGTH
from tests.http_api import MESSAGES, Server, chat, complete, http_client, post, text_of


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"n": 0}, 400, "n"),
        ({"n": 129}, 400, "n"),
        ({"n": 40, "guides": [{"name": "best", "args": {"num_drafts": 10}}]}, 400, "n"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"5000": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"stop_token_ids": [5000]}, 400, "stop_token_ids"),
        ({"min_tokens": 9}, 400, "min_tokens"),
        ({"min_p": 2}, 400, "min_p"),
        ({"echo": True}, 400, "echo"),
        ({"include_stop_str_in_output": True}, 400, "include_stop_str_in_output"),
        ({"completed_token_ids": [5000]}, 400, "completed_token_ids"),
        ({"completed_token_ids": [40] * 8}, 400, "completed_token_ids"),
        ({"completed_token_ids": [40, 1]}, 400, "completed_token_ids"),
        ({"completed_token_ids": [40], "n": 2}, 400, "completed_token_ids"),
        ({"completed_token_ids": [40], "response_guide": "aligner"}, 400, "completed_token_ids"),
        ({"completed_token_ids": [40], "model": "base:best"}, 400, "completed_token_ids"),
        ({"response_guide": "helpful"}, 400, "response_guide"),
        ({"response_guide": "unheard"}, 404, "response_guide"),
        ({"response_guide": []}, 400, "response_guide"),
        ({"response_guide": "aligner", "logprobs": True}, 400, "logprobs"),
        ({"model": "base:best", "temperature": 0}, 400, "temperature"),
        ({"draft": "proxy"}, 400, "draft"),
        ({"draft": "far"}, 400, "draft"),
        ({"draft": "unheard"}, 404, "draft"),
        ({"draft": {"guide": "helpful", "num_tokens": 17}}, 400, "draft"),
        ({"vllm_xargs": {"weight": 1}}, 400, "vllm_xargs"),
        ({"vllm_xargs": {"guide": "helpful"}, "guides": []}, 400, "vllm_xargs"),
        ({"vllm_xargs": {"draft": "helpful"}, "draft": "helpful"}, 400, "vllm_xargs"),
        ({"request_id": "a b"}, 400, "request_id"),
        ({"request_id": "a\r\nSet-Cookie: x"}, 400, "request_id"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"store": True}, 400, "store"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": 1e-9}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 9}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": 2**64}, 400, "seed"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "so"}]}, 400, "messages"),
        ({"guides": [{"name": "helpful", "wieght": 1}]}, 400, "guides"),
        ({"guides": [{"name": "helpful", "weight": 1e9}]}, 400, "guides"),
        ({"guides": [{"name": "helpful"}, {"name": "helpful"}]}, 400, "guides"),
        ({"guides": [{"name": "unheard"}]}, 404, "guides"),
        ({"model": "base:unheard"}, 404, "model"),
        ({"guides": [{"name": "proxy", "args": {"p_t": 2}}]}, 400, "guides"),
        ({"guides": [{"name": "proxy", "args": {"features": "pre_token"}}]}, 400, "guides"),
        ({"guides": [{"name": "best", "args": {"reward": "x"}}]}, 400, "guides"),
        ({"guides": [{"name": "helpful", "args": {"a": {"b": 1}}}]}, 400, "guides"),
        ({"guides": [{"name": "aligner"}, {"name": "helpful"}]}, 400, "guides"),
        ({"guides": [{"name": "helpful", "version": "9"}]}, 404, "guides"),
        ({"max_tokens": 2000}, 400, "messages"),
        ({"max_tokens": 10**400}, 400, "messages"),
        ({"temperature": 10**400}, 400, "temperature"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_the_field(
    server: Server, fields: dict[str, Any], status: int, param: str
) -> None:
    response = chat(server.pipeline(), **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


def test_values_that_ask_for_nothing_are_fine(server: Server) -> None:
    response = chat(
        server.pipeline(),
        n=1,
        presence_penalty=0.0,
        logprobs=False,
        tools=None,
        parallel_tool_calls=True,
        response_format={"type": "text"},
        service_tier="auto",
        top_k=-1,
        logit_bias={},
        user="me",
    )
    assert text_of(response) == text_of(chat(server.pipeline()))


def test_messages_of_the_client_and_a_developer_are_understood(server: Server) -> None:
    first = [{"role": "system", "content": "be kind"}, *MESSAGES]
    answered = {"role": "assistant", "content": "it sat", "refusal": None, "annotations": []}
    turns = [*first, {**answered, "tool_calls": None}, {"role": "user", "content": "where"}]
    plain = [*first, {"role": "assistant", "content": "it sat"}, turns[-1]]
    assert text_of(chat(server.pipeline(), messages=turns)) == server.text(
        plain, {}, seed=1, max_tokens=8
    )
    developer = [{"role": "developer", "content": "be kind"}, *MESSAGES]
    assert text_of(chat(server.pipeline(), messages=developer)) == text_of(
        chat(server.pipeline(), messages=first)
    )


def test_a_message_of_text_parts_is_their_concatenation(server: Server) -> None:
    parts = [{"type": "text", "text": "what did "}, {"type": "text", "text": "the cat do"}]
    split = chat(server.pipeline(), messages=[{"role": "user", "content": parts}])
    assert text_of(split) == text_of(chat(server.pipeline()))


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], ["a", [1]], [[1], [True]], [True], [5000], [-1], 7, [None]]
)
def test_a_prompt_that_is_neither_texts_nor_ids_is_refused(server: Server, prompt: Any) -> None:
    response = post(server.pipeline(), "/v1/completions", {"model": "base", "prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_fields_of_text_completions_are_checked_too(server: Server) -> None:
    for fields, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": ["a", "b"], "completed_token_ids": [40]}, "completed_token_ids"),
        ({"echo": True, "response_guide": "aligner"}, "echo"),
        ({"messages": MESSAGES}, "messages"),
    ):
        response = complete(server.pipeline(), **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    ids = complete(server.pipeline(), prompt=[40, 41], response_guide="aligner")
    assert ids.status_code == 400  # there is no question to read
    assert "token ids alone" in ids.json()["error"]["message"]


def _body(**fields: Any) -> bytes:
    return json.dumps({"model": "base", "messages": MESSAGES, **fields}).encode()


BODIES = [
    *(b"", b"{", b"[]", b'"text"', b"null", b"1", b"\xff\xfe", b"\x00", b"[" * 100_000),
    *(_body(temperature=float(x)) for x in ("nan", "inf", "-inf")),
    _body(temperature="!").replace(b'"!"', b"1e999"),
    _body(max_tokens="!").replace(b'"!"', b"9" * 5000),
    *(_body(user=x) for x in ("\ud800", 7, [])),
    _body(**{"\ud800": 1}),
    _body(guides=[{"name": "helpful", "args": {"k": "\ud800"}}]),
    _body(guides=[{"name": "proxy", "args": {"top_k": 10**30}}]),
    _body(messages="!").replace(b'"!"', b'[{"role":' * 500),
    _body(messages="!").replace(b'"!"', b"[" * 900 + b"]" * 900),
    _body(messages=[{"role": "user", "content": "!"}]).replace(b"!", b"\xed\xa0\x80"),
    _body(stop_token_ids=[10**30]),
    _body(seed=-(10**30)),
    _body(n=10**30),
    _body(prompt=[1] * 10),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/score"])
def test_what_is_no_request_is_refused_in_openais_shape(
    server: Server, path: str, body: bytes
) -> None:
    response = post(server.pipeline(), path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_numbers_that_are_only_large_are_fine(server: Server) -> None:
    large = chat(server.pipeline(), top_k=10**30)
    assert text_of(large) == text_of(chat(server.pipeline()))


def test_a_body_must_say_that_it_is_json(server: Server) -> None:
    async def run(kind: str) -> httpx2.Response:
        async with http_client(server.pipeline()) as client:
            headers = {"Content-Type": kind}
            return await client.post("/v1/chat/completions", content=_body(), headers=headers)

    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
        response = asyncio.run(run(kind))
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_ids_in_headers_are_checked(server: Server) -> None:
    async def run(name: str, value: bytes) -> httpx2.Response:
        async with http_client(server.pipeline()) as client:
            headers = [(name.encode(), value), (b"content-type", b"application/json")]
            return await client.post("/v1/chat/completions", content=_body(), headers=headers)

    for name in ("X-Request-Id", "X-Session-Id"):
        for value in (b"x" * 129, b"a b", "é".encode()):
            assert asyncio.run(run(name, value)).status_code == 400
    assert asyncio.run(run("X-Request-Id", b"mine")).headers["X-Request-Id"] == "mine"


def test_an_unknown_route_is_an_openai_error(server: Server) -> None:
    response = post(server.pipeline(), "/v1/nothing", {})
    assert (response.status_code, response.json()["error"]["code"]) == (404, None)
    wrong = post(server.pipeline(), "/v1/models", {})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (405, None)
    assert wrong.headers["Allow"] == "GET"


def test_the_default_length_never_exceeds_what_the_context_leaves(server: Server) -> None:
    body = {"model": "base", "prompt": [40] * (MAX_LENGTH - 3), "ignore_eos": True}
    response = post(server.pipeline(), "/v1/completions", body)
    assert response.json()["usage"]["completion_tokens"] == 3


def test_requests_beyond_the_limit_are_told_to_come_back(server: Server) -> None:
    pipeline = server.pipeline(max_in_flight=2, max_queued=1, retry_after_s=7)

    async def run() -> list[httpx2.Response]:
        async with http_client(pipeline) as client:
            body = {"model": "base", "messages": MESSAGES, "max_tokens": 60, "ignore_eos": True}
            calls = [client.post("/v1/chat/completions", json=body) for _ in range(5)]
            return await asyncio.gather(*calls)

    responses = asyncio.run(run())
    assert sorted(response.status_code for response in responses) == [200, 200, 200, 429, 429]
    busy = next(response for response in responses if response.status_code == 429)
    assert busy.headers["Retry-After"] == "7"
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    assert pipeline.admission.num_in_flight == 0
