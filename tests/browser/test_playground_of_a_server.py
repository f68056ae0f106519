"""The playground in front of the real ingress and a real base replica, in this process."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pilotfish import SamplingParams
from serve.api.routes import build_routes
from tests.browser.serving import on_a_port
from tests.browser.test_playground import column, send, tokens
from tests.handles import LocalStream
from tests.http_api import MESSAGES, Server

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


class Held:
    """A stream that waits behind its first tokens until it may go on."""

    def __init__(self, stream: LocalStream, may_go_on: threading.Event) -> None:
        self._stream, self._may_go_on = stream, may_go_on
        self._begun = False

    async def __anext__(self) -> Any:
        while self._begun and not self._may_go_on.is_set():
            await asyncio.sleep(0.01)
        self._begun = True
        return await anext(self._stream)

    def cancel(self) -> None:
        self._stream.cancel()


def shown(page: Any, at: int) -> str:
    """The text of an answer, without what stands for tokens that have none."""
    return "".join(column(page, at).locator(".answer .t:not(.silent)").all_text_contents())


@pytest.fixture(scope="module")
def may_go_on() -> threading.Event:
    return threading.Event()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, may_go_on: threading.Event
) -> Iterator[tuple[Server, str]]:
    server = Server(tmp_path_factory.mktemp("models"))
    pipeline = server.pipeline(lambda stream: Held(stream, may_go_on))
    with on_a_port(build_routes(pipeline)) as url:
        yield server, url
    server.model.close()


def test_the_page_shows_what_pilot_writes_and_how_it_was_steered(
    server: tuple[Server, str], may_go_on: threading.Event, new_page: Callable[..., Any]
) -> None:
    models, url = server
    may_go_on.set()
    page = new_page(f"{url}/playground")
    page.get_by_label("What this turn says").fill(MESSAGES[0]["content"])
    page.get_by_label("Max tokens").fill("30")
    page.get_by_label("Seed").fill("8")
    column(page, 1).get_by_label("Weight of helpful", exact=True).fill("1.5")
    send(page)
    for at, guides in enumerate(({}, {"helpful": 1.5})):
        expect(column(page, at)).to_have_attribute("aria-busy", "false", timeout=20000)
        expect(column(page, at).locator(".problem")).to_be_hidden()
        [written] = models.pilot.generate(
            [MESSAGES], SamplingParams(seed=8, max_tokens=30), guides=guides
        )
        assert shown(page, at) == written.text
        expect(tokens(page, at)).to_have_count(len(written.token_ids))
        mean = sum(written.kl) / len(written.kl)
        expect(column(page, at).locator(".stats")).to_contain_text(f"mean KL{mean:.3f} nats")
    version = models.catalog.guides[0].current.version
    expect(column(page, 1).locator(".stats")).to_contain_text(f"1.5, version {version}")
    moved = tokens(page, 1).evaluate_all("spans => spans.map(s => Number(s.dataset.ratio))")
    assert any(moved)
    assert not any(tokens(page, 0).evaluate_all("spans => spans.map(s => Number(s.dataset.ratio))"))
    tokens(page, 1).first.focus()
    expect(page.locator("#popover").get_by_role("row")).not_to_have_count(0)
    assert page.locator("#popover .bar").count() >= 10


def test_a_stopped_answer_goes_on_to_the_same_text(
    server: tuple[Server, str], may_go_on: threading.Event, new_page: Callable[..., Any]
) -> None:
    models, url = server
    may_go_on.clear()
    page = new_page(f"{url}/playground")
    page.get_by_label("What this turn says").fill(MESSAGES[0]["content"])
    page.get_by_label("Max tokens").fill("60")
    page.get_by_label("Seed").fill("8")
    send(page)
    expect(tokens(page, 1).first).to_be_visible()
    page.keyboard.press("Escape")
    again = column(page, 1).get_by_role("button", name="Go on")
    expect(again).to_be_visible()
    assert tokens(page, 1).count() < 60
    may_go_on.set()
    again.click()
    expect(column(page, 1)).to_have_attribute("aria-busy", "false", timeout=20000)
    text = models.text(MESSAGES, {"helpful": 0.5}, seed=8, max_tokens=60)
    assert shown(page, 1) == text
