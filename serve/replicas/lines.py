"""Connections to ingresses, on which tokens go past Serve: see `serve.frames`."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

from serve import frames

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0


class Line:
    """A connection to one ingress, on which all streams go that it asked for.

    Belongs to the event loop, but anybody may send. What the network does not take at once waits
    here: whoever sends goes on.
    """

    def __init__(self, connection: socket.socket) -> None:
        """`connection` does not block."""
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._watch)
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._told: dict[Hashable, Callable[[], None]] = {}
        self.is_closed = False

    def on_close(self, who: Hashable, tell: Callable[[], None]) -> None:
        """Have somebody told when the ingress is gone."""
        self._told[who] = tell

    def forget(self, who: Hashable) -> None:
        self._told.pop(who, None)

    def send(self, frame: bytes) -> None:
        """Send a frame behind those before, or nothing if the ingress is gone."""
        with self._lock:
            if self.is_closed:
                return
            if not self._waiting:
                frame = frame[self._push(frame) :]
                if frame:
                    self._loop.call_soon_threadsafe(self._wait)
            self._waiting += frame

    def close(self) -> None:
        """Hang up; what is under way goes on elsewhere."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self._connection.close()
        for tell in list(self._told.values()):
            tell()

    def _push(self, content: bytes | bytearray) -> int:
        """Return how many bytes the network takes at once; what is wrong shows in reading."""
        with suppress(OSError):
            return self._connection.send(content)
        return 0

    def _wait(self) -> None:
        with self._lock:
            if not self.is_closed:
                self._loop.add_writer(self._connection, self._go_on)

    def _go_on(self) -> None:
        with self._lock:
            del self._waiting[: self._push(self._waiting)]
            if not self._waiting:
                self._loop.remove_writer(self._connection)

    def _watch(self) -> None:
        """The ingress says nothing until it goes."""
        with suppress(BlockingIOError):
            try:
                said = self._connection.recv(4096)
            except ConnectionError:
                said = b""
            if not said:
                self.close()


class Lines:
    """The lines of one decode loop, each opened when an ingress first asks for one."""

    def __init__(self) -> None:
        self._opening: dict[tuple[str, int], asyncio.Task[Line | None]] = {}

    async def to(self, reply_to: frames.ReplyTo) -> Line | None:
        """Return the line to an ingress; None where the network lets none through."""
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
        family = socket.AF_INET6 if ":" in reply_to.host else socket.AF_INET
        connection = socket.socket(family)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                await loop.sock_connect(connection, (reply_to.host, reply_to.port))
        except (OSError, TimeoutError) as error:
            connection.close()
            logger.warning(
                "cannot reach the ingress at %s:%d (%r), so tokens go to it through Serve's own "
                "streams, which cost more. Let replicas reach each other's nodes on all ports.",
                *(reply_to.host, reply_to.port, error),
            )
            return None
        line = Line(connection)
        line.send(frames.pack([reply_to.secret]))
        return line
