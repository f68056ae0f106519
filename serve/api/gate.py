"""The gate in front of all routes: who may pass, with how large a body, and what came of it."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import visit as visits
from serve.api.keys import Doorman
from serve.api.refusals import error_response
from serve.api.visit import Visit
from serve.errors import APIError
from serve.ingress_config import LimitsConfig

_CLIENT_LEFT = 499
_PAGE = "/playground/"
_OPEN = ("/health", "/ready", "/version", "/ping", "/playground")
"""They say nothing of models, or are the page that asks its user for a key."""


class Gate:
    """ASGI middleware; one per ingress replica."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        doorman: Doorman,
        limits: LimitsConfig,
        over: Callable[[Visit], None],
        keep_bodies: bool = False,
        also_open: Collection[str] = (),
    ) -> None:
        """`over` is called with every visit once it is; it has the body if those are kept.

        `also_open` are paths that need no key, besides those that never do.
        """
        self._app = app
        self._doorman, self._limits, self._over = doorman, limits, over
        self._keep_bodies = keep_bodies
        self._open = {*_OPEN, *also_open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        visit = Visit(
            method=scope["method"],
            path=scope["path"].removeprefix(scope.get("root_path", "")),
            request_id=_text(headers, b"x-request-id"),
            session_id=_text(headers, b"x-session-id"),
        )

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                # Serve's proxy adds its own, which is the same, and never looks for one.
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        token = visits.enter(visit)
        try:
            await self._pass(visit, scope, receive, send_and_note)
        except Exception:
            visit.status = visit.status or 500
            raise
        except asyncio.CancelledError:
            visit.status = visit.status or _CLIENT_LEFT
            raise
        finally:
            visits.leave(token)
            visit.ended = time.monotonic()
            self._over(visit)

    async def _pass(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            if not (visit.path in self._open or visit.path.startswith(_PAGE)):
                peer = scope.get("client")
                authorization = headers.get(b"authorization", b"")
                visit.client = self._doorman.client(authorization, peer and peer[0])
            if visit.method == "POST":
                body = await self._read(headers, receive)
                if body is None:
                    visit.status = _CLIENT_LEFT
                    return
                visit.body = body if self._keep_bodies else b""
                receive = _replay(body, receive)
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the whole body, None if the client left before its end. Raises `APIError`."""
        if int(headers.get(b"content-length", b"0")) > self._limits.body_bytes:
            raise self._too_large()
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self._limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            waited = f"{self._limits.body_timeout_s:g} s"
            raise APIError(408, f"The body did not arrive within {waited}.") from None

    def _too_large(self) -> APIError:
        limit = self._limits.body_bytes
        return APIError(413, f"The body is larger than {limit} bytes.", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body at once, and then what really comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")[:128]
