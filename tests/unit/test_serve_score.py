"""The HTTP API: scores, token ids, and what is served."""

import asyncio
from typing import Any

import httpx2
import pytest

from pilotfish.answering import Draft
from pilotfish.chat import render_completion, render_prompt
from pilotfish.context import Prompt
from pilotfish.guides import scorer_of
from tests.http_api import MESSAGES, Server, http_client, post

TWO = {"helpful": 0.8, "far": 0.4}


def score(server: Server, **fields: Any) -> Any:
    body = {"model": "base", "messages": MESSAGES, **fields}
    response = post(server.pipeline(), "/v1/score", body)
    assert response.status_code == 200, response.text
    return response.json()


def asked(guides: dict[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in guides.items()]


@pytest.mark.parametrize("guides", [{}, TWO, {"args": 1.5}, {"proxy": 1}], ids=" ".join)
def test_a_response_scores_as_decoding_it_would(server: Server, guides: dict[str, float]) -> None:
    done = server.completion(MESSAGES, guides, seed=4, max_tokens=70, ignore_eos=True)
    body = score(server, guides=asked(guides), responses=[done.token_ids, done.token_ids[:3]])
    whole, part = body["data"]
    assert whole["token_ids"] == done.token_ids
    assert whole["token_logprobs"] == pytest.approx(done.logprobs)
    assert whole["base_token_logprobs"] == pytest.approx(done.base_logprobs)
    assert whole["logprob"] == pytest.approx(sum(done.logprobs))
    assert whole["base_logprob"] == pytest.approx(sum(done.base_logprobs))
    assert whole["kl"] == pytest.approx(sum(done.kl))
    assert (part["index"], part["num_tokens"]) == (1, 3)
    assert part["logprob"] == pytest.approx(sum(done.logprobs[:3]))
    num_prompt = len(render_prompt(server.pilot.tokenizer, MESSAGES))
    assert body["usage"]["total_tokens"] == num_prompt + whole["num_tokens"] + 3


def test_a_response_as_text_ends_with_the_end_token(server: Server) -> None:
    [data] = score(server, response=" it sat")["data"]
    tokenizer = server.pilot.tokenizer
    assert data["token_ids"] == render_completion(tokenizer, MESSAGES, " it sat")
    assert data["token_ids"][-1] == tokenizer.eos_token_id
    assert data["tokens"][-1] == tokenizer.eos_token
    [raw] = score(server, messages=None, prompt="the cat", response=" sat")["data"]
    assert raw["token_ids"] == render_completion(tokenizer, "the cat", " sat")


@pytest.mark.parametrize("name", ["best", "blocks", "args"])
def test_guides_with_reward_models_say_what_responses_are_worth(server: Server, name: str) -> None:
    responses = [" it sat", " it ran on the mat"]
    body = score(server, guides=asked({"helpful": 0.5, name: 1}), responses=responses)
    tokenizer = server.pilot.tokenizer
    prompt = Prompt(render_prompt(tokenizer, MESSAGES), tuple(MESSAGES))
    drafts = [Draft(text, render_completion(tokenizer, MESSAGES, text)) for text in responses]
    scorer = scorer_of(server.pilot._guides[name])
    assert scorer is not None
    expected = list(scorer.score(prompt, drafts))
    assert [each["reward"] for each in body["data"]] == pytest.approx(expected)
    assert [list(each["rewards"]) for each in body["data"]] == [[name]] * 2
    assert expected[0] != expected[1]
    assert score(server, guides=asked({"helpful": 1}), response="x")["data"][0]["reward"] is None


def test_a_token_that_guides_forbid_scores_what_openai_writes_for_it(server: Server) -> None:
    guides = [{"name": "args", "weight": 1, "args": {"num_candidates": 1}}]
    [data] = score(server, guides=guides, response=" zzz")["data"]
    assert -9999.0 in data["token_logprobs"]
    assert data["logprob"] == pytest.approx(sum(data["token_logprobs"]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x", "response": "y"}, "messages"),
        ({}, "response"),
        ({"response": "y", "responses": ["y"]}, "responses"),
        ({"responses": []}, "responses"),
        ({"responses": [[400]]}, "responses"),
        ({"response": [1] * 1100}, "responses"),
        ({"messages": None, "prompt": [40], "response": "y"}, "responses"),
        ({"response": "y", "guides": [{"name": "aligner"}]}, "guides"),
        ({"response": "y<eos>"}, "responses"),
        ({"response": "y", "top_k": 3}, "top_k"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "base", "messages": MESSAGES, **fields}
    response = post(server.pipeline(), "/v1/score", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_texts_become_ids_and_ids_texts(server: Server) -> None:
    tokenizer, pipeline = server.pilot.tokenizer, server.pipeline()
    body = {"prompt": "the cat", "return_token_strs": True}
    said = post(pipeline, "/tokenize", body).json()
    ids = tokenizer.encode("the cat")
    assert said == {
        "count": len(ids),
        "max_model_len": server.catalog.base.max_length,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }
    chat = post(pipeline, "/tokenize", {"model": "base", "messages": MESSAGES}).json()
    assert chat["tokens"] == render_prompt(tokenizer, MESSAGES)
    assert chat["token_strs"] is None
    back = post(pipeline, "/detokenize", {"tokens": [*ids, tokenizer.eos_token_id]})
    assert back.json() == {"prompt": "the cat<eos>"}
    for path, sent in (
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": False}),
    ):
        assert post(pipeline, path, sent).status_code == 400
    assert post(pipeline, "/tokenize", {"model": "other", "prompt": "x"}).status_code == 404


def get(server: Server, *paths: str) -> list[httpx2.Response]:
    async def run() -> list[httpx2.Response]:
        async with http_client(server.pipeline()) as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def test_the_server_says_that_it_is_there_and_what_it_is(server: Server) -> None:
    ping, health, ready, version = get(server, "/ping", "/health", "/ready", "/version")
    assert {answer.status_code for answer in (ping, health, ready, version)} == {200}
    assert version.json() == {"version": "0.1.0"}


def test_the_card_of_a_guide_says_how_it_acts(server: Server) -> None:
    [models] = get(server, "/v1/models")
    guides = {card["id"]: card["guide"] for card in models.json()["data"]}
    assert guides["base"] is None
    about = guides["base:helpful"]
    assert about.pop("version")
    assert about == {
        "kind": "genarm",
        "stage": "token",
        "weight": 0.5,
        "takes_weight": True,
        "enabled": True,
    }
    assert guides["base:aligner"]["stage"] == "revision"
    assert guides["base:best"]["takes_weight"] is False
