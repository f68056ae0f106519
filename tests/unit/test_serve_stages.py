"""The HTTP API: guides that act on whole answers, in new versions and while nothing comes."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pilotfish import Pilot, SamplingParams
from serve.api import answering, streaming
from serve.api.ingress import Pipeline
from serve.artifacts import pin
from serve.catalog import Catalog, resolve_version
from serve.config import IngressConfig
from tests.chat_tokenizers import chatml_tokenizer
from tests.folders import save_aligner
from tests.handles import LocalHandle, LocalResponse
from tests.http_api import MESSAGES, Server, chat, complete, events_of, http_client, text_of


class Control:
    """A `Guides` that has one newer catalog."""

    def __init__(self, newer: Catalog) -> None:
        self._newer = newer

    async def changes(self, known: Catalog) -> Catalog | None:
        if known.revision >= self._newer.revision:
            await asyncio.sleep(3600)
        return self._newer


def test_a_new_version_of_a_guide_that_rewrites_brings_its_own_tokenizer(
    server: Server, tmp_path: Path
) -> None:
    settings = {"template": "released", "max_tokens": 9}
    folder = save_aligner(tmp_path / "new", seed=9, tokenizer=chatml_tokenizer(), settings=settings)
    entry = server.catalog.guide("aligner")
    assert entry is not None
    config, base = server.config.guide("aligner"), server.catalog.base
    version = resolve_version(config, base, artifact=pin(str(folder), None))
    newer = server.catalog.with_guide(replace(entry, current=version))
    guides = {name: LocalHandle(model) for name, model in server.revisers.items()}
    pipeline = Pipeline(
        IngressConfig(), server.catalog, LocalHandle(server.model), guides,
        LocalHandle(Control(newer)),
    )  # fmt: skip

    async def run() -> list[httpx2.Response]:
        body = {"model": "base:aligner", "messages": MESSAGES, "max_tokens": 8, "seed": 1}
        async with http_client(pipeline) as client:
            before = await client.post("/v1/chat/completions", json=body)
            await pipeline.check_health()
            async with asyncio.timeout(10):
                while pipeline.catalog.revision == server.catalog.revision:
                    await asyncio.sleep(0.01)
            return [before, await client.post("/v1/chat/completions", json=body)]

    before, after = asyncio.run(run())
    params = SamplingParams(max_tokens=8, seed=1)
    expected = Pilot(base.artifact.uri, {"aligner": folder}, device="cpu", dtype="float64")
    assert text_of(after) == expected.generate([MESSAGES], params)[0].text
    assert text_of(before) == server.text(MESSAGES, {"aligner": 1}, seed=1, max_tokens=8)
    assert after.json()["guides"][0]["version"] == version.version


def test_a_stream_says_that_it_is_alive_while_drafts_are_decoded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_BEGIN_S", 0.0)
    monkeypatch.setattr(streaming, "_SILENCE_S", 0.02)
    fields: dict[str, Any] = {"model": "base:aligner", "max_tokens": 200, "ignore_eos": True}
    response = chat(server.pipeline(), stream=True, **fields)
    assert ": working\n\n" in response.text
    events = [part for part in response.text.split("\n\n") if part.startswith("data: ")]
    assert len(events) > 2
    quiet = response.text.replace(": working\n\n", "")
    text = "".join(
        event["choices"][0]["delta"].get("content", "")
        for event in events_of(httpx2.Response(200, text=quiet))
    )
    assert text == text_of(chat(server.pipeline(), **fields))


def test_what_fails_after_the_stream_began_is_an_event(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is too long to be copied, for instance."""
    fields: dict[str, Any] = {"model": "base:aligner", "max_tokens": 950, "ignore_eos": True}
    whole = chat(server.pipeline(), **fields)
    assert whole.status_code == 400
    assert "not enough to write such a draft again" in whole.json()["error"]["message"]
    monkeypatch.setattr(answering, "_BEGIN_S", 0.0)
    streamed = chat(server.pipeline(), stream=True, **fields)
    assert streamed.status_code == 200
    assert events_of(streamed)[-1] == whole.json()


def test_a_prompt_can_be_read_under_a_guide_that_selects_nothing(server: Server) -> None:
    guides = [{"name": "helpful", "weight": 1}, {"name": "best", "weight": 1}]
    fields: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 0}
    read = complete(server.pipeline(), guides=guides, **fields).json()["choices"]
    assert read == complete(server.pipeline(), guides=guides[:1], **fields).json()["choices"]


def test_ready_is_503_while_a_guide_with_replicas_of_its_own_does_not_answer(
    server: Server,
) -> None:
    def dead(call: Any) -> Any:
        assert isinstance(call, LocalResponse)
        call.cancel()
        raise RuntimeError("no replica")

    async def run(**breakage: Any) -> int:
        async with http_client(server.pipeline(**breakage)) as client:
            return (await client.get("/ready")).status_code

    assert asyncio.run(run(revising=dead)) == 503
    assert asyncio.run(run()) == 200
