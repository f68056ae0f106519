"""A headless Chromium, and a page of it that may talk to nobody but its own server."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.fake_api import FakeAPI
from tests.browser.serving import on_a_port

_ARGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def fake_server() -> Iterator[tuple[FakeAPI, str]]:
    fake = FakeAPI()
    with on_a_port(fake.app()) as url:
        yield fake, url


@pytest.fixture
def fake(fake_server: tuple[FakeAPI, str]) -> FakeAPI:
    """The server's script, as it was in the beginning."""
    fake, _ = fake_server
    fake.__init__()
    return fake


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page at an address; options are those of a browser context.

    Afterwards fail if any page asked another server for anything, or complained in its console.
    """
    contexts, strange = [], []

    def open_page(url: str, **options: Any) -> Any:
        context = chromium.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        origin = "/".join(url.split("/")[:3]) + "/"

        def stop(route: Any) -> None:
            strange.append(route.request.url)
            route.abort()

        context.route(lambda asked: not asked.startswith(origin), stop)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: strange.append(str(error)))
        page.on("console", lambda said: said.type == "error" and strange.append(said.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The console repeats every status that is an error; those are scripted.
    assert [said for said in strange if "Failed to load resource" not in said] == []


@pytest.fixture
def open_playground(
    fake: FakeAPI, fake_server: tuple[FakeAPI, str], new_page: Callable[..., Any]
) -> Callable[..., Any]:
    """Open the playground of the fake server, with a prompt typed in."""

    def open_it(fragment: str = "", **options: Any) -> Any:
        page = new_page(f"{fake_server[1]}/playground{fragment}", **options)
        if not fragment:
            page.get_by_label("What this turn says").fill("how do i make stew ?")
        return page

    return open_it
