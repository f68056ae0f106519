"""Where a replica of a remote guide is asked, past Serve: see `serve.replicas.guide_line`."""

import asyncio
import logging
import math
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve import frames
from serve.replicas.guide_line import ANSWER, DTYPES, FAILED, Address, Question
from serve.replicas.priority import go_first

logger = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[int, Sequence[Question], Sequence[int]], NDArray[np.floating]]
"""Takes the caller, its questions, and the keys that it has done with."""

_ARRIVE_S = 10.0
_INTRODUCE_S = 2.0
_IDLE_S = 60.0
"""A caller that is silent for longer is no load, and comes back with another ticket."""
_TAKE_S = 60.0
"""A caller takes its answer when its own forward is over."""
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_NUM_WAITING = 64
_MOST_BYTES_OF_A_STRANGER = 256


class Visit:
    """One caller, from its ticket to its end."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connection: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._timer = self._loop.call_later(_ARRIVE_S, self._give_up)

    async def over(self) -> None:
        """Wait until the caller has gone, or has not come."""
        await self._over.wait()

    def leave(self) -> None:
        """Note, on any thread, that the caller has gone."""
        with suppress(RuntimeError):  # the loop may have ended before
            self._loop.call_soon_threadsafe(self._over.set)

    def close(self) -> None:
        """Hang up."""
        self._timer.cancel()
        if self.connection is not None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _give_up(self) -> None:
        if self.connection is None:
            self._over.set()


class Desk:
    """Answers callers that have a ticket, each on a thread of its own."""

    def __init__(self, host: str) -> None:
        """Listen on an address of this machine that base replicas reach."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=_NUM_WAITING)
        self.address: Address = self._server.getsockname()[:2]
        self._expected: dict[str, Visit] = {}
        self.visits: set[Visit] = set()
        """Those who are here."""
        threading.Thread(target=self._run, name="desk", daemon=True).start()

    def expect(self, ticket: str, answer: Answer) -> Visit:
        """Let in whoever brings the ticket, once, and answer it."""
        visit = self._expected[ticket] = Visit(answer)
        return visit

    def forget(self, ticket: str) -> None:
        """Let nobody in with the ticket any more."""
        self._expected.pop(ticket, None)

    def close(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        self._server.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            target = self._receive
            threading.Thread(target=target, args=(connection,), name="guide", daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        visit = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(_INTRODUCE_S)
            ticket, caller = frames.receive(connection, _MOST_BYTES_OF_A_STRANGER)
            visit = self._expected.pop(ticket, None)
            if visit is None:
                raise ValueError("no ticket")
            visit.connection = connection
            self.visits.add(visit)
            go_first()
            while True:
                connection.settimeout(_IDLE_S)
                questions, released = frames.receive(connection, math.inf)
                connection.settimeout(_TAKE_S)
                asked = [Question(*values) for values in questions]
                _send(connection, visit.answer, caller, asked, released)
        except (EOFError, OSError):
            pass  # it is gone, or has nothing to ask
        except (ValueError, TypeError) as error:
            logger.warning("a connection is refused that sent %s", error)
        finally:
            connection.close()
            if visit is not None:
                self.visits.discard(visit)
                visit.leave()


def _send(connection: socket.socket, answer: Answer, *asked: Any) -> None:
    try:
        logprobs_RV = np.ascontiguousarray(answer(*asked))
    except Exception as error:
        logger.exception("cannot answer")
        content = repr(error).encode()
        connection.sendall(ANSWER.pack(FAILED, len(content)) + content)
        return
    connection.sendall(ANSWER.pack(_KINDS[logprobs_RV.dtype], logprobs_RV.nbytes))
    connection.sendall(logprobs_RV.view(np.uint8).data)
