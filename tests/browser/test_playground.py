"""The playground in a browser, in front of an API that answers from a script."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.conftest import PHONE
from tests.browser.fake_api import MOVES, TEXT, WORDS, FakeAPI, error

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

TIMES = "\N{MULTIPLICATION SIGN}"
Open = Callable[..., Any]


def send(page: Any) -> None:
    page.get_by_role("button", name="Send").click()


def column(page: Any, at: int) -> Any:
    return page.locator(".column").nth(at)


def tokens(page: Any, at: int) -> Any:
    return column(page, at).locator(".answer .t")


def finished(page: Any, at: int = 1) -> None:
    expect(column(page, at).locator(".answer")).to_have_text(TEXT)
    expect(column(page, at)).to_have_attribute("aria-busy", "false")


def test_base_and_guided_answers_stream_side_by_side(fake: FakeAPI, open_playground: Open) -> None:
    fake.hold_at = 5
    page = open_playground()
    send(page)
    for at in (0, 1):
        expect(tokens(page, at)).to_have_count(5)
    boxes = [column(page, at).locator(".answer").bounding_box() for at in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    fake.hold_at = None
    for at in (0, 1):
        finished(page, at)
    expect(column(page, 1).locator(".stats")).to_contain_text(f"{TIMES} 0.5, version 7")
    expect(column(page, 1).locator(".stats")).to_contain_text(f"tokens{len(WORDS)}")
    expect(page.locator("#announcer")).to_contain_text(TEXT)
    assert sorted(len(body["guides"]) for body in fake.bodies) == [0, 1]


def test_sliders_numbers_and_boxes_are_what_is_asked_for(
    fake: FakeAPI, open_playground: Open
) -> None:
    page = open_playground()
    guided = column(page, 1)
    guided.get_by_label("Weight of helpful, slider").fill("0.8")
    expect(guided.get_by_label("Weight of helpful", exact=True)).to_have_value("0.8")
    guided.get_by_label("harmless").check()
    page.get_by_role("button", name="Add a guided answer").click()
    column(page, 2).get_by_label("Weight of helpful", exact=True).fill("-3.25")
    expect(column(page, 2).get_by_role("heading")).to_have_text(f"helpful {TIMES} -3.25 + harmless")
    page.get_by_label("Temperature", exact=True).fill("0.3")
    expect(page.get_by_label("Temperature, slider")).to_have_value("0.3")
    page.get_by_label("Drafts by").select_option("helpful")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Seed").fill("9")
    send(page)
    for at in range(3):
        finished(page, at)
    asked = {len(body["guides"]) and body["guides"][0]["weight"]: body for body in fake.bodies}
    assert asked[0]["guides"] == []
    assert [asked[weight].get("draft") for weight in (0, 0.8)] == [None, "helpful"]
    assert asked[0.8]["guides"] == [{"name": "helpful", "weight": 0.8}, {"name": "harmless"}]
    assert asked[-3.25]["guides"][0]["weight"] == -3.25
    for body in fake.bodies:
        assert body["messages"] == [{"role": "user", "content": "how do i make stew ?"}]
        assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 40, 9)
        assert body["stream"]
        assert body["return_steering"]


def test_a_field_out_of_range_is_said_before_anything_is_asked(
    fake: FakeAPI, open_playground: Open
) -> None:
    page = open_playground()
    page.get_by_label("Temperature", exact=True).fill("3")
    send(page)
    expect(page.locator("#notice")).to_contain_text("Temperature")
    expect(page.get_by_label("Temperature", exact=True)).to_be_focused()
    assert fake.bodies == []


def test_an_answer_can_be_replied_to(fake: FakeAPI, open_playground: Open) -> None:
    page = open_playground()
    send(page)
    finished(page)
    column(page, 1).get_by_role("button", name="Reply").click()
    page.keyboard.type("and then ?")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".column[aria-busy=true]")).to_have_count(0)
    assert [message["role"] for message in fake.bodies[-1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    assert fake.bodies[-1]["messages"][1]["content"] == TEXT
    assert fake.bodies[-1]["messages"][2]["content"] == "and then ?"


def test_colours_follow_how_far_a_guide_moved_each_token(open_playground: Open) -> None:
    page = open_playground()
    column(page, 1).get_by_label("Weight of helpful", exact=True).fill("1")
    send(page)
    finished(page)
    edges = (0.1, 0.5, 1.5, 3)
    expected = [
        int(math.copysign(sum(abs(move) >= edge for edge in edges), move)) for move in MOVES
    ]
    tints = tokens(page, 1).evaluate_all(
        "spans => spans.map(s => [Number(s.dataset.ratio), getComputedStyle(s).backgroundColor])"
    )[: len(MOVES)]
    assert [level for level, _ in tints] == expected
    assert len({tint for _, tint in tints}) == len(set(expected))
    before = tokens(page, 1).nth(4).evaluate("s => getComputedStyle(s).backgroundColor")
    page.get_by_label("Colour by").select_option("kl")
    up, down = (
        tokens(page, 1).nth(at).evaluate("s => getComputedStyle(s).backgroundColor")
        for at in (MOVES.index(2.0), MOVES.index(-2.0))
    )
    assert up == down != before
    assert len(set(page.locator("#scale .t").all_inner_texts())) == 5


def test_text_is_cut_into_tokens_that_share_characters_and_blanks(
    fake: FakeAPI, open_playground: Open
) -> None:
    # A tokenizer that puts blanks between words, one character in three tokens, and an end token.
    fake.pieces = [
        ("rice", "rice"),
        ("is", " is"),
        ("\ufffd", ""),
        ("\ufffd", ""),
        ("\ufffd", "🍚"),
        ("!", " !"),
        ("</s>", ""),
    ]
    page = open_playground()
    send(page)
    expect(tokens(page, 1)).to_have_text(["rice", "is", "·", "·", "🍚", "!", "</s>"])
    assert [tokens(page, 1).nth(at).text_content() for at in (1, 4, 5)] == [" is", "🍚", " !"]


def test_the_keyboard_walks_tokens_and_shows_what_is_known_of_each(open_playground: Open) -> None:
    page = open_playground()
    column(page, 1).get_by_label("harmless").check()
    column(page, 1).get_by_label("Weight of helpful", exact=True).fill("1")
    send(page)
    finished(page)
    tokens(page, 1).first.focus()
    popover = page.locator("#popover")
    expect(popover).to_contain_text("As likely as under the base")
    page.keyboard.press("ArrowRight")
    expect(tokens(page, 1).nth(1)).to_be_focused()
    expect(popover).to_contain_text("token 2")
    page.keyboard.press("ArrowDown")  # the next one that was moved visibly
    expect(tokens(page, 1).nth(2)).to_be_focused()
    expect(popover).to_contain_text("2.7 times likelier than under the base. Moved most by helpful")
    rows = popover.get_by_role("row").all_inner_texts()
    assert [re.sub(r"\s+", " ", row).strip() for row in rows[1:]] == [
        "␣corn 50% 20%",
        "␣beans 5.0% 10%",
        "␣rice 2.0% 5.4%",
    ]
    shares = popover.locator(".chosen .bar").evaluate_all(
        "bars => bars.map(bar => bar.offsetWidth / bar.parentElement.clientWidth)"
    )
    assert shares[0] < shares[1] < 0.1
    expect(popover).to_contain_text("harmless keeps 25% of what is proposed here.")
    described = tokens(page, 1).nth(2).get_attribute("aria-describedby")
    assert described == "popover"
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()
    tokens(page, 0).nth(3).hover()
    expect(popover).to_contain_text("token 4")


def test_a_rewritten_answer_shows_what_changed_and_how_its_draft_was_steered(
    fake: FakeAPI, open_playground: Open
) -> None:
    fake.hold_at = 5
    page = open_playground()
    guided = column(page, 1)
    guided.get_by_label("fixer").check()
    send(page)
    expect(guided.locator(".revision")).to_have_text(" ".join(WORDS[:5]))
    fake.hold_at = None
    guided.get_by_role("button", name="Changes").click()
    expect(guided.locator(".revision del")).to_have_text(["many"])
    expect(guided.locator(".revision ins")).to_have_text(["two"])
    guided.get_by_role("button", name="Revision").click()
    assert guided.locator(".revision").inner_text() == TEXT
    guided.get_by_role("button", name="Draft").click()
    expect(guided.locator(".answer")).to_have_text(TEXT.replace("two", "many"))
    tokens(page, 1).nth(2).hover()
    expect(page.locator("#popover")).to_contain_text("Moved most by helpful")
    expect(column(page, 0).get_by_role("button", name="Changes")).to_be_hidden()


def test_a_reward_is_asked_for_each_finished_answer(fake: FakeAPI, open_playground: Open) -> None:
    page = open_playground()
    page.get_by_label("Reward by").select_option("best")
    send(page)
    for at in (0, 1):
        expect(column(page, at).locator(".stats")).to_contain_text("1.25 by best")
    assert [body["response"] for body in fake.scored] == [TEXT, TEXT]
    assert fake.scored[0]["guides"] == [{"name": "best"}]


def test_a_link_brings_back_prompt_and_settings(fake: FakeAPI, open_playground: Open) -> None:
    page = open_playground()
    page.get_by_label("What this turn says").fill("zwei Zwiebeln — 🧅 & <b>stew</b>")
    page.get_by_label("Temperature", exact=True).fill("0.35")
    page.get_by_label("Seed").fill("77")
    column(page, 1).get_by_label("harmless").check()
    column(page, 1).get_by_label("Weight of helpful", exact=True).fill("1.7")
    page.get_by_label("Colour by").select_option("kl")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#toast")).to_have_text("The link is copied.")
    link = page.evaluate("location.hash")
    assert "secret" not in link
    send(page)
    finished(page)
    other = open_playground(link)
    send(other)
    finished(other)
    assert sorted(map(repr, fake.bodies[:2])) == sorted(map(repr, fake.bodies[2:]))
    assert other.locator("body").get_attribute("data-colour") == "kl"
    assert len(fake.bodies[0]["messages"][0]["content"]) > 10


def test_a_damaged_link_is_said_and_the_page_works(open_playground: Open) -> None:
    page = open_playground("#eyJtZXNzYWdlcyI6IDF9")
    expect(page.locator("#notice")).to_contain_text("The link is damaged")
    expect(column(page, 1).get_by_role("heading")).to_have_text(f"helpful {TIMES} 0.5")


def test_a_phone_needs_no_sideways_scrolling(open_playground: Open) -> None:
    page = open_playground(**PHONE)
    send(page)
    finished(page)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    boxes = [column(page, at).bounding_box() for at in (0, 1)]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    tokens(page, 1).nth(2).tap()
    popover = page.locator("#popover")
    expect(popover).to_contain_text("token 3")
    box = popover.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["viewport"]["width"]
    assert page.evaluate(wide) == 0
    heights = page.locator("button:visible, select:visible").evaluate_all(
        "all => all.map(element => element.getBoundingClientRect().height)"
    )
    assert min(heights) >= 40


def test_the_server_refusing_a_field_is_said_where_the_field_is(
    fake: FakeAPI, open_playground: Open
) -> None:
    fake.refusals = [
        error(400, "max_tokens: must be at most 64", param="max_tokens"),
        error(404, "There is no guide 'helpful'.", param="guides"),
    ]
    page = open_playground()
    send(page)
    problems = page.locator(".column .problem:visible")
    expect(problems).to_have_count(2)
    said = sorted(problems.all_inner_texts())
    assert said == ["400 max_tokens: must be at most 64", "404 There is no guide 'helpful'."]
    expect(page.locator(".knob.wrong")).to_contain_text("Max tokens")
    send(page)
    finished(page)
    expect(problems).to_have_count(0)
    expect(page.locator(".wrong")).to_have_count(0)
