"""The HTTP API, with a real base replica in this process and no Ray."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from ray.exceptions import ActorDiedError

from pilotfish import Pilot, SamplingParams
from serve.base_model import BaseModel
from serve.catalog import Catalog, make_catalog
from serve.config import IngressConfig, parse_args
from serve.ingress import Pipeline
from serve.routes import build_routes
from tests.folders import MAX_LENGTH, save_base, save_guide
from tests.handles import LocalHandle

MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]


class Server:
    """One base replica, and ingresses in front of it."""

    def __init__(self, folder: Path) -> None:
        base, guide = save_base(folder / "base"), save_guide(folder / "guide", weight=0.5)
        config = parse_args(
            {
                "base": {"path": str(base), "num_slots": 4},
                "guides": [{"name": "helpful", "path": str(guide)}],
            }
        )
        self.catalog: Catalog = make_catalog(config, created=123)
        self.model = BaseModel(config, self.catalog, {})
        self.pilot = Pilot(base, {"helpful": guide}, device="cpu")

    def text(self, prompt: Any, guides: dict[str, float], **params: Any) -> str:
        return self.pilot.generate([prompt], SamplingParams(**params), guides=guides)[0].text

    def pipeline(
        self, breakage: Callable[[Any], Any] = lambda call: call, **ingress: Any
    ) -> Pipeline:
        return Pipeline(IngressConfig(**ingress), self.catalog, LocalHandle(self.model, breakage))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.model.close()


@asynccontextmanager
async def http_client(pipeline: Pipeline) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(build_routes(pipeline))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def with_openai(pipeline: Pipeline, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with http_client(pipeline) as http:
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
            )
            return await use(client)

    return asyncio.run(run())


def post(pipeline: Pipeline, path: str, body: Any) -> httpx2.Response:
    async def run() -> httpx2.Response:
        async with http_client(pipeline) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(run())


def chat(pipeline: Pipeline, **fields: Any) -> httpx2.Response:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields}
    return post(pipeline, "/v1/chat/completions", body)


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response: httpx2.Response) -> list[Any]:
    *events, done = [line[6:] for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_chat_answer_is_what_pilot_writes(server: Server) -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="base:helpful", messages=MESSAGES, seed=5, max_tokens=30
        )

    answer = with_openai(server.pipeline(), use)
    expected = server.text(MESSAGES, {"helpful": 0.5}, seed=5, max_tokens=30)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    prompt_ids = server.pilot.tokenizer.encode("\n\nHuman: what did the cat do\n\nAssistant:")
    assert answer.usage.prompt_tokens == len(prompt_ids)


def test_a_streamed_chat_is_the_whole_chat_in_pieces(server: Server) -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(
            model="base:helpful",
            messages=MESSAGES,
            seed=5,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in stream]

    *chunks, usage = with_openai(server.pipeline(), use)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == server.text(MESSAGES, {"helpful": 0.5}, seed=5, max_tokens=30)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason is not None
    assert len(chunks) > 10
    assert (usage.choices, usage.usage.completion_tokens) == ([], 30)


def test_text_and_token_ids_continue_alike_whole_and_streamed(server: Server) -> None:
    prompt = "the cat sat"
    ids = server.pilot.tokenizer.encode(prompt)

    async def use(client: openai.AsyncOpenAI) -> Any:
        settings: Any = {"model": "base", "seed": 2, "max_tokens": 20}
        whole = await client.completions.create(prompt=prompt, **settings)
        by_ids = await client.completions.create(prompt=ids, **settings)
        stream = await client.completions.create(prompt=[prompt], stream=True, **settings)
        pieces = [chunk.choices[0].text async for chunk in stream]
        return whole.choices[0].text, by_ids.choices[0].text, "".join(pieces)

    expected = server.text(prompt, {}, seed=2, max_tokens=20)
    assert with_openai(server.pipeline(), use) == (expected, expected, expected)


def test_guides_of_the_body_steer_and_are_named_in_the_answer(server: Server) -> None:
    response = chat(server.pipeline(), guides=[{"name": "helpful", "weight": 1.5}])
    assert text_of(response) == server.text(MESSAGES, {"helpful": 1.5}, seed=1, max_tokens=8)
    (echo,) = response.json()["guides"]
    assert (echo["name"], echo["weight"]) == ("helpful", 1.5)
    assert echo["version"] == server.catalog.guides[0].version
    assert echo["mean_kl"] > 0.01
    streamed = events_of(
        chat(server.pipeline(), guides=[{"name": "helpful", "weight": 1.5}], stream=True)
    )
    assert streamed[-1]["guides"] == [echo]


def test_weight_zero_is_the_base_exactly(server: Server) -> None:
    pipeline = server.pipeline()
    off = chat(pipeline, model="base:helpful", guides=[{"name": "helpful", "weight": 0}])
    assert (
        text_of(off) == text_of(chat(pipeline)) == server.text(MESSAGES, {}, seed=1, max_tokens=8)
    )
    assert off.json()["guides"][0]["mean_kl"] == 0.0


def test_the_fingerprint_follows_the_guides(server: Server) -> None:
    pipeline = server.pipeline()
    plain, guided = chat(pipeline).json(), chat(pipeline, model="base:helpful").json()
    assert plain["system_fingerprint"] != guided["system_fingerprint"]
    assert plain["system_fingerprint"] == chat(pipeline, seed=9).json()["system_fingerprint"]


def test_an_answer_ends_before_the_stop_string(server: Server) -> None:
    pipeline = server.pipeline()
    whole = text_of(chat(pipeline, max_tokens=60, ignore_eos=True))
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    settings = {"max_tokens": 60, "ignore_eos": True, "stop": stop}
    response = chat(pipeline, **settings)
    assert text_of(response) == expected
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    events = events_of(chat(pipeline, stream=True, **settings))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == expected


def test_token_ids_come_back_when_asked_for(server: Server) -> None:
    pipeline = server.pipeline()
    body = chat(pipeline, return_token_ids=True).json()
    ids = body["choices"][0]["token_ids"]
    assert len(ids) == body["usage"]["completion_tokens"]
    decoded = server.pilot.tokenizer.decode(ids, skip_special_tokens=True)
    assert body["choices"][0]["message"]["content"] == decoded
    events = events_of(chat(pipeline, return_token_ids=True, stream=True))[1:]
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == ids
    assert events[-1]["prompt_token_ids"] == body["prompt_token_ids"]


def test_models_are_the_base_and_a_card_per_guide_below_it(server: Server) -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        return (await client.models.list()).data, await client.models.retrieve("base:helpful")

    (base, guide), retrieved = with_openai(server.pipeline(), use)
    assert (base.id, base.parent, base.max_model_len) == ("base", None, MAX_LENGTH)
    assert (guide.id, guide.parent, guide.created) == ("base:helpful", "base", 123)
    assert guide.root.endswith("guide")
    assert retrieved == guide


def test_health_and_ready_answer_200(server: Server) -> None:
    async def run() -> list[int]:
        async with http_client(server.pipeline()) as client:
            return [(await client.get(path)).status_code for path in ("/health", "/ready")]

    assert asyncio.run(run()) == [200, 200]


def test_ready_is_503_while_no_base_answers(server: Server) -> None:
    def dead(call: Any) -> Any:
        call.cancel()
        raise ActorDiedError

    async def run() -> httpx2.Response:
        async with http_client(server.pipeline(dead)) as client:
            return await client.get("/ready")

    assert asyncio.run(run()).status_code == 503


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
    pipeline = server.pipeline(max_in_flight=2, retry_after_s=7)

    async def run() -> list[httpx2.Response]:
        async with http_client(pipeline) as client:
            body = {"model": "base", "messages": MESSAGES, "max_tokens": 60, "ignore_eos": True}
            calls = [client.post("/v1/chat/completions", json=body) for _ in range(5)]
            return await asyncio.gather(*calls)

    responses = asyncio.run(run())
    assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
    busy = next(response for response in responses if response.status_code == 429)
    assert busy.headers["Retry-After"] == "7"
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    assert pipeline.admission.num_in_flight == 0


class Dying:
    """Streams of which some end in an actor's death, after `tokens` items."""

    def __init__(self, num_deaths: float, *, items: int) -> None:
        self.num_deaths, self.items = num_deaths, items

    def __call__(self, call: Any) -> Any:
        if self.num_deaths <= 0:
            return call
        self.num_deaths -= 1
        return _DyingStream(call, self.items)


class _DyingStream:
    def __init__(self, stream: Any, items: int) -> None:
        self._stream, self._items = stream, items

    async def __anext__(self) -> Any:
        if self._items == 0:
            raise ActorDiedError
        self._items -= 1
        return await anext(self._stream)

    def cancel(self) -> None:
        self._stream.cancel()


@pytest.mark.parametrize("items", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_changes_nothing_for_the_client(
    server: Server, items: int, stream: bool
) -> None:
    settings: Any = {"stream": stream, "max_tokens": 40, "ignore_eos": True}
    answers = [
        chat(server.pipeline(breakage), **settings)
        for breakage in (Dying(0, items=0), Dying(2, items=items))
    ]
    if not stream:
        assert text_of(answers[0]) == text_of(answers[1])
        return
    texts = [
        "".join(e["choices"][0]["delta"].get("content", "") for e in events_of(answer))
        for answer in answers
    ]
    assert texts[0] == texts[1] != ""


def test_after_the_last_attempt_the_status_is_500_and_names_no_internals(server: Server) -> None:
    for stream in (False, True):
        response = chat(server.pipeline(Dying(float("inf"), items=0)), stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "Actor" not in response.text


def test_in_the_middle_of_a_stream_the_error_is_an_event_before_done(server: Server) -> None:
    class OnceThenDead(Dying):
        def __call__(self, call: Any) -> Any:
            self.items = 2 if self.num_deaths == 9 else 0
            return super().__call__(call)

    response = chat(server.pipeline(OnceThenDead(9, items=2)), stream=True, ignore_eos=True)
    assert response.status_code == 200
    *pieces, error = events_of(response)
    assert len(pieces) >= 2
    assert error["error"]["type"] == "server_error"
