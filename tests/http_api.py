"""The HTTP API in this process: a real base replica, the ASGI application, and no Ray."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
from ray.exceptions import ActorDiedError

from pilotfish import Pilot, SamplingParams
from pilotfish.decode.sequence import Completion
from serve.api.ingress import Pipeline
from serve.api.routes import build_routes
from serve.catalog import Catalog, make_catalog
from serve.config import parse_args
from serve.ingress_config import IngressConfig
from serve.replicas.base_model import BaseModel
from serve.replicas.guide_model import GuideModel
from serve.replicas.response_guide import ResponseGuide
from tests.folders import (
    save_aligner,
    save_base,
    save_card,
    save_guide,
    save_proxy,
    save_reward_guide,
    save_reward_model,
)
from tests.handles import LocalHandle, LocalStream, LocalVisits

Breakage = Callable[[Any], Any]
MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]


def _whole(call: Any) -> Any:
    return call


class Server:
    """One replica of each deployment, and ingresses in front of them."""

    def __init__(self, folder: Path) -> None:
        base = save_base(folder / "base")
        judge = save_reward_model(folder / "judge")
        settings = {"template": "paper", "max_tokens": 20}
        blocks = {"value": str(judge), "num_drafts": 2, "block_tokens": 5}
        paths = {
            "helpful": save_guide(folder / "guide", weight=0.5),
            "other": save_guide(folder / "other", seed=5),
            "far": save_guide(folder / "far", seed=7),
            "proxy": save_proxy(folder / "proxy"),
            "args": save_reward_guide(folder / "args", num_candidates=20),
            "best": save_card(folder / "best", kind="best_of_n", reward=str(judge), num_drafts=3),
            # Off unless a weight is named: one chain has one selection.
            "blocks": save_card(folder / "blocks", kind="blockwise", weight=0, **blocks),
            "aligner": save_aligner(folder / "aligner", settings=settings),
            "brief": save_aligner(folder / "brief", seed=4, settings=settings),
        }
        remote = ("far", "aligner", "brief")
        # float64, so that texts can be compared: no near-ties.
        guides: list[dict[str, Any]] = [
            {"name": name, "path": str(path), "dtype": "float64"} for name, path in paths.items()
        ]
        for guide in guides:
            if guide["name"] in remote:
                guide |= {
                    "placement": "remote",
                    "precision": "full",
                    "timeout_s": 2,
                    "cooldown_s": 0,
                }
        base_config = {"path": str(base), "num_slots": 8, "dtype": "float64"}
        self.config = parse_args({"base": base_config, "guides": guides})
        self.catalog: Catalog = make_catalog(self.config, created=123)
        self.far = GuideModel(
            self.config.guide("far"), self.catalog, num_slots=8, host=lambda: "127.0.0.1"
        )
        self.model = BaseModel(self.config, self.catalog, {"far": LocalVisits(self.far)})
        self.revisers = {
            name: ResponseGuide(self.config, name, self.catalog) for name in ("aligner", "brief")
        }
        self._plain = self._pipeline()
        self.pilot = Pilot(base, paths, device="cpu", dtype="float64")

    def close(self) -> None:
        for replica in (self.model, self.far, *self.revisers.values()):
            replica.close()

    def text(self, prompt: Any, guides: dict[str, float], **params: Any) -> str:
        return self.completion(prompt, guides, **params).text

    def completion(self, prompt: Any, guides: dict[str, float], **params: Any) -> Completion:
        draft = params.pop("draft", None)
        sampling = SamplingParams(**params)
        return self.pilot.generate([prompt], sampling, guides=guides, draft=draft)[0]

    def pipeline(
        self, breakage: Breakage = _whole, *, revising: Breakage = _whole, **ingress: Any
    ) -> Pipeline:
        """`breakage` may break calls to the base, and `revising` those to guides that rewrite.

        Where neither does, and nothing is set, it is one that others have used.
        """
        if breakage is _whole and revising is _whole and not ingress:
            return self._plain
        return self._pipeline(breakage, revising, **ingress)

    def _pipeline(
        self, breakage: Breakage = _whole, revising: Breakage = _whole, **ingress: Any
    ) -> Pipeline:
        base = LocalHandle(self.model, breakage)
        guides = {name: LocalHandle(model, revising) for name, model in self.revisers.items()}
        guides["far"] = LocalHandle(self.far)
        return Pipeline(IngressConfig(**ingress), self.catalog, base, guides, None)


@dataclass
class Dying:
    """Streams of which the next few end in an actor's death, after some items."""

    num_deaths: float
    items: int

    def __call__(self, call: Any) -> Any:
        if self.num_deaths <= 0 or not isinstance(call, LocalStream):
            return call
        self.num_deaths -= 1
        return _DyingStream(call, self.items)


@dataclass
class _DyingStream:
    stream: Any
    items: int

    async def __anext__(self) -> Any:
        if self.items == 0:
            raise ActorDiedError
        self.items -= 1
        return await anext(self.stream)

    def cancel(self) -> None:
        self.stream.cancel()


@asynccontextmanager
async def http_client(pipeline: Pipeline) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(build_routes(pipeline))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def with_openai(pipeline: Pipeline, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with http_client(pipeline) as http:
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
            )
            return await use(client)

    return asyncio.run(run())


def post(pipeline: Pipeline, path: str, body: Any) -> httpx2.Response:
    async def run() -> httpx2.Response:
        async with http_client(pipeline) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(run())


def chat(pipeline: Pipeline, **fields: Any) -> httpx2.Response:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields}
    return post(pipeline, "/v1/chat/completions", body)


def complete(pipeline: Pipeline, **fields: Any) -> httpx2.Response:
    body = {"model": "base", "prompt": "the cat sat", "max_tokens": 8, "seed": 1, **fields}
    return post(pipeline, "/v1/completions", body)


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response: httpx2.Response) -> list[Any]:
    *events, done = [line[6:] for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]
