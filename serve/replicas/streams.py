"""What is on its way from a decode loop to those who asked: pulled through Serve, or posted."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from pilotfish.decode.sequence import PromptEvent, TokenEvent
from serve import frames
from serve.errors import EngineError
from serve.wire import Batch, guide_name, to_readings, to_token

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0

Pause = Callable[[], float]
"""How long a stream waits, in seconds, from one item to the next."""


class Stream(Protocol):
    """One request's items: events, names of guides that were given up, or what broke it."""

    def put(self, item: Any, *, urgent: bool) -> None:
        """Add an item; an urgent one is the last, or the error that ends the stream."""
        ...

    def batches(self) -> AsyncGenerator[Batch]:
        """Yield what the call itself has to say until the stream has ended; raise what broke it."""
        ...


class Pulled:
    """A stream whose items go through the call that asked for them."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._items: list[Any] = []
        self._some = asyncio.Event()
        self._urgent = asyncio.Event()
        self._next_at = 0.0

    def put(self, item: Any, *, urgent: bool) -> None:
        self._items.append(item)
        self._some.set()
        if urgent:
            self._urgent.set()

    async def batches(self) -> AsyncGenerator[Batch]:
        """Yield the items; those that came in a pause together.

        Tokens in front of an error are given up: they are drawn again, and come out the same.
        """
        ended = False
        while not ended:
            await self._wait()
            items, self._items = self._items, []
            self._some.clear()
            for item in items:
                if isinstance(item, BaseException):
                    raise _own(item)
            batch = _to_batch(items)
            yield batch
            ended = batch.ended or (bool(batch.tokens) and batch.tokens[-1][5] is not None)

    async def _wait(self) -> None:
        await self._some.wait()
        loop = asyncio.get_running_loop()
        if (left_s := self._next_at - loop.time()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), left_s)
        self._next_at = loop.time() + self._pause()


class Posted:
    """A stream whose items go to the ingress on a line; its call says when it ended, and how."""

    def __init__(self, line: "Line", key: int) -> None:
        self._line, self._key = line, key
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fresh = True
        line.streams.add(self)

    def put(self, item: Any, *, urgent: bool) -> None:
        if isinstance(item, BaseException):
            self.fail(item)
            return
        self._line.put(self._key, item, soon=urgent or self._fresh)
        self._fresh = False
        if urgent and not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(_own(error))

    async def batches(self) -> AsyncGenerator[Batch]:
        try:
            await self._ended
        finally:
            self._line.streams.discard(self)
        for nothing in ():
            yield nothing


class Line:
    """A connection to one ingress, on which all streams go that it asked for."""

    def __init__(self, writer: asyncio.StreamWriter, pause: Pause) -> None:
        self._writer, self._pause = writer, pause
        self.streams: set[Posted] = set()
        self._waiting: dict[int, list[Any]] = {}
        """By key: what goes at the next tick."""
        self._soon: dict[int, list[Any]] = {}
        """What goes before anything else happens here."""
        self._is_ticking = False
        self._next_at = 0.0

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closing()

    def put(self, key: int, item: Any, *, soon: bool) -> None:
        """Add an item to the next frame; one that is wanted soon goes with those before it."""
        loop = asyncio.get_running_loop()
        if soon:
            if not self._soon:
                loop.call_soon(self._send_soon)
            self._soon.setdefault(key, []).extend([*self._waiting.pop(key, ()), item])
        else:
            self._waiting.setdefault(key, []).append(item)
            if not self._is_ticking:
                self._is_ticking = True
                loop.call_at(self._next_at, self._tick)

    def close(self) -> None:
        """Break what is under way; it goes on elsewhere."""
        self._writer.close()
        for stream in list(self.streams):
            stream.fail(EngineError("the connection to the ingress is gone"))

    def _send_soon(self) -> None:
        items, self._soon = self._soon, {}
        self._send(items)

    def _tick(self) -> None:
        items, self._waiting = self._waiting, {}
        self._is_ticking = False
        self._next_at = asyncio.get_running_loop().time() + self._pause()
        self._send(items)

    def _send(self, items: Mapping[int, Sequence[Any]]) -> None:
        if items:
            batches = [[key, *_to_batch(own)] for key, own in items.items()]
            self._writer.write(frames.pack(batches))


class Lines:
    """The lines of one decode loop, each opened when an ingress first asks for one."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._opening: dict[tuple[str, int], asyncio.Task[Line | None]] = {}

    async def stream(self, reply_to: frames.ReplyTo | None) -> Stream:
        """Return a stream to an ingress: posted, or pulled where no line leads there."""
        if reply_to is None:
            return Pulled(self._pause)
        line = await self._line(reply_to)
        return Pulled(self._pause) if line is None else Posted(line, reply_to.key)

    async def _line(self, reply_to: frames.ReplyTo) -> Line | None:
        address = reply_to.host, reply_to.port
        opening = self._opening.get(address)
        if opening is not None and opening.done() and (line := opening.result()) and line.is_closed:
            opening = None
        if opening is None:
            opening = asyncio.create_task(self._open(reply_to))
            self._opening[address] = opening
        return await asyncio.shield(opening)

    async def _open(self, reply_to: frames.ReplyTo) -> Line | None:
        """Return a new line; None where the network does not let us, now and later."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_connection(reply_to.host, reply_to.port)
        except (OSError, TimeoutError) as error:
            logger.warning(
                "cannot reach the ingress at %s:%d (%r), so tokens go to it through Serve's own "
                "streams, which cost more. Let replicas reach each other's nodes on all ports.",
                *(reply_to.host, reply_to.port, error),
            )
            return None
        writer.write(frames.pack([reply_to.secret]))
        line = Line(writer, self._pause)
        watch = asyncio.create_task(_close_at_end(line, reader))
        watch.add_done_callback(lambda _: line.close())
        return line


async def _close_at_end(line: Line, reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        await reader.read()  # the ingress says nothing until it goes


def _to_batch(items: Sequence[Any]) -> Batch:
    batch = Batch([], [], [], any(_ends_reading(item) for item in items))
    for item in items:
        if isinstance(item, TokenEvent):
            batch.tokens.append(to_token(item))
        elif isinstance(item, PromptEvent):
            batch.readings.extend(to_readings(item))
        else:
            batch.gave_up.append((guide_name(item), len(batch.tokens)))
    return batch


def _ends_reading(item: Any) -> bool:
    return isinstance(item, PromptEvent) and item.finish_reason is not None


def _own(error: BaseException) -> BaseException:
    """Return an error to raise; one that ends many streams needs a traceback for each."""
    return EngineError(*error.args) if isinstance(error, EngineError) else error
