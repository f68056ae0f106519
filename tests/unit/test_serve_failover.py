"""The HTTP API while replicas die: nothing is lost, repeated or changed, in whatever stage."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tests.handles import LocalResponse, LocalStream
from tests.http_api import MESSAGES, Dying, Server, chat, complete, events_of, http_client, text_of

MAX_TOKENS = 6
TWO = [{"name": "helpful", "weight": 0.8}, {"name": "far", "weight": 0.4}]


class DyingOnce:
    """The stream of one call, counted from the first, dies after some items."""

    def __init__(self, call: int, items: int) -> None:
        self._calls_before = call
        self._items = items

    def __call__(self, call: Any) -> Any:
        if not isinstance(call, LocalStream):
            return call
        self._calls_before -= 1
        return Dying(1, self._items)(call) if self._calls_before == -1 else call


def settings(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True, **fields}


def choices_of(body: Any) -> list[tuple[Any, ...]]:
    choices = body["choices"]
    return [
        (c["index"], c["message"]["content"], c["token_ids"], c["finish_reason"]) for c in choices
    ]


@pytest.mark.parametrize("items", range(MAX_TOKENS + 1))
@pytest.mark.parametrize("dies", range(3))
def test_any_choice_goes_on_from_any_position(server: Server, items: int, dies: int) -> None:
    fields = settings(n=3, guides=TWO)
    body = chat(server.pipeline(DyingOnce(dies, items)), **fields).json()
    assert choices_of(body) == choices_of(chat(server.pipeline(), **fields).json())
    assert body["usage"]["completion_tokens"] == 3 * MAX_TOKENS


@pytest.mark.parametrize("items", [0, 1, 4])
def test_the_stream_of_several_choices_goes_on(server: Server, items: int) -> None:
    fields = settings(n=3, guides=TWO)
    events = events_of(chat(server.pipeline(Dying(3, items)), stream=True, **fields))
    choices = [choice for event in events for choice in event["choices"]]
    whole = chat(server.pipeline(), **fields).json()["choices"]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        ids = [i for choice in own for i in choice.get("token_ids", [])]
        expected = whole[index]["message"]["content"], whole[index]["token_ids"]
        assert (text, ids) == expected


@pytest.mark.parametrize("items", [0, 1, 2, 5])
@pytest.mark.parametrize("guide", ["best", "blocks"])
def test_drafts_go_on_and_are_chosen_alike(server: Server, guide: str, items: int) -> None:
    fields = settings(guides=[{"name": guide, "weight": 1}], max_tokens=12)
    whole = choices_of(chat(server.pipeline(), **fields).json())
    assert choices_of(chat(server.pipeline(Dying(4, items)), **fields).json()) == whole


def test_a_choice_between_drafts_is_asked_for_again(server: Server) -> None:
    num_asked = 0

    def break_answers(call: Any) -> Any:
        nonlocal num_asked
        if isinstance(call, LocalResponse):
            num_asked += 1
            if num_asked <= 2:
                call.cancel()
                raise ActorDiedError
        return call

    fields = settings(guides=[{"name": "best", "weight": 1}])
    whole = choices_of(chat(server.pipeline(), **fields).json())
    assert choices_of(chat(server.pipeline(break_answers), **fields).json()) == whole
    assert num_asked == 3


@pytest.mark.parametrize("items", range(7))
@pytest.mark.parametrize("stream", [False, True])
def test_a_revision_goes_on_from_any_position(server: Server, items: int, stream: bool) -> None:
    guides = [{"name": name} for name in ("helpful", "brief", "aligner")]
    fields = settings(guides=guides, return_steering=True)
    whole = chat(server.pipeline(), **fields).json()["choices"][0]
    pipeline = server.pipeline(Dying(1, items=2), revising=Dying(2, items))
    answer = chat(pipeline, stream=stream, **fields)
    if stream:
        events = events_of(answer)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        assert events[-1]["choices"][0]["draft_text"] == whole["draft_text"]
    else:
        text = text_of(answer)
        assert answer.json()["choices"][0] == whole
    assert text == whole["message"]["content"] != whole["draft_text"]


def test_a_reading_of_the_prompt_goes_on_where_it_broke(server: Server) -> None:
    """The engine reads 64 tokens at a time."""
    fields: dict[str, Any] = {"prompt": "the cat sat on the mat. " * 30, "echo": True}
    fields |= {"logprobs": 1, "max_tokens": 3, "guides": TWO}
    whole = complete(server.pipeline(), **fields).json()["choices"]
    num_prompt = len(server.pilot.tokenizer.encode(fields["prompt"]))
    assert num_prompt > 128
    for items in range(4):
        found = complete(server.pipeline(Dying(2, items)), **fields).json()["choices"]
        assert found[0]["text"] == whole[0]["text"]
        said, expected = found[0]["logprobs"], whole[0]["logprobs"]
        assert said["tokens"] == expected["tokens"]
        assert said["token_logprobs"][1:] == pytest.approx(expected["token_logprobs"][1:])


def test_when_one_choice_fails_all_do_and_their_slots_are_free(server: Server) -> None:
    class LastOneFails:
        num_calls = 0

        def __call__(self, call: Any) -> Any:
            self.num_calls += 1
            return call if self.num_calls < 3 else Dying(1, items=0)(call)

    async def run(stream: bool) -> Any:
        pipeline = server.pipeline(LastOneFails(), max_attempts=2)
        body = {
            "model": "base",
            "messages": MESSAGES,
            "n": 3,
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": stream,
        }
        async with http_client(pipeline) as client:
            response = await client.post("/v1/chat/completions", json=body)
        assert pipeline.admission.num_in_flight == 0
        async with asyncio.timeout(5):
            while server.model._decoding.thread.num_open:
                await asyncio.sleep(0.01)
        return response

    assert asyncio.run(run(stream=False)).status_code == 500
    streamed = asyncio.run(run(stream=True))
    if streamed.status_code == 200:  # another choice had begun
        assert events_of(streamed)[-1]["error"]["type"] == "server_error"


def test_a_guide_that_can_be_spared_is_left_out_and_said_to_be(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.far, "_answer", gone)
    fields: dict[str, Any] = {"max_tokens": 12, "seed": 1}
    far: dict[str, Any] = {"name": "far", "weight": 1}
    spared = chat(server.pipeline(), guides=[{**far, "on_failure": "base"}], **fields)
    assert text_of(spared) == server.text(MESSAGES, {}, **fields)
    assert spared.json()["guides"][0]["gave_up_at"] == 0
    failed = chat(server.pipeline(), guides=[far], **fields)
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == "guide_unavailable"


@pytest.mark.parametrize("stream", [False, True])
def test_a_revision_that_can_be_spared_leaves_the_draft(server: Server, stream: bool) -> None:
    guides = [{"name": "brief"}, {"name": "aligner", "on_failure": "base"}]
    gone = Dying(float("inf"), items=0)

    def aligner_gone(call: Any) -> Any:
        writing = call._generator.ag_frame.f_locals["version"].name
        return gone(call) if writing == "aligner" else call

    pipeline = server.pipeline(revising=aligner_gone)
    expected = server.text(MESSAGES, {"brief": 1}, seed=1, max_tokens=8)
    answer = chat(pipeline, guides=guides, stream=stream)
    if stream:
        *_, last = events = events_of(answer)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    else:
        last, text = answer.json(), text_of(answer)
    assert text == expected
    assert [guide.get("gave_up_at") for guide in last["guides"]] == [None, 0]
    failed = chat(pipeline, guides=[{"name": "aligner"}])
    assert failed.status_code == 500


def test_a_guide_that_is_switched_off_is_refused_or_spared(server: Server) -> None:
    entry = server.catalog.guide("helpful")
    assert entry is not None
    pipeline = server.pipeline(max_in_flight=64)
    pipeline._stock._following.catalog = server.catalog.with_guide(replace(entry, enabled=False))
    refused = chat(pipeline, model="base:helpful")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "guide_disabled")
    spared = chat(pipeline, guides=[{"name": "helpful", "weight": 1, "on_failure": "base"}])
    assert text_of(spared) == server.text(MESSAGES, {}, seed=1, max_tokens=8)
    assert spared.json()["guides"][0]["gave_up_at"] == 0
    assert chat(pipeline, draft="helpful").json()["error"]["param"] == "draft"
