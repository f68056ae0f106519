"""A base replica's connection to a replica of a remote guide, past Serve.

A call through Serve costs a millisecond of a core on either side, in every step. Here a step costs
one message each way. The caller sends, in a frame, what it asks and which sequences it has done
with; the answer is log-probs [R, V] as they lie in memory, or what went wrong.
"""

import select
import socket
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve import frames

ANSWER = struct.Struct("<cQ")
"""What an answer begins with: its kind, and the bytes that follow."""
DTYPES = {b"h": np.dtype(np.float16), b"f": np.dtype(np.float32), b"d": np.dtype(np.float64)}
"""By kind of answer."""
FAILED = b"!"
"""The kind of an answer that says what went wrong."""

Address: TypeAlias = tuple[str, int]


class Question(NamedTuple):
    """What is asked about one sequence."""

    key: int
    """Names the sequence, among those of the caller."""
    kept: int
    """So many of its tokens were sent before and still stand."""
    new_ids: list[int]
    """The tokens behind them."""
    lengths: list[int]
    """Behind so many tokens each the next one's law is wanted."""


class Reply:
    """An answer that is awaited."""

    def __init__(self) -> None:
        self.logprobs: NDArray[np.floating] | None = None
        """All its rows, one behind the other."""
        self.error: str | None = None

    @property
    def is_there(self) -> bool:
        return self.logprobs is not None or self.error is not None


class Line:
    """A connection on which answers come in the order of the questions.

    Whatever breaks it raises `OSError`. Belongs to one thread.
    """

    def __init__(self, address: Address, ticket: str, *, caller: int, timeout_s: float) -> None:
        """Connect. `caller` names the caller for longer than a connection lasts."""
        self._socket = socket.create_connection(address, timeout_s)
        weakref.finalize(self, self._socket.close)  # a guide that is dropped hangs up
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(frames.pack([ticket, caller]))
        self._replies: deque[Reply] = deque()
        self._kind: bytes | None = None
        self._expect(None, ANSWER.size)

    @property
    def is_cut(self) -> bool:
        """Whether the other end has closed it while nothing was asked."""
        return self.is_idle and bool(readable([self], 0))

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    @property
    def is_idle(self) -> bool:
        return not self._replies

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, questions: Sequence[Question], released: Sequence[int]) -> Reply:
        """Send a call. `released` are keys of sequences that were asked about before."""
        self._socket.sendall(frames.pack([questions, released]))
        self._replies.append(Reply())
        return self._replies[-1]

    def feed(self) -> None:
        """Take what has arrived, of which there must be something."""
        num_bytes = self._socket.recv_into(self._left)
        if not num_bytes:
            raise ConnectionError("the guide's replica closed the connection")
        self._left = self._left[num_bytes:]
        if self._left:
            return
        if self._kind is None:
            self._expect(*ANSWER.unpack(self._buffer))
            return
        reply = self._replies.popleft()
        if self._kind == FAILED:
            reply.error = self._buffer.decode()
        else:
            reply.logprobs = np.frombuffer(self._buffer, DTYPES[self._kind])
        self._expect(None, ANSWER.size)

    def close(self) -> None:
        self._socket.close()

    def _expect(self, kind: bytes | None, num_bytes: int) -> None:
        self._kind = kind
        self._buffer = bytearray(num_bytes)
        self._left = memoryview(self._buffer)


def readable(lines: Sequence[Line], timeout_s: float) -> list[Line]:
    """Wait until something has arrived on some of the lines, and return those."""
    poll, by_number = select.poll(), {line.fileno(): line for line in lines}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(max(0.0, 1e3 * timeout_s))]
