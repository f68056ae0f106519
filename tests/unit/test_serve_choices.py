"""The HTTP API: choices, prompts, and chains of guides. What is written is what Pilot writes."""

from typing import Any

import pytest

from pilotfish.decode.sequence import Drafting
from pilotfish.noise import choice_seed, draft_seed
from tests.http_api import MESSAGES, Server, chat, complete, events_of, text_of


def asked(guides: dict[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in guides.items()]


def streamed(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream, chat or not."""
    choices = [choice for event in events for choice in event["choices"]]
    own = [choice for choice in choices if choice["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in own)


def test_choice_i_is_what_pilot_writes_with_the_seed_of_choice_i(server: Server) -> None:
    body = chat(server.pipeline(), model="base:helpful", n=4, seed=6).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    seeds = [choice_seed(6, i) for i in range(4)]
    found = [server.completion(MESSAGES, {"helpful": 0.5}, seed=s, max_tokens=8) for s in seeds]
    assert texts == [one.text for one in found]
    assert len(set(texts)) == 4
    assert body["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in found)
    alone = chat(server.pipeline(), model="base:helpful", seed=6).json()
    assert alone["choices"][0] == body["choices"][0]
    assert alone["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]
    kl = [value for one in found for value in one.kl]
    assert body["guides"][0]["mean_kl"] == pytest.approx(sum(kl) / len(kl))


def test_choices_that_are_selected_among_drafts_share_none_of_them(server: Server) -> None:
    best = {"model": "base", "guides": [{"name": "best"}], "n": 3, "seed": 6}
    texts = [c["message"]["content"] for c in chat(server.pipeline(), **best).json()["choices"]]
    seeds = [choice_seed(6, i) for i in range(3)]
    assert texts == [server.text(MESSAGES, {"best": 1}, seed=s, max_tokens=8) for s in seeds]
    assert len({draft_seed(seed, i) for seed in seeds for i in range(3)}) == 9


def test_a_stream_of_several_choices_is_each_of_them_in_pieces(server: Server) -> None:
    whole = chat(server.pipeline(), n=3).json()["choices"]
    events = events_of(chat(server.pipeline(), n=3, stream=True))
    assert [streamed(events, i) for i in range(3)] == [c["message"]["content"] for c in whole]
    choices = [choice for event in events for choice in event["choices"]]
    assert [c["delta"].get("role") for c in choices[:3]] == ["assistant"] * 3
    ends = [c["index"] for c in choices if c["finish_reason"] is not None]
    assert sorted(ends) == [0, 1, 2]
    assert [i for i, event in enumerate(events) if "guides" in event] == [len(events) - 1]


def test_choices_of_several_prompts_come_prompt_by_prompt(server: Server) -> None:
    prompts = ["the cat sat", "the dog"]
    ids = [server.pilot.tokenizer.encode(prompt) for prompt in prompts]
    expected = [
        server.text(prompt, {}, seed=choice_seed(1, i), max_tokens=8)
        for prompt in prompts
        for i in range(2)
    ]
    for prompt in (prompts, ids):
        body = complete(server.pipeline(), prompt=prompt, n=2, best_of=2).json()
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


CHAINS: list[dict[str, float]] = [
    {"helpful": 1.0, "other": -0.3},
    {"far": 0.6, "helpful": 0.4},
    {"proxy": 1, "helpful": 0.5},
    {"args": 2.0},
    {"best": 1},
    {"helpful": 0.7, "blocks": 1},
    {"aligner": 1},
    {"brief": 1, "aligner": 1},
    {"helpful": 1.0, "best": 1, "aligner": 1},
]


@pytest.mark.parametrize("guides", CHAINS, ids=" ".join)
def test_a_chain_writes_what_it_writes_in_pilot_whole_and_streamed(
    server: Server, guides: dict[str, float]
) -> None:
    params: dict[str, Any] = {"seed": 3, "max_tokens": 17}
    expected = server.completion(MESSAGES, guides, **params)
    fields = {"guides": asked(guides), "return_token_ids": True, "return_steering": True, **params}
    body = chat(server.pipeline(), **fields).json()
    [choice] = body["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["token_ids"] == expected.token_ids
    assert choice.get("draft_text") == expected.draft_text
    assert [each["logprob"] for each in choice["steering"]] == pytest.approx(expected.logprobs)
    assert [each["moved_by"] for each in choice["steering"]] == expected.moved_by
    events = events_of(chat(server.pipeline(), stream=True, **fields))
    assert streamed(events) == expected.text
    choices = [event["choices"][0] for event in events[1:]]
    assert [i for choice in choices for i in choice["token_ids"]] == expected.token_ids
    steering = [each for choice in choices for each in choice["steering"]]
    assert steering == choice["steering"]
    assert events[-1]["guides"] == body["guides"]


def test_response_guides_go_behind_the_others_however_they_are_named(server: Server) -> None:
    expected = server.text(
        MESSAGES, {"helpful": 0.5, "aligner": 1, "brief": 1}, seed=1, max_tokens=8
    )
    pipeline, both = server.pipeline(), ["aligner", "brief"]
    named: list[dict[str, Any]] = [
        {"model": "base:helpful", "response_guide": both},
        {"guides": [{"name": "helpful"}, {"name": "aligner"}], "response_guide": both},
        {"guides": [{"name": "helpful"}, *asked({"aligner": 1, "brief": 1})]},
    ]
    for fields in named:
        assert text_of(chat(pipeline, **fields)) == expected
    alone = text_of(chat(pipeline, model="base:aligner"))
    assert alone == server.text(MESSAGES, {"aligner": 1}, seed=1, max_tokens=8)
    assert text_of(chat(pipeline, response_guide="aligner")) == alone


@pytest.mark.parametrize(
    ("name", "args"),
    [("proxy", {"p_t": 0.5}), ("best", {"num_drafts": 12}), ("aligner", {"max_tokens": 4})],
)
def test_settings_of_a_request_are_those_of_a_variant(
    server: Server, name: str, args: dict[str, Any]
) -> None:
    expected = server.text(MESSAGES, {server.pilot.vary(name, **args): 1}, seed=5, max_tokens=12)
    fields: dict[str, Any] = {"seed": 5, "max_tokens": 12}
    varied = chat(server.pipeline(), guides=[{"name": name, "weight": 1, "args": args}], **fields)
    assert text_of(varied) == expected
    assert expected != text_of(chat(server.pipeline(), guides=asked({name: 1}), **fields))


@pytest.mark.parametrize("guides", [{"helpful": 0.8}, {"other": 0.5}])
def test_a_drafter_writes_what_it_writes_in_pilot(server: Server, guides: dict[str, float]) -> None:
    draft = Drafting(guide="helpful", num_tokens=3)
    expected = server.text(MESSAGES, {"helpful": 0.0, **guides}, seed=4, max_tokens=20, draft=draft)
    fields: dict[str, Any] = {"guides": asked(guides), "seed": 4, "max_tokens": 20}
    pipeline = server.pipeline()
    assert (
        text_of(chat(pipeline, draft={"guide": "helpful", "num_tokens": 3}, **fields)) == expected
    )
    assert text_of(chat(pipeline, draft="helpful", **fields)) == expected
    assert text_of(chat(pipeline, **fields)) != expected  # another path of the same law


def test_flat_arguments_mean_what_nested_ones_mean(server: Server) -> None:
    flat = {"guide": "helpful", "weight": 0.9, "response_guide": "aligner", "draft": "helpful"}
    nested = {"guides": asked({"helpful": 0.9}), "response_guide": "aligner", "draft": "helpful"}
    pipeline = server.pipeline()
    assert text_of(chat(pipeline, vllm_xargs=flat)) == text_of(chat(pipeline, **nested))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 40},
        {"min_p": 0.05},
        {"logit_bias": {"40": 5, "41": -100}},
        {"min_tokens": 15, "stop_token_ids": list(range(0, 270, 3))},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_sampling_fields_mean_what_they_mean_in_pilot(
    server: Server, fields: dict[str, Any]
) -> None:
    params = dict(fields)
    if "logit_bias" in fields:
        params["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if "stop_token_ids" in fields:
        params["stop_token_ids"] = tuple(fields["stop_token_ids"])
    expected = server.text("the cat", {"helpful": 1.0}, seed=8, max_tokens=24, **params)
    guides = asked({"helpful": 1.0})
    answer = complete(
        server.pipeline(), prompt="the cat", guides=guides, seed=8, max_tokens=24, **fields
    )
    assert answer.json()["choices"][0]["text"] == expected


@pytest.mark.parametrize("at", [1, 7, 19])
@pytest.mark.parametrize("stream", [False, True])
def test_what_broke_off_goes_on_behind_its_tokens(server: Server, at: int, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "base:helpful", "max_tokens": 20, "return_token_ids": True}
    pipeline = server.pipeline()
    *events, _ = events_of(chat(pipeline, stream=True, ignore_eos=True, **fields))
    heard, ids = "", []
    for event in events:
        [choice] = event["choices"]
        if len(ids) >= at:
            break
        heard += choice["delta"].get("content", "")
        ids += choice.get("token_ids", [])
    whole = text_of(chat(pipeline, ignore_eos=True, **fields))
    rest = chat(pipeline, ignore_eos=True, stream=stream, completed_token_ids=ids, **fields)
    text = streamed(events_of(rest)) if stream else text_of(rest)
    assert heard + text == whole
    if not stream:
        assert rest.json()["usage"]["completion_tokens"] == 20 - len(ids)


def test_the_stop_string_stays_where_it_is_asked_to(server: Server) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    pipeline = server.pipeline()
    whole = text_of(chat(pipeline, **fields))
    stop = whole[20:23]
    kept = chat(pipeline, stop=[stop], include_stop_str_in_output=True, **fields)
    assert text_of(kept) == whole[: whole.index(stop) + len(stop)]
    without = chat(pipeline, stop=[stop], **fields)
    assert text_of(kept) == text_of(without) + stop


def test_a_proxy_says_how_much_it_accepts(server: Server) -> None:
    guides = [{"name": "proxy"}, {"name": "helpful", "weight": 0.5}]
    body = chat(server.pipeline(), guides=guides, max_tokens=12).json()
    done = server.completion(MESSAGES, {"proxy": 1, "helpful": 0.5}, seed=1, max_tokens=12)
    rejects = [note["proxy.expected_rejects"] for note in done.notes]
    proxy, helpful = body["guides"]
    assert proxy["accept_rate"] == pytest.approx(len(rejects) / (len(rejects) + sum(rejects)))
    assert "accept_rate" not in helpful


def test_usage_comes_with_every_event_where_it_is_asked_for(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(chat(server.pipeline(), stream=True, n=2, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    whole = chat(server.pipeline(), n=2).json()
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []


def test_the_ids_and_the_metadata_of_a_request_come_back(server: Server) -> None:
    fields = {"request_id": "abc-1", "metadata": {"team": "red"}, "session_id": "s", "user": "me"}
    response = chat(server.pipeline(), store=False, **fields)
    assert response.headers["X-Request-Id"] == "abc-1"
    assert response.json()["id"] == "chatcmpl-abc-1"
    assert response.json()["metadata"] == {"team": "red"}
    streamed_too = chat(server.pipeline(), stream=True, **fields)
    assert streamed_too.headers["X-Request-Id"] == "abc-1"
    assert {event["id"] for event in events_of(streamed_too)} == {"chatcmpl-abc-1"}
