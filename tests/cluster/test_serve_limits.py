"""One Serve application behind API keys: who is turned away, and what holds under too much load."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from ray import serve

from jobs.serving import application, free_port, write_serve_config
from pilotfish import Pilot, SamplingParams
from tests.cluster.serving import Deployed, deploy, deployed, until
from tests.folders import save_aligner, save_base

pytestmark = pytest.mark.cluster

MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]
KEY, ADMIN_KEY = "sk-somebody", "sk-the-boss"
NUM_PLACES = 4  # and as many wait
NUM_TOKENS = 60
MOST_BYTES = 50_000


@dataclass(frozen=True)
class World:
    """The running application, and the same models in this process."""

    app: Deployed
    pilot: Pilot

    def expected(self, seed: int, guides: dict[str, float]) -> str:
        params = SamplingParams(seed=seed, max_tokens=NUM_TOKENS)
        return self.pilot.generate([MESSAGES], params, guides=guides)[0].text

    def post(self, path: str, key: str = KEY, **request: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}", **request.pop("headers", {})}
        return requests.post(f"{self.app.url}{path}", headers=headers, timeout=60, **request)


def write_aligner(folder: Path) -> Path:
    # A context with room for a question, an answer and its correction in bytes.
    return save_aligner(folder, settings={"template": "paper", "max_tokens": 200})


def test_a_server_without_keys_refuses_to_listen_where_others_reach_it(
    ray_cluster: str, tmp_path: Path
) -> None:
    config = tmp_path / "open.yaml"
    args = {"base": {"path": str(save_base(tmp_path / "base")), "num_cpus": 0.1}}
    write_serve_config(
        config, [application("open", args)], port=free_port(0), proxy_location="HeadOnly"
    )
    config.write_text(config.read_text().replace("127.0.0.1", "0.0.0.0"))
    try:
        deploy(ray_cluster, config)

        def failed() -> bool:
            found = serve.status().applications.get("open")
            return found is not None and found.status == "DEPLOY_FAILED"

        until(failed, timeout_s=120)
        replicas = serve.status().applications["open"].deployments["Pipeline"]
        assert "has no API keys" in replicas.message
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def world(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    base, aligner = save_base(folder / "base"), write_aligner(folder / "aligner")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\nadmin:{ADMIN_KEY}\n")
    exact = {"dtype": "float64", "num_cpus": 0.2}
    args = {
        "base": {"path": str(base), "num_slots": NUM_PLACES, **exact},
        "guides": [
            {
                **{"name": "aligner", "path": str(aligner), "placement": "remote"},
                **{"num_replicas": 2, **exact},
            }
        ],
        "ingress": {
            "num_cpus": 0.2,
            "api_keys_file": str(keys),
            "max_in_flight": NUM_PLACES,
            "max_queued": NUM_PLACES,
            "limits": {"body_bytes": MOST_BYTES, "body_timeout_s": 2},
        },
    }
    pilot = Pilot(base, {"aligner": aligner}, device="cpu", dtype="float64")
    with deployed(ray_cluster, folder, args, name="limits") as app:
        yield World(app, pilot)


async def ask(client: openai.AsyncOpenAI, seed: int, **extra: Any) -> str:
    answer = await client.chat.completions.create(
        model="base", messages=MESSAGES, seed=seed, max_tokens=NUM_TOKENS, extra_body=extra
    )
    return answer.choices[0].message.content or ""


def test_only_those_with_a_key_are_answered_and_only_some_may_change_guides(world: World) -> None:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 1}
    path = "/v1/chat/completions"
    assert world.post(path, json=body).status_code == 200
    refused = world.post(path, key="sk-nobody", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert world.post("/admin/guides/reload", json={"name": "aligner"}).status_code == 403
    changed = world.post("/admin/guides/reload", key=ADMIN_KEY, json={"name": "aligner"})
    assert changed.status_code == 200, changed.text


def test_an_answer_carries_the_request_id_that_it_was_sent_once(world: World) -> None:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 2}
    for stream in (False, True):
        answer = world.post(
            "/v1/chat/completions",
            json={**body, "stream": stream},
            headers={"X-Request-Id": "mine-1"},
        )
        assert answer.raw.headers.getlist("X-Request-Id") == ["mine-1"]


def test_a_body_that_is_too_large_or_too_slow_is_refused(world: World) -> None:
    path = "/v1/completions"
    large = world.post(path, json={"model": "base", "prompt": "x" * MOST_BYTES})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    host, port = world.app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n"
        connection.sendall(f"{head}Authorization: Bearer {KEY}\r\n\r\n".encode() + b'{"model"')
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_overload_is_turned_away_and_leaves_nothing_behind(world: World) -> None:
    num_clients = 4 * 2 * NUM_PLACES
    expected = {seed: world.expected(seed, {}) for seed in range(num_clients)}

    async def once(client: openai.AsyncOpenAI, seed: int) -> str:
        try:
            assert await ask(client, seed) == expected[seed]
        except openai.RateLimitError as error:
            return "turned away" if error.response.headers["Retry-After"] == "1" else "no advice"
        return "answered"

    async def storm() -> Counter[str]:
        async with world.app.client(api_key=KEY) as client:
            found = await asyncio.gather(*(once(client, seed) for seed in range(num_clients)))
            # At once: no place is still held by anybody.
            again = await asyncio.gather(*(once(client, seed) for seed in range(2 * NUM_PLACES)))
        assert set(again) == {"answered"}
        return Counter(found)

    found = asyncio.run(storm())
    assert found["answered"] >= 2 * NUM_PLACES
    assert found["turned away"] == num_clients - found["answered"] > 0

    async def patient() -> list[str]:
        async with world.app.client(api_key=KEY, max_retries=100) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(num_clients)))

    assert asyncio.run(patient()) == list(expected.values())


def test_a_killed_response_guide_loses_nothing(world: World) -> None:
    name = "ResponseGuide:aligner"
    until(lambda: world.app.has_running(name, 2), timeout_s=60)
    seeds = list(range(NUM_PLACES))

    async def kill() -> None:
        while not (busy := [one for one in await stats() if one["num_open"]]):
            await asyncio.sleep(0.005)
        [victim] = [p for p in world.app.processes(name) if p.pid == busy[0]["pid"]]
        world.app.kill(victim)

    async def stats() -> list[dict[str, Any]]:
        return await asyncio.to_thread(world.app.stats, name)

    async def revise() -> list[str]:
        async with world.app.client(api_key=KEY) as client:
            asked = [ask(client, seed, response_guide="aligner") for seed in seeds]
            *texts, _ = await asyncio.gather(*asked, kill())
        return [str(text) for text in texts]

    texts = asyncio.run(revise())
    assert texts == [world.expected(seed, {"aligner": 1.0}) for seed in seeds]


def test_metrics_have_the_names_that_dashboards_ask_for(world: World) -> None:
    def exported() -> bool:
        page = requests.get(
            f"{world.app.url}/metrics", headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=10
        )
        assert page.status_code == 200, page.text
        wanted = ("pilotfish_generation_tokens_total", "pilotfish_time_to_first_token_seconds")
        return all(f"ray_{name}" in page.text for name in wanted)

    until(exported, timeout_s=60)
