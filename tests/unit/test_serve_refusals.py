"""The HTTP API: what it refuses, and how."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.folders import MAX_LENGTH
from tests.http_api import MESSAGES, Server, chat, http_client, post, text_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.model.close()


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
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
        ({"max_tokens": 2000}, 400, "messages"),
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
        top_k=-1,
        logit_bias={},
        user="me",
    )
    assert text_of(response) == text_of(chat(server.pipeline()))


def test_a_message_of_text_parts_is_their_concatenation(server: Server) -> None:
    parts = [{"type": "text", "text": "what did "}, {"type": "text", "text": "the cat do"}]
    split = chat(server.pipeline(), messages=[{"role": "user", "content": parts}])
    assert text_of(split) == text_of(chat(server.pipeline()))


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", "b"], [[1], [2]], [True], [5000], [-1], 7])
def test_a_prompt_that_is_not_one_text_or_its_ids_is_refused(server: Server, prompt: Any) -> None:
    response = post(server.pipeline(), "/v1/completions", {"model": "base", "prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"\xff\xfe", b""])
def test_a_body_that_is_no_object_is_refused(server: Server, body: bytes) -> None:
    response = post(server.pipeline(), "/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_route_is_an_openai_error(server: Server) -> None:
    response = post(server.pipeline(), "/v1/nothing", {})
    assert (response.status_code, response.json()["error"]["code"]) == (404, None)


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
