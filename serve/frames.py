"""What replicas send past Serve: tokens of many requests to an ingress, questions to a guide.

A call's own stream costs Serve a millisecond per item on either side; one frame of all requests
costs less than one such item. A frame is its length in four bytes and an array in MessagePack.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgpack

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 64 << 20


class ReplyTo(NamedTuple):
    """Where an ingress waits for the tokens of a request."""

    host: str
    port: int
    secret: str
    """What a connection begins with; it keeps strangers out."""
    key: int
    """Names the request there."""


def pack(value: Sequence[Any]) -> bytes:
    """Return a frame; lists arrive as tuples."""
    content = cast(bytes, msgpack.packb(value))
    return _LENGTH.pack(len(content)) + content


async def read(reader: asyncio.StreamReader) -> tuple[Any, ...]:
    """Return what the next frame holds.

    Raises `asyncio.IncompleteReadError` at the end, and `ValueError` for what is no frame.
    """
    length = _length(await reader.readexactly(_LENGTH.size), _MOST_BYTES)
    return _content(await reader.readexactly(length))


def receive(connection: socket.socket, most_bytes: float) -> tuple[Any, ...]:
    """Wait for the next frame and return what it holds.

    Raises `EOFError` at the end, and `ValueError` for what is no frame, or a longer one.
    """
    length = _length(receive_exactly(connection, _LENGTH.size), most_bytes)
    return _content(receive_exactly(connection, length))


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    """Wait for so many bytes. Raises `EOFError` if there are fewer."""
    content = bytearray(num_bytes)
    left = memoryview(content)
    while left:
        got = connection.recv_into(left)
        if not got:
            raise EOFError
        left = left[got:]
    return content


def _length(header: bytes | bytearray, most_bytes: float) -> int:
    [length] = _LENGTH.unpack(header)
    if length > most_bytes:
        raise ValueError(f"a frame of {length} bytes")
    return length


def _content(packed: bytes | bytearray) -> tuple[Any, ...]:
    content = msgpack.unpackb(packed, use_list=False)
    if not isinstance(content, tuple):
        raise ValueError(f"a frame that holds a {type(content).__name__}")
    return content
