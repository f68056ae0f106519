"""A process apart for what decodes: Serve's event loop would take the interpreter lock from it.

    python -m serve.replicas.apart FD TITLE

is how `Apart` starts it. It ends with the process that started it, and that one with it.
"""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from serve.errors import EngineError
from serve.replicas.peer import Peer, pack, receive

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_LEAVE_AFTER_S = 0.2
_PR_SET_PDEATHSIG = 1


def leave() -> None:
    """End this process. Serve's router drops a dead replica at once, and an unhealthy one only
    after some health checks, through which it would look idle and draw every request."""
    os._exit(1)


class Apart:
    """An object in a process of its own, whose coroutines and async generators are called here."""

    def __init__(
        self,
        title: str,
        make: Callable[..., Any],
        *args: Any,
        services: Any = None,
        leave: Callable[[], None] = leave,
    ) -> None:
        """Make the object there, by `make(peer, *args)`. Raises what that raises.

        `services` are what it may call here. `leave` is called soon after the process died.
        """
        self._peer = Peer(services)
        self._leave = leave
        self._running: asyncio.Task[None] | None = None
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = _start([str(theirs.fileno()), title], pass_fds=[theirs.fileno()])
        try:
            self._connection.sendall(pack((make, args)))
            error = receive(self._connection)
        except (EOFError, OSError):
            error = EngineError(f"the process of {title} ended while it was loading")
        if error is not None:
            self.close()
            raise error

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, method: str, *args: Any) -> Any:
        """Return what a coroutine there returns. Raises what it raises, or `EngineError`."""
        self._ensure()
        return await self._peer.call(method, *args)

    def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """Yield what an async generator there yields; closing this closes that."""
        self._ensure()
        return self._peer.stream(method, *args)

    def close(self) -> None:
        """End the process."""
        self._leave = _stay
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _ensure(self) -> None:
        """Begin to exchange, once there is an event loop."""
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        await self._peer.run(self._connection)
        logger.error("process %d, which decodes, is gone", self.pid)
        # Those it decoded for hear of it first.
        await asyncio.sleep(_LEAVE_AFTER_S)
        self._leave()


def _stay() -> None:
    pass


def _start(arguments: Sequence[str], *, pass_fds: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Start this module as a program, from a thread that lives as long: see `_die_with_starter`."""
    path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
    started: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=pass_fds,
            )
        except OSError as error:
            started.set_exception(error)
        else:
            started.set_result(process)
            process.wait()

    threading.Thread(target=keep, name="keeper", daemon=True).start()
    return started.result()


def _die_with_starter() -> None:
    """End when the thread ends that started this process, even if this one hangs by then: it may
    hold a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: list[str]) -> None:
    """Serve one `Apart`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _die_with_starter()
    connection = socket.socket(fileno=int(argv[0]))
    peer = Peer()
    try:
        make, args = receive(connection)
        peer.target = make(peer, *args)
    except EOFError:
        return
    except Exception as error:
        connection.sendall(pack(error))
        raise
    connection.sendall(pack(None))
    asyncio.run(peer.run(connection))
    os._exit(0)  # whatever is being decoded has nobody left to be decoded for


if __name__ == "__main__":
    main(sys.argv[1:])
