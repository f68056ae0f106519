"""The playground when keys are wanted, the server is full, replicas are slow, or streams break."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.fake_api import FakeAPI, error
from tests.browser.test_playground import column, finished, send, tokens

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

Open = Callable[..., Any]


def test_a_key_is_asked_for_and_kept_out_of_links_and_commands(
    fake: FakeAPI, open_playground: Open
) -> None:
    fake.key = "secret"
    page = open_playground()
    expect(page.locator("#notice")).to_contain_text("Incorrect API key")
    expect(page.get_by_label("API key")).to_have_class("wrong")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator(".column")).to_have_count(2)
    expect(page.locator("#notice")).to_be_hidden()
    send(page)
    finished(page)
    assert fake.keys[-1] == "Bearer secret"
    page.evaluate("navigator.clipboard.writeText = text => { window.copied = text }")
    column(page, 1).get_by_role("button", name="As curl").click()
    command = page.evaluate("window.copied")
    assert '"Authorization: Bearer $API_KEY"' in command
    assert '"weight": 0.5' in command
    stored = page.evaluate("JSON.stringify([location.href, {...localStorage}, document.cookie])")
    assert "secret" not in command + stored


def test_a_full_server_is_asked_again_when_it_said(fake: FakeAPI, open_playground: Open) -> None:
    full = error(429, "256 requests are in flight.", retry_after=1)
    fake.refusals = [full, full]
    page = open_playground()
    send(page)
    for at in (0, 1):
        expect(column(page, at)).to_contain_text("the server is full; trying again in")
    began = time.monotonic()
    for at in (0, 1):
        finished(page, at)
    assert time.monotonic() - began > 0.5
    assert len(fake.bodies) == 4


def test_a_slow_replica_is_waited_for_in_seconds_and_can_be_stopped(
    fake: FakeAPI, open_playground: Open
) -> None:
    fake.hold_at = 0
    page = open_playground()
    send(page)
    waiting = column(page, 1).locator(".waiting")
    expect(waiting).to_contain_text("1.")  # seconds go by
    page.get_by_label("Seed").fill("5")  # and nothing is frozen
    fake.hold_at = 3
    expect(tokens(page, 1)).to_have_count(3)
    expect(waiting).to_contain_text("waiting for more")
    page.keyboard.press("Escape")
    expect(waiting).to_be_hidden()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(tokens(page, 1)).to_have_count(3)
    deadline = time.monotonic() + 5
    while fake.num_disconnected < 2 and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert fake.num_disconnected == 2


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("error_at", "The model server failed."), ("cut_at", "The stream ended before")],
)
def test_an_answer_that_broke_off_says_so_and_goes_on(
    fake: FakeAPI, open_playground: Open, trouble: str, said: str
) -> None:
    setattr(fake, trouble, 4)
    page = open_playground()
    send(page)
    expect(column(page, 1).locator(".problem")).to_contain_text(said)
    expect(tokens(page, 1)).to_have_count(4)
    setattr(fake, trouble, None)
    column(page, 1).get_by_role("button", name="Go on").click()
    finished(page)
    assert fake.bodies[-1]["completed_token_ids"] == [0, 1, 2, 3]
    expect(column(page, 1).locator(".problem")).to_be_hidden()


def test_a_server_that_is_gone_is_said(fake: FakeAPI, open_playground: Open) -> None:
    page = open_playground()
    expect(page.locator(".column")).to_have_count(2)
    page.context.set_offline(True)
    send(page)
    expect(column(page, 1).locator(".problem")).to_have_text("The connection to the server broke.")
    page.context.set_offline(False)
    send(page)
    finished(page)


def test_thousands_of_tokens_are_all_drawn(fake: FakeAPI, open_playground: Open) -> None:
    fake.pieces = [(" rice",) * 2] * 2000
    page = open_playground()
    send(page)
    for at in (0, 1):
        expect(tokens(page, at)).to_have_count(2000, timeout=20000)


def test_every_control_has_a_name_and_every_id_is_used_once(open_playground: Open) -> None:
    page = open_playground()
    send(page)
    finished(page)
    nameless = page.evaluate("""() => {
      const controls = document.querySelectorAll("button, input, select, textarea, [role]");
      const named = (c) => c.ariaLabel || c.textContent.trim() || c.labels?.[0]?.textContent.trim();
      const silent = ["popover", "toast"];
      return [...controls].filter((c) => !named(c) && !silent.includes(c.id))
        .filter((c) => c.checkVisibility()).map((c) => c.outerHTML);
    }""")
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(open_playground: Open, theme: str) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, success criterion 1.4.3), on tints too."""
    page = open_playground()
    page.get_by_label("Theme").select_option(theme)
    column(page, 1).get_by_label("Weight of helpful", exact=True).fill("1")
    send(page)
    finished(page)
    contrasts = page.evaluate("""() => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      const behind = (element) => element ? [...behind(element.parentElement), element] : [];
      const pixel = (colours) => {
        for (const colour of colours) {
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
        }
        return canvas.getImageData(0, 0, 1, 1).data;
      };
      const light = ([r, g, b]) => [[r, 0.2126], [g, 0.7152], [b, 0.0722]].reduce((sum, [c, w]) => {
        const s = c / 255;
        return sum + w * (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
      }, 0);
      const texts = ".t, p, h1, h1 span, h2, label, button:enabled, dt, dd, kbd, .kind, select";
      return [...document.querySelectorAll(texts)].filter((e) => e.checkVisibility()).map((e) => {
        const layers = behind(e).map((b) => getComputedStyle(b).backgroundColor);
        const [a, b] = [light(pixel(layers)), light(pixel([...layers, getComputedStyle(e).color]))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return [ratio, e.textContent.trim().slice(0, 20)];
      });
    }""")
    assert len(contrasts) > 60
    assert min(contrasts)[0] >= 4.5, sorted(contrasts)[:5]
