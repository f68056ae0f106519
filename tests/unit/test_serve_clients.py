"""The HTTP API over a socket, for clients that know nothing of us."""

import asyncio
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from serve.api.routes import build_routes
from tests.http_api import MESSAGES, Server


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    app = build_routes(server.pipeline())
    http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    http.should_exit = True
    thread.join()


def expected(server: Server, **params: Any) -> str:
    return server.text(MESSAGES, {"helpful": 0.5}, **params)


def test_the_openai_client_reads_answers_and_streams(server: Server, url: str) -> None:
    text = expected(server, seed=3, max_tokens=20)
    settings: Any = {"model": "base:helpful", "messages": MESSAGES, "seed": 3, "max_tokens": 20}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(n=2, **settings)
        assert whole.choices[0].message.content == text
        pieces = client.chat.completions.create(stream=True, **settings)
        assert "".join(c.choices[0].delta.content or "" for c in pieces) == text
        with client.chat.completions.with_streaming_response.create(**settings) as raw:
            assert json.loads(raw.read())["choices"][0]["message"]["content"] == text
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(presence_penalty=1, **settings)
        assert refused.value.param == "presence_penalty"
        ids = client.completions.create(model="base", prompt=[40, 41], max_tokens=2, echo=True)
        assert ids.choices[0].text.startswith(str(server.pilot.tokenizer.decode([40, 41])))


def test_langchain_invokes_streams_and_reads_logprobs(server: Server, url: str) -> None:
    chat = ChatOpenAI(
        model="base:helpful",
        base_url=f"{url}/v1",
        api_key=SecretStr("none"),
        seed=3,
        max_completion_tokens=20,
        temperature=1,
        max_retries=0,
    )
    question, text = MESSAGES[0]["content"], expected(server, seed=3, max_tokens=20)
    answer = chat.invoke(question)
    assert answer.content == text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 20
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert "".join(str(chunk.content) for chunk in chat.stream(question)) == text
    logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
    content = logprobs.response_metadata["logprobs"]["content"]
    done = server.completion(MESSAGES, {"helpful": 0.5}, seed=3, max_tokens=20)
    assert [entry["logprob"] for entry in content] == pytest.approx(done.logprobs)
    history = [("system", "be kind"), ("human", "hi"), answer, ("human", "and then")]
    assert chat.invoke(history).content
    guided = chat.bind(extra_body={"guides": [{"name": "other", "weight": 1}]}).invoke(question)
    assert guided.content == server.text(MESSAGES, {"other": 1}, seed=3, max_tokens=20)

    async def run() -> list[Any]:
        return await chat.abatch([question, question])

    assert [each.content for each in asyncio.run(run())] == [text, text]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_events_line_by_line(server: Server, url: str) -> None:
    body = {"model": "base:helpful", "messages": MESSAGES, "seed": 3, "max_tokens": 9}
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", json.dumps({**body, "stream": True})],
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = [line for line in done.stdout.splitlines() if line]
    assert last == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == expected(server, seed=3, max_tokens=9)


def test_a_client_that_goes_away_frees_its_slots(server: Server, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="base",
            messages=MESSAGES,
            max_tokens=900,
            n=3,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert server.model._decoding.thread.num_open == 3
        stream.close()
        deadline = time.monotonic() + 1
        while server.model._decoding.thread.num_open:
            assert time.monotonic() < deadline
            time.sleep(0.01)
