"""The replicas behind the API, as calls that are made again elsewhere until one is answered."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pilotfish.context import Prompt
from pilotfish.guides.base import Draft
from serve.api.inbox import Inbox
from serve.api.journal import Journal, Patience, TokenStream, ask, follow
from serve.api.visit import current_visit
from serve.catalog import GuideVersion
from serve.wire import GenerateRequest, GuideUse, Token

T = TypeVar("T")

_READY_TIMEOUT_S = 2


class Calls:
    """Handles of `BaseModel` and of guides with replicas of their own, by name."""

    def __init__(self, base: Any, guides: Mapping[str, Any], patience: Patience) -> None:
        # Tokens are small: gRPC is quicker than a round through the object store.
        self._base = base.options(_by_reference=False)
        self._guides = {
            name: handle.options(_by_reference=False) for name, handle in guides.items()
        }
        self._patience = patience
        self.inbox: Inbox | None = None
        """Where tokens come past Serve, within a replica of it."""

    def decode(self, journal: Journal, session_id: str | None) -> AsyncGenerator[list[Token]]:
        """Yield the tokens of a completion: see `follow`."""
        session = {} if session_id is None else {"session_id": session_id}
        base = self._base.options(stream=True, **session)
        return self._follow("decode", journal, base.generate.remote)

    def revise(self, journal: Journal, version: GuideVersion) -> AsyncGenerator[list[Token]]:
        """Yield the tokens that a guide writes, in its own vocabulary: see `follow`."""
        guide = self._guides[version.name].options(stream=True)

        def send(request: GenerateRequest) -> Any:
            return guide.generate.remote(request, version)

        return self._follow("response guide", journal, send)

    def _follow(
        self, stage: str, journal: Journal, send: Callable[[GenerateRequest], TokenStream]
    ) -> AsyncGenerator[list[Token]]:
        inbox = self.inbox
        wired = send if inbox is None else lambda request: inbox.call(request, send)
        return current_visit().stage(stage, follow(journal, wired, self._patience))

    async def choose(
        self, use: GuideUse, prompt: Prompt, drafts: Sequence[Draft], uniform: float
    ) -> int:
        """Return the place of the draft that goes on."""
        remote = self._base.choose.remote
        return await ask(lambda: remote(use, prompt, drafts, uniform), self._patience)

    async def rewards(
        self, uses: Sequence[GuideUse], prompt: Prompt, answers: Sequence[Draft]
    ) -> dict[str, list[float]]:
        """Return what guides with reward models find answers worth, by their names."""
        remote = self._base.rewards.remote
        return await ask(lambda: remote(uses, prompt, answers), self._patience)

    async def ready(self) -> bool:
        """Whether the base and every guide with replicas of its own answers."""
        handles = [self._base, *self._guides.values()]
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await all_of([_stats(handle) for handle in handles])
        except Exception:
            return False
        return True


async def drain(stream: AsyncGenerator[list[Token]]) -> list[Token]:
    """Return all tokens of a stream."""
    return [token async for tokens in stream for token in tokens]


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for everything; the first failure ends the rest, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Yield what comes of any stream, with its place; the first failure ends them all.

    One that is not read from holds the streams up.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    came: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(len(streams))
    tasks = [
        asyncio.ensure_future(_pump(place, stream, came)) for place, stream in enumerate(streams)
    ]
    num_open = len(tasks)
    try:
        while num_open:
            item = await came.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(place: int, stream: AsyncGenerator[T], came: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await came.put((place, item))
    except Exception as error:
        await came.put(error)
    else:
        await came.put(None)


async def _stats(handle: Any) -> Any:
    return await handle.stats.remote()
