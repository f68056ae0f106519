"""Where an ingress replica receives tokens past Serve."""

import asyncio
import hmac
import itertools
import logging
import secrets
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from serve import frames
from serve.api.journal import TokenStream
from serve.wire import GenerateRequest

logger = logging.getLogger(__name__)


class Inbox:
    """Listens for replicas, and hands what they send to the requests it is for.

    A call goes through Serve as ever: that is how a replica is found, told to stop, and known to
    have failed. Its tokens come here. Where this machine cannot listen, or a replica cannot
    connect, they come with the call.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_hex(16)
        self._keys = itertools.count()
        self._received: weakref.WeakValueDictionary[int, _Received] = weakref.WeakValueDictionary()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = False

    async def ensure(self) -> None:
        """Listen, from the first call on."""
        if self._is_open:
            return
        self._is_open = True
        try:
            self._server = await asyncio.start_server(self._take, self._host, 0)
        except OSError as error:
            logger.warning("cannot listen on %s (%r): tokens go through Serve", self._host, error)

    def call(
        self, request: GenerateRequest, send: Callable[[GenerateRequest], TokenStream]
    ) -> TokenStream:
        """Send a request and return the stream of its tokens, whichever way they come."""
        if self._server is None:
            return send(request)
        key, port = next(self._keys), self._server.sockets[0].getsockname()[1]
        request["reply_to"] = frames.ReplyTo(self._host, port, self._secret, key)
        received = self._received[key] = _Received(send(request))
        return received

    def close(self) -> None:
        """Stop listening, and cut the connections that there are."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(asyncio.IncompleteReadError, OSError):
            try:
                [secret] = await frames.read(reader)
                if not hmac.compare_digest(str(secret).encode(), self._secret.encode()):
                    raise ValueError("a stranger")
                while True:
                    for key, *batch in await frames.read(reader):
                        if (received := self._received.get(key)) is not None:
                            received.deliver(tuple(batch))
            except (ValueError, TypeError) as error:
                logger.warning("a connection is refused that sent %s", error)
        self._writers.discard(writer)
        writer.close()


class _Received:
    """A call's tokens as they come in, and its end."""

    def __init__(self, call: TokenStream) -> None:
        self._call = call
        self._batches: deque[tuple[Any, ...]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._through_call = False
        self._next: asyncio.Future[tuple[Any, ...]] | None = None
        self._listen()

    def deliver(self, batch: tuple[Any, ...]) -> None:
        self._batches.append(batch)
        self._wake()

    async def __anext__(self) -> tuple[Any, ...]:
        while not self._batches:
            if self._next is not None and self._next.done():
                self._take_from_call(self._next)
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._batches.popleft()

    def cancel(self) -> None:
        self._call.cancel()

    def _listen(self) -> None:
        self._next = asyncio.ensure_future(self._call.__anext__())
        self._next.add_done_callback(self._over)

    def _take_from_call(self, said: "asyncio.Future[tuple[Any, ...]]") -> None:
        """Take what the call itself said; raises what it failed with."""
        try:
            self._batches.append(said.result())
        except StopAsyncIteration:
            if self._through_call:
                raise
            self._next = None  # the last frame may still be on its way
        else:
            self._through_call = True
            self._listen()

    def _over(self, said: "asyncio.Future[tuple[Any, ...]]") -> None:
        if not said.cancelled():
            said.exception()  # seen: nobody may be waiting for it any more
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
