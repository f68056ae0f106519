"""The HTTP API in this process: a real base replica, the ASGI application, and no Ray."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from pilotfish import Pilot, SamplingParams
from serve.api.ingress import Pipeline
from serve.api.routes import build_routes
from serve.catalog import Catalog, make_catalog
from serve.config import parse_args
from serve.ingress_config import IngressConfig
from serve.replicas.base_model import BaseModel
from tests.folders import save_base, save_guide
from tests.handles import LocalHandle

MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]


class Server:
    """One base replica, and ingresses in front of it."""

    def __init__(self, folder: Path) -> None:
        base, guide = save_base(folder / "base"), save_guide(folder / "guide", weight=0.5)
        config = parse_args(
            {
                "base": {"path": str(base), "num_slots": 4},
                "guides": [{"name": "helpful", "path": str(guide)}],
            }
        )
        self.catalog: Catalog = make_catalog(config, created=123)
        self.model = BaseModel(config, self.catalog, {})
        self.pilot = Pilot(base, {"helpful": guide}, device="cpu")

    def text(self, prompt: Any, guides: dict[str, float], **params: Any) -> str:
        return self.pilot.generate([prompt], SamplingParams(**params), guides=guides)[0].text

    def pipeline(
        self, breakage: Callable[[Any], Any] = lambda call: call, **ingress: Any
    ) -> Pipeline:
        base = LocalHandle(self.model, breakage)
        return Pipeline(IngressConfig(**ingress), self.catalog, base, {}, None)


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


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response: httpx2.Response) -> list[Any]:
    *events, done = [line[6:] for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]
