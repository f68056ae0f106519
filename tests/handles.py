"""Serve's handles without Serve: calls go to an object in this process."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

from serve.catalog import GuideVersion
from serve.replicas.front import Services
from serve.replicas.guide_line import Address


class LocalHandle:
    """A deployment handle of one replica. `breakage` may replace a call's stream or answer."""

    def __init__(self, target: object, breakage: Callable[[Any], Any] = lambda call: call) -> None:
        self._target = target
        self._breakage = breakage

    def options(self, **_: object) -> "LocalHandle":
        return self

    def __getattr__(self, name: str) -> "_Method":
        return _Method(
            lambda *args, **kwargs: getattr(self._target, name)(*args, **kwargs), self._breakage
        )


class LocalReplicas:
    """A deployment handle for what concerns all replicas; there may be others in a moment."""

    def __init__(self, replicas: Callable[[], Sequence[LocalHandle]]) -> None:
        self._replicas = replicas

    def broadcast(self, name: str, *args: Any) -> "LocalBroadcast":
        return LocalBroadcast([getattr(each, name).remote(*args) for each in self._replicas()])


class LocalBroadcast:
    """The answers of all replicas."""

    def __init__(self, answers: Sequence["LocalResponse"]) -> None:
        self._answers: Sequence[Any] = answers

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            every = [asyncio.ensure_future(answer) for answer in self._answers]
            return await asyncio.gather(*every, return_exceptions=return_exceptions)


class _Method:
    def __init__(self, method: Callable[..., Any], breakage: Callable[[Any], Any]) -> None:
        self._method = method
        self._breakage = breakage

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        call = LocalStream(result) if inspect.isasyncgen(result) else LocalResponse(result)
        return self._breakage(call)


class LocalResponse:
    """The answer of a call: awaited, or waited for on a thread without an event loop."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Iterator[Any]:
        return self._coroutine.__await__()

    def result(self, *, timeout_s: float) -> Any:
        return asyncio.run(asyncio.wait_for(self._coroutine, timeout_s))

    def cancel(self) -> None:
        self._coroutine.close()


class LocalStream:
    """The stream of a call; cancelling closes the generator behind it, as Serve does."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> "LocalStream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._generator)

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._generator.aclose())


class LocalVisits:
    """Finds replicas of one remote guide: each visit goes to the next one, and then to the last.

    They are attended on an event loop of their own, since those of tests come and go.
    """

    def __init__(self, *replicas: Any) -> None:
        self._replicas = replicas
        self.num_visits = 0

    def __call__(self, version: GuideVersion, ticket: str) -> Future[Address]:
        replica = self._replicas[min(self.num_visits, len(self._replicas) - 1)]
        self.num_visits += 1
        services = Services(lambda: None, {version.name: LocalHandle(replica)})
        attended = services.attend(version.name, version, ticket)
        return asyncio.run_coroutine_threadsafe(attended, _loop_of_visits())


@cache
def _loop_of_visits() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="visits", daemon=True).start()
    return loop
