"""/metrics: our metrics of all nodes on one page, in Prometheus' text format.

Every node's Ray agent has a page with the metrics of that node's processes. Prometheus can read
those pages itself, and should where there are many nodes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import ray

logger = logging.getLogger(__name__)

MEDIA_TYPE = "text/plain; version=0.0.4"
_PREFIX = "ray_pilotfish_"
_TIMEOUT_S = 3.0


async def page() -> str:
    """Return the page; nodes that do not answer are left out of it."""
    nodes = await asyncio.to_thread(ray.nodes)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def fetch(url: str) -> str:
            async with session.get(url) as response:
                response.raise_for_status()
                return await response.text()

        return merge(await read_all(addresses(nodes), fetch))


def addresses(nodes: Iterable[dict[str, Any]]) -> list[str]:
    """Return where the agents of all nodes that live show their metrics."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"] and node.get("MetricsExportPort")
    ]


async def read_all(urls: Iterable[str], fetch: Callable[[str], Awaitable[str]]) -> list[str]:
    """Return the pages that can be had."""

    async def read(url: str) -> str:
        try:
            return await fetch(url)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("no metrics from %s: %r", url, error)
            return ""

    return await asyncio.gather(*map(read, urls))


def merge(pages: Iterable[str]) -> str:
    """Put the series of all pages that are ours under one heading per metric."""
    families: dict[str, _Family] = {}
    for text in pages:
        family = None
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, what, name, *_ = line.split(" ", 3)
                ours = name.startswith(_PREFIX)
                family = families.setdefault(name, _Family()) if ours else None
                if family is not None:
                    family.heading.setdefault(what, line)
            elif family is not None and line:
                family.samples.append(line)
    return "".join(f"{line}\n" for family in families.values() for line in family.lines())


@dataclass(slots=True)
class _Family:
    heading: dict[str, str] = field(default_factory=dict)
    """Its HELP and its TYPE."""
    samples: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [*self.heading.values(), *self.samples]
