"""What is on its way from a decode loop to those who asked: pulled through Serve, or posted."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any, Protocol

from pilotfish.decode.sequence import PromptEvent, TokenEvent
from serve import frames
from serve.errors import EngineError
from serve.wire import Batch, guide_name, to_readings, to_token

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0


class Stream(Protocol):
    """One request's items: events, and names of guides that were given up."""

    def put(self, items: Sequence[Any]) -> None:
        """Add what comes next; nothing comes behind an event with a finish reason."""
        ...

    def fail(self, error: BaseException) -> None:
        """End the stream by an error, unless it has ended."""
        ...

    def batches(self) -> AsyncGenerator[Batch]:
        """Yield what the call itself has to say until the stream has ended; raise what broke it."""
        ...


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

    def __init__(self, line: "Line", key: int) -> None:
        self._line, self._key = line, key
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.streams.add(self)

    def put(self, items: Sequence[Any]) -> None:
        self._line.put(self._key, items)
        if _is_over(items) and not self._ended.done():
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

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.streams: set[Posted] = set()
        self._waiting: dict[int, list[Any]] = {}
        """By key: what goes before anything else happens here."""

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closing()

    def put(self, key: int, items: Sequence[Any]) -> None:
        """Add items to the next frame."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.setdefault(key, []).extend(items)

    def close(self) -> None:
        """Break what is under way; it goes on elsewhere."""
        self._writer.close()
        for stream in list(self.streams):
            stream.fail(EngineError("the connection to the ingress is gone"))

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        batches = [[key, *_to_batch(items)] for key, items in waiting.items()]
        self._writer.write(frames.pack(batches))


class Lines:
    """The lines of one decode loop, each opened when an ingress first asks for one."""

    def __init__(self) -> None:
        self._opening: dict[tuple[str, int], asyncio.Task[Line | None]] = {}

    async def stream(self, reply_to: frames.ReplyTo | None) -> Stream:
        """Return a stream to an ingress: posted, or pulled where no line leads there."""
        if reply_to is None:
            return Pulled()
        line = await self._line(reply_to)
        return Pulled() if line is None else Posted(line, reply_to.key)

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
        line = Line(writer)
        watch = asyncio.create_task(_close_at_end(line, reader))
        watch.add_done_callback(lambda _: line.close())
        return line


async def _close_at_end(line: Line, reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        await reader.read()  # the ingress says nothing until it goes


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
