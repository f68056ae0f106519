"""One Serve application on a local cluster: what only real processes can show.

They answer, and they die, hang and change while 16 clients read; nobody loses a token.
"""

import asyncio
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlflow
import openai
import psutil
import pytest
import requests

from pilotfish import Pilot, SamplingParams
from tests.cluster.serving import Deployed, Reader, deployed, until
from tests.folders import save_base, save_guide

pytestmark = pytest.mark.cluster

MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]
NUM_STREAMS = 16
NUM_TOKENS = 150
GUIDES = {"near": 0.5, "far": 0.7}


@dataclass(frozen=True)
class World:
    """The running application, and the same models in this process."""

    app: Deployed
    pilot: Pilot
    registry: mlflow.MlflowClient
    client: openai.OpenAI

    def chat(self, **fields: Any) -> str:
        settings = {"model": "base", "messages": MESSAGES, "max_tokens": 40, **fields}
        answer = self.client.chat.completions.create(**settings)
        return answer.choices[0].message.content or ""

    def text(self, prompt: Any, guides: dict[str, float], **params: Any) -> str:
        sampling = SamplingParams(**{"max_tokens": 40, **params})
        return self.pilot.generate([prompt], sampling, guides=guides)[0].text

    def expected(self, seeds: list[int], guides: dict[str, float], max_tokens: int) -> Any:
        params = [SamplingParams(seed=s, max_tokens=max_tokens, ignore_eos=True) for s in seeds]
        found = self.pilot.generate([MESSAGES] * len(seeds), params, guides=guides)
        return [completion.token_ids for completion in found]


@pytest.fixture(scope="module")
def world(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base")
    guide, other = save_guide(folder / "guide"), save_guide(folder / "other", seed=9)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    registry = mlflow.MlflowClient(tracking_uri=uri)
    registry.create_registered_model("near")
    for source in (guide, other):
        registry.create_model_version("near", source=str(source))
    registry.set_registered_model_alias("near", "prod", "1")
    # float64, so that texts can be compared: no near-ties.
    exact = {"dtype": "float64"}
    args = {
        "base": {"path": str(base), "num_replicas": 2, "num_slots": 8, "num_cpus": 0.3, **exact},
        "guides": [
            {"name": "near", "path": "models:/near@prod", **exact},
            {
                **{"name": "far", "path": str(guide), "placement": "remote", "num_replicas": 2},
                **{"num_cpus": 0.2, "precision": "full", **exact},
            },
        ],
        "ingress": {"num_replicas": 2, "num_cpus": 0.2, "token_deadline_s": 6},
        "guides_poll_s": 0,
        "tracking_uri": uri,
    }
    pilot = Pilot(base, {"near": guide, "far": guide, "new": other}, device="cpu", dtype="float64")
    with (
        deployed(ray_cluster, folder, args, name="chaos") as app,
        openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield World(app, pilot, registry, client)


def reader(client: openai.AsyncOpenAI, seed: int, *, max_tokens: int = NUM_TOKENS) -> Reader:
    asked = [{"name": name, "weight": weight} for name, weight in GUIDES.items()]
    return Reader(
        client,
        model="base",
        messages=MESSAGES,
        seed=seed,
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True, "guides": asked},
    )


async def read_all(world: World, seeds: list[int], *then: Any, **settings: Any) -> list[Reader]:
    """Read streams while other things happen to the application."""
    async with world.app.client(timeout=120) as client:
        readers = [reader(client, seed, **settings) for seed in seeds]
        await asyncio.gather(*(one.read() for one in readers), *(act(readers) for act in then))
    return readers


def test_answers_are_the_texts_that_pilot_writes(world: World) -> None:
    for seed in (1, 2, 3):
        expected = world.text(MESSAGES, {"near": 0.5}, seed=seed)
        asked = [{"name": "near", "weight": 0.5}]
        assert world.chat(seed=seed, extra_body={"guides": asked}) == expected
    answer = world.client.completions.create(model="base", prompt="the cat", seed=4, max_tokens=40)
    assert answer.choices[0].text == world.text("the cat", {}, seed=4)


def test_a_remote_guide_writes_the_text_of_a_colocated_one(world: World) -> None:
    for sampling in ({"temperature": 0}, {"seed": 1}, {"seed": 2}):
        near = world.chat(extra_body={"guides": [{"name": "near", "weight": 1}]}, **sampling)
        far = world.chat(extra_body={"guides": [{"name": "far", "weight": 1}]}, **sampling)
        assert far == near != world.chat(**sampling)


def test_errors_pass_the_proxy_in_the_shape_that_the_client_knows(world: World) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        world.chat(model="base:unheard")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as refused:
        world.chat(presence_penalty=1)
    assert refused.value.param == "presence_penalty"
    assert refused.value.type == "invalid_request_error"


def test_the_page_and_the_metrics_pass_the_proxy(world: World) -> None:
    page = requests.get(f"{world.app.url}/playground", timeout=10)
    assert (page.status_code, "Pilotfish" in page.text) == (200, True)

    def counted() -> bool:
        found = requests.get(f"{world.app.url}/metrics", timeout=10)
        assert found.status_code == 200, found.text
        return "ray_pilotfish_generation_tokens" in found.text

    world.chat()
    until(counted, timeout_s=60)  # Ray collects them every few seconds


def test_a_client_that_goes_away_frees_its_slot(world: World) -> None:
    def num_open() -> int:
        return sum(replica["num_open"] for replica in world.app.stats("BaseModel"))

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
    until(lambda: num_open() == 0, timeout_s=5)


@pytest.mark.parametrize("victim", ["BaseModel", "BaseModel apart", "Guide:far", "Pipeline"])
def test_a_killed_replica_loses_nothing(world: World, victim: str) -> None:
    deployment, _, apart = victim.partition(" ")
    until(lambda: world.app.has_running(deployment, 2), timeout_s=60)
    chance = random.Random(victim)
    at = chance.randrange(10, 100)

    async def kill(readers: list[Reader]) -> None:
        while max(len(one.ids) for one in readers) < at:
            await asyncio.sleep(0.01)
        process = chance.choice(world.app.processes(deployment))
        world.app.kill(process.children()[0] if apart else process)

    seeds = list(range(NUM_STREAMS))
    readers = asyncio.run(read_all(world, seeds, kill))
    assert [one.ids for one in readers] == world.expected(seeds, GUIDES, NUM_TOKENS)
    broken = sum(one.num_breaks for one in readers)
    # Whoever holds a client's connection cannot die unseen; nobody else is seen to.
    assert broken == 0 or deployment == "Pipeline"


def test_a_stuck_base_replica_is_left(world: World) -> None:
    until(lambda: world.app.has_running("BaseModel", 2), timeout_s=60)
    stopped = []

    async def stop(readers: list[Reader]) -> None:
        while max(len(one.ids) for one in readers) < 20:
            await asyncio.sleep(0.01)
        stats = await asyncio.to_thread(world.app.stats, "BaseModel")
        busiest = max(stats, key=lambda one: one["num_open"])
        assert busiest["num_open"] > 0
        stopped.extend(psutil.Process(busiest[pid]) for pid in ("pid", "decoding_pid"))
        for process in stopped:
            world.app.kill(process, signal.SIGSTOP)

    seeds = list(range(20, 24))
    try:
        readers = asyncio.run(read_all(world, seeds, stop))
    finally:
        world.app.kill(stopped[0], signal.SIGKILL)
    assert [one.ids for one in readers] == world.expected(seeds, GUIDES, NUM_TOKENS)
    # Though it hung, it holds no memory any more.
    until(lambda: not stopped[1].is_running(), timeout_s=20)


def test_a_moved_alias_swaps_the_guide_under_load(world: World) -> None:
    until(lambda: world.app.has_running("BaseModel", 2), timeout_s=60)
    until(lambda: all("near@1" in one["guides"] for one in world.app.stats("BaseModel")), 60)
    later: list[Reader] = []

    async def swap(readers: list[Reader]) -> None:
        while min(len(one.ids) for one in readers) < 5:
            await asyncio.sleep(0.01)
        world.registry.set_registered_model_alias("near", "prod", "2")
        url = f"{world.app.url}/admin/guides/reload"
        answer = await asyncio.to_thread(requests.post, url, json={"name": "near"}, timeout=60)
        (said,) = answer.json()["data"]
        assert (said["status"], said["version"]) == ("swapped", "2"), said
        async with world.app.client() as client:
            later.append(reader(client, 50, max_tokens=60))
            await later[0].read()

    seeds = list(range(30, 38))
    readers = asyncio.run(read_all(world, seeds, swap, max_tokens=400))
    assert [one.ids for one in readers] == world.expected(seeds, GUIDES, 400)
    assert {guide["version"] for one in readers for guide in one.guides[:1]} == {"1"}
    assert later[0].ids == world.expected([50], {"new": 0.5, "far": 0.7}, 60)[0]
    assert later[0].guides[0]["version"] == "2"
    # With its last request the old version goes.
    until(lambda: all("near@1" not in one["guides"] for one in world.app.stats("BaseModel")), 30)
