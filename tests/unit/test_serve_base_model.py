"""`serve.replicas.base_model` and `serve.replicas.engine_thread`, without Ray."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pilotfish import Pilot, SamplingParams
from pilotfish.context import Prompt
from pilotfish.decode.sequence import Request
from pilotfish.errors import PromptError
from serve.catalog import GuideVersion, make_catalog
from serve.config import parse_args
from serve.errors import EngineError, GuideUnavailableError
from serve.replicas.base_model import BaseModel
from serve.replicas.guide_line import Address
from serve.replicas.guide_model import GuideModel
from serve.replicas.remote_guide import Attend
from serve.wire import GenerateRequest, GuideUse, OnFailure, Token
from tests.folders import save_base, save_guide
from tests.handles import LocalVisits

PROMPT = [40, 41, 42, 43]
REMOTE = {"precision": "full", "timeout_s": 0.25, "cooldown_s": 0}


class Parts:
    """Everything one application needs, and a way to build replicas of it."""

    def __init__(self, folder: Path) -> None:
        self.base, self.guide = save_base(folder / "base"), save_guide(folder / "guide")
        settings = {"path": str(self.guide)}
        self.config = parse_args(
            {
                "base": {"path": str(self.base), "num_slots": 4, "stall_s": 0.3},
                "guides": [
                    {"name": "near", **settings},
                    {"name": "far", **settings, "placement": "remote", **REMOTE},
                ],
            }
        )
        self.catalog = make_catalog(self.config, created=0)
        self.left = threading.Event()
        """Set where a replica would have ended its process."""

    def guide_model(self) -> GuideModel:
        far = self.config.guide("far")
        return GuideModel(far, self.catalog, num_slots=4, host=lambda: "127.0.0.1")

    def base_model(self, far: Attend) -> BaseModel:
        return BaseModel(self.config, self.catalog, {"far": far}, leave=self.left.set)

    def request(
        self,
        *,
        guides: dict[str, float] | None = None,
        on_failure: OnFailure = "fail",
        completed: list[int] | None = None,
        **params: Any,
    ) -> GenerateRequest:
        versions = {guide.name: guide.current for guide in self.catalog.guides}
        return GenerateRequest(
            prompt_ids=PROMPT,
            messages=None,
            text=None,
            params={"seed": 3, "max_tokens": 12, "ignore_eos": True, **params},
            guides=[
                GuideUse(versions[name], weight, {}, on_failure)
                for name, weight in (guides or {}).items()
            ],
            draft=None,
            completed=completed or [],
            gave_up=[],
            attempt="r#0",
        )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(parts: Parts) -> Iterator[BaseModel]:
    guide = parts.guide_model()
    model = parts.base_model(LocalVisits(guide))
    yield model
    model.close()
    guide.close()


async def drain(model: BaseModel, sent: GenerateRequest) -> list[Token]:
    return [Token(*values) async for batch in model.generate(sent) for values in batch[0]]


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def test_concurrent_streams_are_what_an_engine_draws(parts: Parts, model: BaseModel) -> None:
    engine = Pilot(parts.base, {"near": parts.guide}, device="cpu", num_slots=4).engine
    drawn: list[list[int]] = [[] for _ in range(6)]
    for seed in range(6):
        params = SamplingParams(seed=seed, max_tokens=12, ignore_eos=True)
        engine.submit(Request(key=seed, prompt=Prompt(PROMPT), params=params, guides={"near": 1.0}))
    while engine.busy:
        for event in engine.step():
            drawn[event.key].append(event.token_id)

    async def run() -> list[list[Token]]:
        sent = [parts.request(seed=seed, guides={"near": 1.0}) for seed in range(6)]
        return await asyncio.gather(*(drain(model, each) for each in sent))

    assert [ids(tokens) for tokens in asyncio.run(run())] == drawn


def test_a_resumed_request_goes_on_where_it_was(parts: Parts, model: BaseModel) -> None:
    async def run() -> None:
        whole = await drain(model, parts.request(guides={"near": 0.7}))
        resumed = await drain(model, parts.request(guides={"near": 0.7}, completed=ids(whole)[:5]))
        assert resumed[0].position == 5
        assert ids(resumed) == ids(whole)[5:]
        assert resumed[-1].finish_reason == "length"

    asyncio.run(run())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_remote_guide_gives_the_tokens_of_a_colocated_one(
    parts: Parts, model: BaseModel, temperature: float
) -> None:
    async def run() -> None:
        for seed in range(3):
            sampling = {"temperature": temperature, "seed": seed, "max_tokens": 30}
            near = await drain(model, parts.request(guides={"near": 0.7}, **sampling))
            far = await drain(model, parts.request(guides={"far": 0.7}, **sampling))
            assert {token.moved_by for token in far} == {"far"}
            # Log-probs and KL too: nothing is rounded on the way.
            assert [token._replace(moved_by="near") for token in far] == near

    asyncio.run(run())


def test_weight_zero_is_the_base_exactly(parts: Parts, model: BaseModel) -> None:
    async def run() -> None:
        off = await drain(model, parts.request(guides={"far": 0.0}))
        assert off == await drain(model, parts.request())

    asyncio.run(run())


def test_a_request_that_can_never_be_decoded_raises_for_its_own_stream(
    parts: Parts, model: BaseModel
) -> None:
    async def run() -> None:
        with pytest.raises(PromptError, match="more than the"):
            await drain(model, parts.request(max_tokens=5000))
        assert len(await drain(model, parts.request())) == 12

    asyncio.run(run())


def test_a_closed_stream_frees_its_slot(parts: Parts, model: BaseModel) -> None:
    async def run() -> None:
        stream = model.generate(parts.request(max_tokens=900))
        await anext(stream)
        assert (await model.stats())["num_open"] == 1
        await stream.aclose()
        await _until(lambda: model._decoding.thread.num_open == 0)
        assert model._decoding.engine.num_running == 0

    asyncio.run(run())


async def _until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_exception_in_the_engine_reaches_every_stream_and_the_health_check(
    parts: Parts, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise ValueError("out of order")

    async def run() -> None:
        await model.check_health()
        monkeypatch.setattr(model._decoding.engine, "step", explode)
        streams = [drain(model, parts.request(seed=seed)) for seed in range(3)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert [type(result) for result in results] == [EngineError] * 3
        with pytest.raises(EngineError, match="out of order"):
            await model.check_health()
        with pytest.raises(EngineError, match="out of order"):
            await drain(model, parts.request())

    asyncio.run(run())


def test_a_replica_whose_engine_died_leaves(
    parts: Parts, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise ValueError("out of order")

    async def run() -> None:
        parts.left.clear()
        monkeypatch.setattr(model._decoding.engine, "step", explode)
        with pytest.raises(EngineError):
            await drain(model, parts.request())
        assert not parts.left.is_set()  # what it was decoding hears of it first
        await _until(parts.left.is_set)

    asyncio.run(run())


def test_a_step_that_hangs_makes_the_replica_unhealthy(
    parts: Parts, model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = model._decoding.engine.step

    def slow() -> Any:
        time.sleep(1.0)
        return step()

    async def run() -> None:
        monkeypatch.setattr(model._decoding.engine, "step", slow)
        answer = asyncio.create_task(drain(model, parts.request(max_tokens=1)))
        await asyncio.sleep(0.6)
        with pytest.raises(EngineError, match=r"longer than 0\.3 s"):
            await model.check_health()
        await answer
        await model.check_health()

    asyncio.run(run())


def nowhere(_version: GuideVersion, _ticket: str) -> Future[Address]:
    """Find no replica of a guide, however long one looks."""
    return Future()


def test_a_guide_that_is_gone_fails_only_the_requests_that_want_it(parts: Parts) -> None:
    model = parts.base_model(nowhere)

    async def run() -> None:
        guided = asyncio.create_task(drain(model, parts.request(guides={"far": 1.0})))
        plain = await drain(model, parts.request(max_tokens=40))
        assert len(plain) == 40
        with pytest.raises(GuideUnavailableError, match=r"guide 'far@.*' does not answer"):
            await guided
        await model.check_health()

        sent = parts.request(guides={"far": 1.0}, on_failure="base")
        batches = [batch async for batch in model.generate(sent)]
        unguided = [Token(*values) for batch in batches for values in batch[0]]
        assert ids(unguided) == ids(await drain(model, parts.request()))
        assert [gone for batch in batches for gone in batch[1]] == [("far", 0)]

    asyncio.run(run())
    model.close()
