"""What replicas send an ingress past Serve: frames, each with the tokens of many requests.

A call's own stream costs Serve a millisecond per item on either side; one frame of all requests
costs less than one such item. A frame is its length in four bytes and an array in MessagePack.
"""

import asyncio
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
    [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MOST_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    content = msgpack.unpackb(await reader.readexactly(length), use_list=False)
    if not isinstance(content, tuple):
        raise ValueError(f"a frame that holds a {type(content).__name__}")
    return content
