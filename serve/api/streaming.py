"""Server-sent events as an HTTP response."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

_SILENCE_S = 10.0
"""Proxies take a connection that says nothing for longer than some such time for dead."""
_COMMENT = b": working\n\n"


class EventStream(StreamingResponse):
    """Events that give back what the request holds, even if nobody ever reads them."""

    def __init__(
        self, events: AsyncIterator[str], held: AsyncExitStack, headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send the events, and a comment where nothing came for a while."""
        clock = asyncio.get_running_loop().time
        last = clock()

        async def send_and_note(message: Message) -> None:
            nonlocal last
            last = clock()
            await send(message)

        async def break_silence() -> None:
            while True:
                await asyncio.sleep(max(0.0, last + _SILENCE_S - clock()))
                if clock() - last >= _SILENCE_S:
                    await send_and_note(
                        {"type": "http.response.body", "body": _COMMENT, "more_body": True}
                    )

        talking = asyncio.create_task(break_silence())
        try:
            await super().stream_response(send_and_note)
        finally:
            talking.cancel()
