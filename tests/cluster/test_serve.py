"""One Serve application on a local cluster: what only real processes can show."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from ray import serve

from pilotfish import Pilot, SamplingParams
from tests.folders import save_base, save_guide

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]


@dataclass(frozen=True)
class World:
    """The running application, and the same models in this process."""

    client: openai.OpenAI
    pilot: Pilot

    def stats(self) -> list[dict[str, int]]:
        handle: Any = serve.get_deployment_handle("BaseModel", "tiny")
        return handle.broadcast("stats").results()


@pytest.fixture(scope="module")
def world(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    base, guide = save_base(folder / "base"), save_guide(folder / "guide", weight=0.5)
    config = folder / "serve.yaml"
    port = _free_port()
    config.write_text(CONFIG.format(port=port, root=ROOT, base=base, guide=guide))
    try:
        subprocess.run(
            [Path(sys.executable).parent / "serve", "deploy", config, "--address", ray_cluster],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
        )
        url = f"http://127.0.0.1:{port}"
        _until(lambda: _is_ready(url), timeout_s=120)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            pilot = Pilot(base, {"near": guide}, device="cpu", dtype="float64")
            yield World(client, pilot)
    finally:
        serve.shutdown()


CONFIG = """
proxy_location: HeadOnly
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: tiny
    route_prefix: /
    import_path: serve.app:build
    runtime_env: {{env_vars: {{PYTHONPATH: "{root}:{root}/platform", OMP_NUM_THREADS: "1"}}}}
    args:
      # float64, so that texts can be compared: no near-ties.
      base: {{path: {base}, num_replicas: 2, num_slots: 8, num_cpus: 0.5, dtype: float64}}
      guides:
        - {{name: near, path: {guide}, dtype: float64}}
        - {{name: far, path: {guide}, placement: remote, num_cpus: 0.5, dtype: float64}}
      ingress: {{token_deadline_s: 20}}
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def _expected(world: World, *, guides: dict[str, float], **params: Any) -> str:
    return world.pilot.generate([MESSAGES], SamplingParams(**params), guides=guides)[0].text


def _chat(world: World, **fields: Any) -> str:
    settings = {"model": "base", "messages": MESSAGES, "max_tokens": 40, **fields}
    return world.client.chat.completions.create(**settings).choices[0].message.content or ""


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.05)


def test_a_chat_answer_is_the_text_that_pilot_writes(world: World) -> None:
    for seed in (1, 2, 3):
        expected = _expected(world, guides={"near": 0.5}, seed=seed, max_tokens=40)
        assert _chat(world, model="base:near", seed=seed) == expected


def test_streams_of_the_async_client_are_the_text_that_pilot_writes(world: World) -> None:
    async def stream(client: openai.AsyncOpenAI, seed: int) -> str:
        chunks = await client.chat.completions.create(
            model="base", messages=MESSAGES, seed=seed, max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=world.client.base_url, api_key="none") as client:
            return await asyncio.gather(*(stream(client, seed) for seed in range(8)))

    expected = [_expected(world, guides={}, seed=seed, max_tokens=40) for seed in range(8)]
    assert asyncio.run(run()) == expected


def test_a_text_completion_is_the_text_that_pilot_writes(world: World) -> None:
    params = SamplingParams(seed=4, max_tokens=40)
    expected = world.pilot.generate(["the cat"], params, guides={})[0].text
    answer = world.client.completions.create(model="base", prompt="the cat", seed=4, max_tokens=40)
    assert answer.choices[0].text == expected


def test_a_remote_guide_writes_the_text_of_a_colocated_one(world: World) -> None:
    for sampling in ({"temperature": 0}, {"seed": 1}, {"seed": 2}):
        near = _chat(world, extra_body={"guides": [{"name": "near", "weight": 1}]}, **sampling)
        far = _chat(world, extra_body={"guides": [{"name": "far", "weight": 1}]}, **sampling)
        assert far == near != _chat(world, **sampling)


def test_errors_pass_the_proxy_in_the_shape_that_the_client_knows(world: World) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        _chat(world, model="base:unheard")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as refused:
        _chat(world, presence_penalty=1)
    assert (refused.value.param, refused.value.type) == (
        "presence_penalty",
        "invalid_request_error",
    )


def test_a_client_that_goes_away_frees_its_slot(world: World) -> None:
    def num_open() -> int:
        return sum(replica["num_open"] for replica in world.stats())

    stream = world.client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert num_open() == 1
    stream.close()
    _until(lambda: num_open() == 0, timeout_s=5)


class Stream(threading.Thread):
    """One client that reads a stream, and what it got."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__()
        self.ids: list[int] = []
        self._chunks = world.client.chat.completions.create(
            model="base:near",
            messages=MESSAGES,
            seed=seed,
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )

    def run(self) -> None:
        for chunk in self._chunks:
            for choice in chunk.choices:
                self.ids += (choice.model_extra or {}).get("token_ids", [])


def test_a_killed_base_replica_loses_nothing(world: World) -> None:
    _until(lambda: len(world.stats()) == 2, timeout_s=60)
    streams = [Stream(world, seed) for seed in range(4)]
    for stream in streams:
        stream.start()
    _until(lambda: all(len(stream.ids) >= 10 for stream in streams), timeout_s=30)
    busiest = max(world.stats(), key=lambda replica: replica["num_open"])
    assert busiest["num_open"] > 0
    os.kill(busiest["pid"], signal.SIGKILL)
    for stream in streams:
        stream.join(timeout=60)
    params = [SamplingParams(seed=seed, max_tokens=900, ignore_eos=True) for seed in range(4)]
    expected = world.pilot.generate([MESSAGES] * 4, params, guides={"near": 0.5})
    assert [stream.ids for stream in streams] == [each.token_ids for each in expected]
