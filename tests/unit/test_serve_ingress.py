"""The HTTP API: what it answers, and that it goes on when replicas die."""

import asyncio
from typing import Any

import httpx2
import openai
import pytest
from ray.exceptions import ActorDiedError

from tests.folders import MAX_LENGTH
from tests.http_api import (
    MESSAGES,
    Dying,
    Server,
    chat,
    events_of,
    http_client,
    text_of,
    with_openai,
)


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
    assert echo["version"] == server.catalog.guides[0].current.version
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

    (base, guide, *_), retrieved = with_openai(server.pipeline(), use)
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
