"""What is on its way from a decode loop to those who asked: pulled through Serve, or posted."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, TypeAlias

from pilotfish.decode.sequence import PromptEvent, TokenEvent
from serve import frames
from serve.errors import EngineError
from serve.replicas.lines import Line
from serve.wire import Batch, guide_name, to_readings, to_token


class Pulled:
    """A stream whose items go through the call that asked for them."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._error: BaseException | None = None
        self._some = asyncio.Event()

    def put(self, items: Sequence[Any]) -> None:
        self._items += items
        self._some.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._some.set()

    async def batches(self) -> AsyncGenerator[Batch]:
        """Yield the items.

        Tokens in front of an error are given up: they are drawn again, and come out the same.
        """
        ended = False
        while not ended:
            await self._some.wait()
            self._some.clear()
            if self._error is not None:
                raise _own(self._error)
            items, self._items = self._items, []
            ended = _is_over(items)
            yield _to_batch(items)


class Posted:
    """A stream whose items go to the ingress on a line; its call says when it ended, and how."""

    def __init__(self, line: Line, key: int) -> None:
        self.line, self.key = line, key
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.on_close(self, self._break)

    def end(self) -> None:
        """Note that everything is on its way."""
        if not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(_own(error))

    async def batches(self) -> AsyncGenerator[Batch]:
        """Yield nothing until the stream has ended; raise what broke it."""
        try:
            await self._ended
        finally:
            self.line.forget(self)
        for nothing in ():
            yield nothing

    def _break(self) -> None:
        self.fail(EngineError("the connection to the ingress is gone"))


Stream: TypeAlias = Pulled | Posted
"""One request's items: events, and names of guides that were given up; nothing comes behind an
event with a finish reason. Belongs to the event loop; only `hand_out` may be called elsewhere."""


def hand_out(
    items: Iterable[tuple[Stream, Sequence[Any]]], loop: asyncio.AbstractEventLoop
) -> None:
    """Put items on their streams, from any thread.

    What goes on a line goes at once, in one frame for all its streams: the event loop would have to
    take the interpreter lock from the next step.
    """
    pulled: list[tuple[Pulled, Sequence[Any]]] = []
    ended: list[Posted] = []
    frame_by_line: dict[Line, list[Sequence[Any]]] = {}
    for stream, own in items:
        if isinstance(stream, Pulled):
            pulled.append((stream, own))
            continue
        frame_by_line.setdefault(stream.line, []).append([stream.key, *_to_batch(own)])
        if _is_over(own):
            ended.append(stream)
    for line, batches in frame_by_line.items():
        line.send(frames.pack(batches))
    if pulled or ended:
        loop.call_soon_threadsafe(_note, pulled, ended)


def _note(pulled: Sequence[tuple[Pulled, Sequence[Any]]], ended: Sequence[Posted]) -> None:
    for stream, items in pulled:
        stream.put(items)
    for stream in ended:
        stream.end()


def _to_batch(items: Sequence[Any]) -> Batch:
    batch = Batch([], [], [], isinstance(items[-1], PromptEvent) and _is_over(items))
    for item in items:
        if isinstance(item, TokenEvent):
            batch.tokens.append(to_token(item))
        elif isinstance(item, PromptEvent):
            batch.readings.extend(to_readings(item))
        else:
            batch.gave_up.append((guide_name(item), len(batch.tokens)))
    return batch


def _is_over(items: Sequence[Any]) -> bool:
    """Whether nothing comes behind these."""
    return getattr(items[-1], "finish_reason", None) is not None


def _own(error: BaseException) -> BaseException:
    """Return an error to raise; one that ends many streams needs a traceback for each."""
    return EngineError(*error.args) if isinstance(error, EngineError) else error
