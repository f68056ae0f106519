"""Shadow versions: decoded for the metrics, and for nobody else."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pilotfish.errors import PromptError
from serve.artifacts import pin
from serve.catalog import Catalog, Trial, resolve_version
from serve.wire import GenerateRequest
from tests.folders import save_guide
from tests.front import Front, access_lines, with_catalog
from tests.handles import LocalHandle
from tests.http_api import MESSAGES, Server
from tests.metric_book import Book


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.close()


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    return Book(monkeypatch)


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    with access_lines() as lines:
        yield lines


@contextmanager
def shadowed(server: Server, folder: Any, share: float) -> Iterator[tuple[Catalog, str]]:
    """A catalog in which the first guide has a shadow."""
    entry = server.catalog.guide("helpful")
    assert entry is not None
    artifact = pin(str(save_guide(folder, seed=99)), None)
    config = server.config.guide("helpful")
    version = resolve_version(config, server.catalog.base, artifact=artifact)
    yield server.catalog.with_guide(replace(entry, shadow=Trial(version, share))), version.version


def test_a_shadow_decodes_its_share_again_and_changes_nothing(
    server: Server, book: Book, tmp_path: Any
) -> None:
    with shadowed(server, tmp_path / "shadow", 0.5) as (catalog, version):
        front = Front(with_catalog(server, catalog))

        async def run() -> list[str]:
            texts = []
            for number in range(20):
                body = {"model": "base:helpful", "messages": MESSAGES, "max_tokens": 4, "seed": 1}
                headers = {"X-Request-Id": f"request-{number}"}
                answer = await front.asks("/v1/chat/completions", json=body, headers=headers)
                texts.append(answer.json()["choices"][0]["message"]["content"])
            async with asyncio.timeout(20):
                while len(book.of("shadow_requests")) < 5 or _busy():
                    await asyncio.sleep(0.02)
            return texts

        texts = asyncio.run(run())
        assert set(texts) == {server.text(MESSAGES, {"helpful": 0.5}, seed=1, max_tokens=4)}
        num = book.total("shadow_requests", guide="helpful", guide_version=version, outcome="ok")
        assert 5 <= num <= 15
        assert book.total("shadow_tokens", guide_version=version) <= 4 * num
        assert len(book.of("guide_kl_nats", guide_version=version)) == num
        assert book.total("generation_tokens", guide_version=version) == 0


def _busy() -> bool:
    return any(task.get_name().startswith("shadow ") for task in asyncio.all_tasks())


def test_shadows_are_bounded_and_their_failures_are_nobodys(
    server: Server, book: Book, tmp_path: Any, lines: list[dict[str, Any]]
) -> None:
    with shadowed(server, tmp_path / "shadow", 1.0) as (catalog, _):
        replica = _ShadowsFail(server)
        pipeline = with_catalog(server, catalog, max_shadows=1)
        pipeline._calls._base = LocalHandle(replica)
        front = Front(pipeline)
        asked = [{"name": "helpful", "weight": 1}]

        async def run() -> None:
            body = {"model": "base", "messages": MESSAGES, "max_tokens": 4, "guides": asked}
            answers = await asyncio.gather(
                *(front.asks("/v1/chat/completions", json=body) for _ in range(3))
            )
            assert {answer.status_code for answer in answers} == {200}
            replica.answered.set()
            async with asyncio.timeout(20):
                while len(book.of("shadow_requests", outcome="failed")) < 1:
                    await asyncio.sleep(0.02)

        asyncio.run(run())
        assert book.total("shadow_requests", outcome="failed") == 1
        assert book.total("shadow_requests", outcome="skipped") == 2
        assert {line["failovers"] for line in lines} == {0}
        assert replica.priorities == {0, 1}


class _ShadowsFail:
    """A base replica that decodes nothing of low priority."""

    def __init__(self, server: Server) -> None:
        self._model = server.model
        self.answered = asyncio.Event()
        self.priorities: set[int] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Any]:
        self.priorities.add(priority := request.get("priority", 0))
        if priority:
            await self.answered.wait()  # nobody waits for it
            raise PromptError("not today")
        async for batch in self._model.generate(request):
            yield batch
