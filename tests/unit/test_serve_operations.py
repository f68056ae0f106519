"""What is left of requests: access log and metrics; and requests that are too large."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from serve.metrics import EngineMetrics, RequestMetrics
from tests.front import Front, access_lines, with_catalog
from tests.http_api import MESSAGES, Dying, Server, post
from tests.metric_book import Book

LIMITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"n": 2}, {"n": 3}, "n"),
    ({"max_tokens": 300}, {"max_tokens": 301}, "max_tokens"),
    ({"prompt_tokens": 2}, {"prompt": [40, 41, 42]}, "prompt"),
    ({"num_prompts": 1}, {"prompt": ["a", "b"]}, "prompt"),
    ({"num_stops": 1}, {"stop": ["a", "b"]}, "stop"),
    ({"num_logit_biases": 1}, {"logit_bias": {"40": 1, "41": 1}}, "logit_bias"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.close()


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    with access_lines() as lines:
        yield lines


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    return Book(monkeypatch)


@pytest.mark.parametrize(("limits", "asked", "param"), LIMITS)
def test_a_request_that_is_too_large_is_refused_by_name_before_any_work(
    server: Server, limits: dict[str, Any], asked: dict[str, Any], param: str
) -> None:
    body = {"model": "base", "prompt": [40, 41], "max_tokens": 2, **asked}
    allowed = server.pipeline()
    assert post(allowed, "/v1/completions", body).status_code == 200
    refused = post(server.pipeline(limits=limits), "/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_places_of_a_request_are_all_that_it_has_decoded_at_a_time(server: Server) -> None:
    pipeline = server.pipeline(max_in_flight=4)
    taken: list[int] = []
    places = pipeline.admission.places
    pipeline.admission.places = lambda num, **who: [taken.append(num), places(num, **who)][1]
    body = {"model": "base", "prompt": ["a", "b"], "n": 2, "max_tokens": 2}
    assert post(pipeline, "/v1/completions", body).status_code == 200
    answers = {"model": "base", "prompt": "a", "responses": ["b", "c", "d"]}
    assert post(pipeline, "/v1/score", answers).status_code == 200
    assert taken == [4, 3]
    answers["responses"] = ["b"] * 5
    assert post(pipeline, "/v1/score", answers).status_code == 400


def test_a_request_leaves_one_line(server: Server, lines: list[dict[str, Any]]) -> None:
    headers = {"X-Request-Id": "mine", "X-Session-Id": "ours"}
    front = Front(server._pipeline())
    guides = [{"name": "helpful", "weight": 0.5}, {"name": "other", "weight": 0}]
    body = front.chat(headers=headers, guides=guides, n=2, ignore_eos=True).json()
    (line,) = lines
    versions = {guide["name"]: guide["version"] for guide in body["guides"]}
    assert (
        line.items()
        >= {
            "request_id": "mine",
            "session_id": "ours",
            "replica": "Pipeline#1",
            "key": "",
            "method": "POST",
            "path": "/v1/chat/completions",
            "status": 200,
            "model": "base",
            "prompt_tokens": body["usage"]["prompt_tokens"],
            "completion_tokens": 16,
            "failovers": 0,
            "finish_reasons": ["length", "length"],
            "guides": [
                {"name": "helpful", "version": versions["helpful"], "weight": 0.5},
                {"name": "other", "version": versions["other"], "weight": 0},
            ],
        }.items()
    )
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["seconds"]
    assert "prompt" not in line
    assert "what did the cat do" not in json.dumps(line)


def test_prompts_are_written_down_only_if_wanted(
    server: Server, lines: list[dict[str, Any]]
) -> None:
    front = Front(server._pipeline(), log_prompts=True)
    front.chat()
    front.ask("/v1/completions", json={"model": "base", "prompt": [40, 41], "max_tokens": 1})
    front.ask("/v1/completions", json=[])
    assert [line["prompt"] for line in lines] == [MESSAGES, [40, 41], None]


def test_streams_failures_and_refusals_leave_a_line_each(
    server: Server, lines: list[dict[str, Any]]
) -> None:
    broken = Front(server._pipeline(Dying(2, items=1)))
    broken.chat(stream=True, ignore_eos=True)
    Front(server._pipeline(Dying(float("inf"), items=0))).chat()
    broken.chat(model="base:unheard")
    found = [(line["status"], line["failovers"], line["finish_reasons"]) for line in lines]
    assert found == [(200, 2, ["length"]), (500, 3, ["error"]), (404, 0, [])]


def test_what_asks_every_few_seconds_leaves_none(
    server: Server, lines: list[dict[str, Any]]
) -> None:
    front = Front(server._pipeline())
    for path in ("/health", "/ready", "/version", "/ping"):
        assert front.ask(path).status_code == 200
    assert lines == []
    front.ask("/v1/models")
    assert [line["path"] for line in lines] == ["/v1/models"]


def test_the_request_id_comes_back_once_which_is_by_serves_proxy(server: Server) -> None:
    answer = Front(server._pipeline()).chat(headers={"X-Request-Id": "mine"})
    assert "X-Request-Id" not in answer.headers
    assert answer.json()["id"].endswith("mine")


def test_an_abandoned_stream_is_counted_as_such(
    server: Server, book: Book, lines: list[dict[str, Any]]
) -> None:
    front = Front(server._pipeline())

    async def run() -> None:
        body = {"model": "base", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
        sent = json.dumps({**body, "stream": True}).encode()
        came = asyncio.Event()

        async def receive() -> Any:
            if not came.is_set():
                came.set()
                return {"type": "http.request", "body": sent}
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            await asyncio.sleep(0.01)

        scope = {
            **{"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""},
            **{"headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)},
        }
        await front.app(scope, receive, send)
        async with asyncio.timeout(10):
            while server.model._decoding.thread.num_open:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    (line,) = lines
    assert line["finish_reasons"] == ["abort"]
    assert 0 < line["completion_tokens"] < 900
    assert book.total("request_success", finished_reason="abort") == 1


def test_requests_are_counted_by_guide_and_version(server: Server, book: Book) -> None:
    front = Front(server._pipeline())
    for guides in ({}, {"helpful": 1.0}, {"helpful": 1.0, "other": 1.0}, {"other": 0.0}):
        asked = [{"name": name, "weight": weight} for name, weight in guides.items()]
        assert front.chat(guides=asked, n=2, ignore_eos=True).status_code == 200
    version = {entry.name: entry.current.version for entry in server.catalog.guides}
    series = {
        (labels["guide"], labels["guide_version"], labels["finished_reason"])
        for labels in book.labels("request_success")
    }
    assert series == {
        ("", "", "length"),
        ("helpful", version["helpful"], "length"),
        ("several", "", "length"),
    }
    assert book.total("request_success", guide="") == 4
    assert book.total("generation_tokens", guide="helpful") == 16
    assert book.total("generation_tokens", model_name="base") == 64
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds"):
        assert len(book.of(name)) == 4
        assert all(0 < seconds < 30 for seconds in book.of(name))
    assert len(book.of("guide_kl_nats", guide="helpful")) == 2
    assert len(book.of("guide_kl_nats", guide="other")) == 1
    assert book.of("guide_kl_nats", guide="helpful")[0] > 0.001


def test_failovers_fallbacks_accept_rates_and_refusals_are_counted(
    server: Server, book: Book
) -> None:
    Front(server._pipeline(Dying(2, items=1))).chat(ignore_eos=True, max_tokens=30)
    assert book.total("failover", reason="ActorDiedError") == 2
    assert book.total("failover_replayed_tokens") > 0
    front = Front(server._pipeline())
    front.chat(guides=[{"name": "proxy"}])
    (rate,) = book.of("guide_accept_rate", guide="proxy")
    assert 0 < rate <= 1
    front.chat(model="base:unheard")
    front.chat(temperature=9)
    assert book.total("requests_refused", code="404") == 1
    assert book.total("requests_refused", code="400") == 1
    off = replace(server.catalog.guides[0], enabled=False)
    front = Front(with_catalog(server, server.catalog.with_guide(off)))
    spared = {"name": off.name, "on_failure": "base"}
    assert front.chat(guides=[spared]).status_code == 200
    assert book.total("guide_fallbacks", guide=off.name) == 1


@pytest.mark.parametrize("name", ["best", "aligner"])
def test_a_guide_that_is_switched_off_under_a_request_can_be_spared(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The replica knows already, and the ingress does not."""
    monkeypatch.setattr(server.model, "_off", frozenset({"best"}))
    monkeypatch.setattr(server.revisers["aligner"], "_off", True)
    front = Front(server._pipeline())
    refused = front.chat(guides=[{"name": name}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "guide_unavailable")
    spared = front.chat(guides=[{"name": name, "on_failure": "base"}])
    assert spared.json()["choices"][0]["message"]["content"] == server.text(
        MESSAGES, {}, seed=1, max_tokens=8
    )
    assert spared.json()["guides"][0]["gave_up_at"] == 0


def test_what_ray_refuses_is_not_counted(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters take no zero."""
    engine = EngineMetrics("base")
    stats = {
        **{"num_running": 2, "num_waiting": 1, "cache_share": 0.5, "step_seconds": 2.0},
        **{"num_preempted": 0, "num_rounds": 4, "num_drafted": 16, "num_accepted": 8},
        "guide_seconds": {"helpful@1": 0.5, 'helpful@1{"gate":0.5}#3': 0.25, "far@x/y": 0.5},
    }
    engine.show(stats)
    engine.show({**stats, "step_seconds": 4.0, "guide_seconds": {"helpful@1": 1.5}})
    assert book.of("num_requests_running") == [2, 2]
    assert book.of("kv_cache_usage_perc") == [0.5, 0.5]
    assert book.of("num_preemptions") == []
    assert book.of("spec_decode_num_draft_tokens") == [16]
    assert book.of("guide_forward_seconds", guide="helpful", guide_version="1") == [0.75, 1.0]
    assert book.of("guide_share_of_step", guide="helpful") == [0.375, 0.5]
    assert book.of("guide_share_of_step", guide="far", guide_version="x/y") == [0.25]


def test_metrics_are_named_as_the_dashboards_know_them(book: Book) -> None:
    RequestMetrics("base")
    EngineMetrics("base")
    for name in ("num_requests_running", "kv_cache_usage_perc", "time_to_first_token_seconds"):
        assert f"pilotfish_{name}" in book.names
    assert not any(name.endswith("_total") for name in book.names)  # Prometheus adds it
