"""The HTTP API: what answers say of their tokens."""

from typing import Any

import openai
import pytest

from serve.api.token_text import TokenTexts
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer
from tests.http_api import MESSAGES, Server, chat, complete, events_of, with_openai

GUIDES = {"helpful": 1.0, "other": 0.4}
ASKED = [{"name": name, "weight": weight} for name, weight in GUIDES.items()]


def test_chat_logprobs_are_those_of_the_guided_law_whole_and_streamed(server: Server) -> None:
    async def use(client: openai.AsyncOpenAI) -> Any:
        settings: Any = {
            "model": "base",
            "messages": MESSAGES,
            "seed": 5,
            "max_tokens": 12,
            "temperature": 0.6,
            "logprobs": True,
            "top_logprobs": 3,
            "extra_body": {"guides": ASKED},
        }
        whole = await client.chat.completions.create(**settings)
        chunks = [c async for c in await client.chat.completions.create(stream=True, **settings)]
        return whole, chunks

    whole, chunks = with_openai(server.pipeline(), use)
    entries = whole.choices[0].logprobs.content
    params: Any = {"seed": 5, "max_tokens": 12, "temperature": 0.6, "top_logprobs": 3}
    done = server.completion(MESSAGES, GUIDES, **params)
    assert [entry.logprob for entry in entries] == pytest.approx(done.logprobs)
    found = [[top.logprob for top in entry.top_logprobs] for entry in entries]
    assert found == [pytest.approx([top.logprob for top in tops]) for tops in done.top]
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text == whole.choices[0].message.content == done.text
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [entry for entries in streamed for entry in entries] == entries


def test_text_logprobs_are_parallel_lists_with_places_in_the_text(server: Server) -> None:
    fields: dict[str, Any] = {"guides": ASKED, "max_tokens": 16, "logprobs": 2, "seed": 11}
    [choice] = complete(server.pipeline(), **fields).json()["choices"]
    said = choice["logprobs"]
    done = server.completion("the cat sat", GUIDES, seed=11, max_tokens=16, top_logprobs=2)
    assert said["token_logprobs"] == pytest.approx(done.logprobs)
    texts = TokenTexts(server.pilot.tokenizer)
    assert said["tokens"] == [texts[token_id].text for token_id in done.token_ids]
    for tops, token, logprob in zip(
        said["top_logprobs"], said["tokens"], said["token_logprobs"], strict=True
    ):
        assert tops[token] >= logprob
        assert next(iter(tops.values())) == max(tops.values())
    events = events_of(complete(server.pipeline(), stream=True, **fields))
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert {name: [x for piece in pieces for x in piece[name]] for name in said} == said


def test_an_echoed_prompt_has_the_logprobs_that_decoding_gave_it(server: Server) -> None:
    """As lm-eval reads them: the prompt and one token, the first entry null."""
    prompt = server.pilot.tokenizer.encode("the cat sat")
    done = server.completion("the cat sat", GUIDES, seed=2, max_tokens=90, ignore_eos=True)
    ids = [*prompt, *done.token_ids]
    fields: dict[str, Any] = {"prompt": [ids, ids[:20]], "guides": ASKED, "seed": 3}
    body = complete(
        server.pipeline(), max_tokens=1, logprobs=1, echo=True, temperature=0, **fields
    ).json()
    for choice, length in zip(body["choices"], (len(ids), 20), strict=True):
        said = choice["logprobs"]
        assert [len(values) for values in said.values()] == [length + 1] * 4
        assert (said["token_logprobs"][0], said["top_logprobs"][0]) == (None, None)
        behind = said["token_logprobs"][len(prompt) : -1]
        assert behind == pytest.approx(done.logprobs[: length - len(prompt)])
        best = [max(tops.values()) for tops in said["top_logprobs"][1:]]
        assert all(
            top >= logprob for top, logprob in zip(best, said["token_logprobs"][1:], strict=True)
        )
        assert said["token_logprobs"][-1] == best[-1]  # drawn greedily
    whole, part = body["choices"]
    assert part["text"].startswith(server.pilot.tokenizer.decode(ids[:20]))
    found, same = (choice["logprobs"]["token_logprobs"][1:20] for choice in (whole, part))
    assert found == pytest.approx(same)


def test_an_echo_can_be_all_there_is(server: Server) -> None:
    for fields in ({"logprobs": 0}, {}):
        for stream in (False, True):
            answer = complete(server.pipeline(), echo=True, max_tokens=0, stream=stream, **fields)
            [event] = events_of(answer) if stream else [answer.json()]
            [choice] = event["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("the cat sat", "length")
            said = choice["logprobs"]
            assert (said is None) == (not fields)
            if said is not None:
                assert "".join(said["tokens"]) == "the cat sat"
                for offset, token in zip(said["text_offset"], said["tokens"], strict=True):
                    assert "the cat sat".startswith(token, offset)
                assert said["top_logprobs"][1] == {said["tokens"][1]: said["token_logprobs"][1]}


def test_an_echo_comes_before_the_text_of_every_choice(server: Server) -> None:
    plain = complete(server.pipeline(), n=2).json()["choices"]
    echoed = complete(server.pipeline(), n=2, echo=True).json()["choices"]
    expected = ["the cat sat" + choice["text"] for choice in plain]
    assert [choice["text"] for choice in echoed] == expected
    events = events_of(complete(server.pipeline(), n=2, echo=True, stream=True))
    for index in range(2):
        pieces = [e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index]
        assert "".join(pieces) == expected[index]


def test_the_drafts_of_a_selection_read_the_prompt_once(server: Server) -> None:
    guides = [{"name": "best", "weight": 1}, {"name": "helpful", "weight": 1}][::-1]
    fields: dict[str, Any] = {"guides": guides, "echo": True, "logprobs": 0}
    said = complete(server.pipeline(), **fields).json()["choices"][0]["logprobs"]
    alone = complete(server.pipeline(), **{**fields, "guides": guides[:1]}).json()
    num_prompt = len(server.pilot.tokenizer.encode("the cat sat"))
    reference = alone["choices"][0]["logprobs"]["token_logprobs"]
    assert said["token_logprobs"][1:num_prompt] == pytest.approx(reference[1:num_prompt])


def test_tokens_can_be_written_as_their_ids(server: Server) -> None:
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    [choice] = complete(server.pipeline(), logprobs=1, **fields).json()["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_steering_says_of_every_token_who_moved_it_and_what_else_was_likely(
    server: Server,
) -> None:
    fields: dict[str, Any] = {"guides": [*ASKED, {"name": "proxy"}], "max_tokens": 10}
    answer = chat(
        server.pipeline(), top_logprobs=2, return_steering=True, draft="helpful", **fields
    )
    [choice] = answer.json()["choices"]
    assert choice["logprobs"] is None
    for each in choice["steering"]:
        assert each.keys() == {
            *("token_id", "token", "logprob", "base_logprob", "kl"),
            *("moved_by", "drafted", "notes", "top"),
        }
        assert each["moved_by"] in ("helpful", "other", "proxy")
        assert each["notes"].keys() == {"proxy.expected_rejects"}
        assert 1 <= len(each["top"]) <= 2
        assert each["top"][0].keys() == {"token_id", "token", "logprob", "base_logprob"}
        assert each["top"][0]["logprob"] >= each["logprob"]
    kl = [each["kl"] for each in choice["steering"]]
    assert answer.json()["guides"][0]["mean_kl"] == pytest.approx(sum(kl) / len(kl))
    text = "".join(each["token"] for each in choice["steering"])
    assert text.replace("\ufffd", "") == choice["message"]["content"].replace("\ufffd", "")


def test_without_guides_steering_says_that_nothing_moved(server: Server) -> None:
    [choice] = chat(server.pipeline(), return_steering=True).json()["choices"]
    for each in choice["steering"]:
        assert (each["moved_by"], each["kl"]) == (None, 0.0)
        assert each["logprob"] == each["base_logprob"]


def test_tokens_read_as_what_they_add_to_a_text() -> None:
    """Byte by byte, or word by word, whatever stands at the beginning."""
    for tokenizer, text in ((hh_tokenizer(), "how do é I"), (word_tokenizer(), "how do i")):
        texts = TokenTexts(tokenizer)
        found = [texts[token_id] for token_id in tokenizer.encode(text)]
        assert bytes(b for one in found for b in one.utf8).decode().strip() == text
        [end] = tokenizer.encode(str(tokenizer.eos_token), add_special_tokens=False)
        assert texts[end].text.strip() == tokenizer.eos_token
