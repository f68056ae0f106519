"""An ingress replica as Serve sees it: gate, log and metrics around the API, and no Ray."""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from serve.api.access_log import logger as access_logger
from serve.api.ingress import Pipeline
from serve.api.operations import surround
from serve.api.routes import build_routes
from serve.catalog import Catalog
from tests.http_api import MESSAGES, Server


@contextmanager
def access_lines() -> Iterator[list[dict[str, Any]]]:
    """Collect the lines of the access log."""
    written: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(json.loads(record.getMessage()))

    handler = Handler()
    access_logger.addHandler(handler)
    yield written
    access_logger.removeHandler(handler)


class Front:
    """An ingress as Serve sees it."""

    def __init__(self, pipeline: Pipeline, **ingress: Any) -> None:
        config = pipeline._config.model_copy(update=ingress)
        self.app = surround(
            build_routes(pipeline), config, None, pipeline._metrics, replica="Pipeline#1"
        )

    async def asks(self, path: str, **request: Any) -> httpx2.Response:
        transport = httpx2.ASGITransport(self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            method = "POST" if "json" in request else "GET"
            return await client.request(method, path, **request)

    def ask(self, path: str, **request: Any) -> httpx2.Response:
        return asyncio.run(self.asks(path, **request))

    def chat(self, *, headers: Any = None, **fields: Any) -> httpx2.Response:
        body = {"model": "base", "messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields}
        return self.ask("/v1/chat/completions", json=body, headers=headers)


def with_catalog(server: Server, catalog: Catalog, **ingress: Any) -> Pipeline:
    pipeline = server._pipeline(**ingress)
    pipeline._stock._following.catalog = catalog
    return pipeline
