"""What Serve sees of replicas that decode: calls go on to a process apart, and come back."""

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pilotfish.context import Prompt
from pilotfish.guides.base import Draft
from serve.catalog import Catalog, GuideVersion
from serve.config import ServeConfig
from serve.errors import cause_of
from serve.metrics import EngineMetrics
from serve.replicas.apart import Apart
from serve.replicas.base_model import BaseModel
from serve.replicas.guide_line import Address
from serve.replicas.peer import Peer, PeerHandle
from serve.replicas.reporting import Reporting
from serve.replicas.response_guide import ResponseGuide
from serve.retries import is_retryable
from serve.wire import GenerateRequest, GuideUse


class Front:
    """A replica that decodes, as Serve sees it: a `BaseModel` or a `ResponseGuide`, where the
    methods are described. The latter is not asked to `choose`, nor for `rewards`."""

    def __init__(
        self,
        title: str,
        make: Callable[..., Any],
        config: ServeConfig,
        *args: Any,
        remote: Mapping[str, Any],
        control: Callable[[], Any],
    ) -> None:
        """Have `make(peer, config, *args)` made apart.

        `remote` holds a handle for each guide with replicas of its own that it may ask.
        """
        services = Services(control, remote)
        self._apart = Apart(title, make, config, *args, services=services)
        self._metrics = EngineMetrics(config.base.model_id)
        self._reporting = Reporting(self._show)

    async def generate(
        self, request: GenerateRequest, *version: GuideVersion
    ) -> AsyncGenerator[tuple[Any, ...]]:
        async with aclosing(self._apart.stream("generate", request, *version)) as stream:
            async for batch in stream:
                yield batch

    async def choose(
        self, use: GuideUse, prompt: Prompt, drafts: Sequence[Draft], uniform: float
    ) -> int:
        return await self._apart.call("choose", use, prompt, drafts, uniform)

    async def rewards(
        self, uses: Sequence[GuideUse], prompt: Prompt, answers: Sequence[Draft]
    ) -> dict[str, list[float]]:
        return await self._apart.call("rewards", uses, prompt, answers)

    async def prepare(self, version: GuideVersion) -> None:
        await self._apart.call("prepare", version)

    async def stats(self) -> dict[str, Any]:
        """Return what the process apart says of itself, and the id of this one."""
        stats = await self._apart.call("stats")
        return {**stats, "pid": os.getpid(), "decoding_pid": stats["pid"]}

    async def check_health(self) -> None:
        await self._apart.call("check_health")
        self._reporting.ensure()

    async def _show(self) -> None:
        self._metrics.show(await self._apart.call("stats"))


class Services:
    """What the process apart needs of the cluster."""

    def __init__(self, control: Callable[[], Any], remote: Mapping[str, Any]) -> None:
        self._control, self._remote = control, remote
        self._attended: set[asyncio.Task[None]] = set()

    async def catalog(self) -> Catalog:
        return await self._control().catalog.remote()

    async def changes(self, known: Catalog) -> Catalog | None:
        return await self._control().changes.remote(known)

    async def attend(self, name: str, version: GuideVersion, ticket: str) -> Address:
        """Have a replica of a guide expect the ticket: see `remote_guide.Attend`."""
        guide = self._remote[name].options(stream=True, _by_reference=False)
        visit = guide.attend.remote(version, ticket)
        try:
            address = await anext(visit)
        except asyncio.CancelledError:
            visit.cancel()
            raise
        except Exception as error:
            if is_retryable(error):
                raise ConnectionError(repr(error)) from error
            raise cause_of(error) from None
        # The call lasts as long as the visit: so Serve knows who is busy.
        task = asyncio.ensure_future(_outlast(visit))
        self._attended.add(task)
        task.add_done_callback(self._attended.discard)
        return address


async def _outlast(visit: Any) -> None:
    try:
        async for _ in visit:
            pass
    except Exception:
        pass  # who is there notices by the connection


def make_base(
    peer: Peer, config: ServeConfig, catalog: Catalog, remote: Sequence[str]
) -> BaseModel:
    """Make what a base replica runs; `remote` are names of guides with replicas of their own."""
    attend = {name: functools.partial(peer.begin, "attend", name) for name in remote}
    return BaseModel(config, catalog, attend, control=lambda: PeerHandle(peer))


def make_response_guide(
    peer: Peer, config: ServeConfig, name: str, catalog: Catalog
) -> ResponseGuide:
    """Make what a replica of a response guide runs."""
    return ResponseGuide(config, name, catalog, control=lambda: PeerHandle(peer))
