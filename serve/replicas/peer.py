"""Two processes of one program that call each other over a socket.

Values are pickled: nobody else holds an end of the socket.
"""

import asyncio
import functools
import inspect
import itertools
import os
import pickle
import socket
import struct
import traceback
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from types import SimpleNamespace
from typing import Any

from pilotfish.errors import PilotfishError
from serve.errors import EngineError
from serve.frames import receive_exactly

_LENGTH = struct.Struct("<Q")
_CALL, _CANCEL, _ITEM, _DONE, _ERROR = range(5)


class Peer:
    """One end. Either may call the methods of what the other has for a target: coroutines, and
    async generators. Belongs to the event loop that `run` is awaited on."""

    def __init__(self, target: Any = None) -> None:
        self.target = target
        self._keys = itertools.count()
        self._calls: dict[int, asyncio.Queue[tuple[int, Any]]] = {}
        """What came for calls that were made here, by key."""
        self._answering: dict[int, asyncio.Task[None]] = {}
        """Calls of the other end, by its keys."""
        self._writer: asyncio.StreamWriter | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = asyncio.Event()
        self._is_gone = False

    async def run(self, connection: socket.socket) -> None:
        """Answer, and take answers, until the other end is gone; then calls raise `EngineError`."""
        self._loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._begun.set()
        try:
            while True:
                [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                self._take(*pickle.loads(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._is_gone = True
            for came in self._calls.values():
                came.put_nowait((_ERROR, _gone()))
            for task in self._answering.values():
                task.cancel()
            self._writer.close()

    async def call(self, method: str, *args: Any) -> Any:
        """Return what a coroutine of the target returns. Raises what it raises."""
        await self._begun.wait()
        with self._called(method, args) as came:
            return _value(await came.get())

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """Yield what an async generator of the target yields; closing this closes that."""
        await self._begun.wait()
        with self._called(method, args) as came:
            while (item := await came.get())[0] == _ITEM:
                yield item[1]
            _value(item)

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """Begin a `call` from another thread than that of the event loop."""
        if self._loop is None:
            raise EngineError("nothing can be called before `run`")
        return asyncio.run_coroutine_threadsafe(self.call(method, *args), self._loop)

    @contextmanager
    def _called(self, method: str, args: Any) -> Iterator["asyncio.Queue[tuple[int, Any]]"]:
        if self._is_gone:
            raise _gone()
        assert self._writer is not None, "begun"
        key = next(self._keys)
        came = self._calls[key] = asyncio.Queue()
        self._writer.write(pack((_CALL, key, method, args)))
        is_over = False
        try:
            yield came
            is_over = True
        except BaseException as error:
            is_over = not isinstance(error, asyncio.CancelledError | GeneratorExit)
            raise
        finally:
            del self._calls[key]
            if not (is_over or self._is_gone):
                self._writer.write(pack((_CANCEL, key)))

    def _take(self, kind: int, key: int, *content: Any) -> None:
        if kind == _CALL:
            task = self._answering[key] = asyncio.ensure_future(self._answer(key, *content))
            # Not by itself: one that is cancelled at once never runs.
            task.add_done_callback(lambda _: self._answering.pop(key, None))
        elif kind == _CANCEL:
            if (task := self._answering.get(key)) is not None:
                task.cancel()
        elif (came := self._calls.get(key)) is not None:
            came.put_nowait((kind, content[0]))

    async def _answer(self, key: int, method: str, args: Any) -> None:
        try:
            result = getattr(self.target, method)(*args)
            if inspect.isasyncgen(result):
                async with aclosing(result):
                    async for item in result:
                        self._send(_ITEM, key, item)
                result = None
            else:
                result = await result
            self._send(_DONE, key, result)
        except Exception as error:
            self._send(_ERROR, key, _portable(error))

    def _send(self, kind: int, key: int, value: Any) -> None:
        assert self._writer is not None, "there is nothing to answer before `run`"
        self._writer.write(pack((kind, key, value)))


class PeerHandle:
    """A peer's target as it is called through Serve: `handle.method.remote(...)`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=functools.partial(self._peer.call, method))


def pack(value: Any) -> bytes:
    """Return a frame: its length in eight bytes, and a pickle."""
    content = pickle.dumps(value)
    return _LENGTH.pack(len(content)) + content


def receive(connection: socket.socket) -> Any:
    """Wait for a frame and return what it holds. Raises `EOFError` at the end."""
    [length] = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size))
    return pickle.loads(receive_exactly(connection, length))


def _value(item: tuple[int, Any]) -> Any:
    kind, value = item
    if kind == _ERROR:
        raise value
    return value


def _portable(error: Exception) -> Exception:
    """Return an error that can be made again elsewhere, and says where it comes from."""
    if not isinstance(error, PilotfishError):
        error.add_note(f"In process {os.getpid()}: {''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(repr(error))
    return error


def _gone() -> EngineError:
    return EngineError("the process that decodes is gone, or the one that it decodes for")
