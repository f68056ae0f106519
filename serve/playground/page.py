"""The playground: a static page that the ingress serves beside the API it talks to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page needs nothing from anywhere else, and no other page may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    media_type: str
    etag: str


def playground_routes() -> APIRouter:
    """Return the routes of the page: /playground, and /playground/NAME for what it loads.

    Its files name each other and the API by relative addresses, so it works under any prefix. They
    are read once, here. No key is needed to load them: the page asks its user for one.
    """
    router = APIRouter(include_in_schema=False)
    assets = _read_assets()

    @router.get("/playground")
    async def page(request: Request) -> Response:
        return _send(request, assets["index.html"])

    @router.get("/playground/{name}")
    async def asset(request: Request, name: str) -> Response:
        if name not in assets:
            raise HTTPException(404, "Not Found")
        return _send(request, assets[name])

    return router


def _read_assets() -> dict[str, _Asset]:
    return {
        path.name: _Asset(
            content := path.read_bytes(),
            _MEDIA_TYPES[path.suffix],
            f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        )
        for path in _FOLDER.iterdir()
        if path.suffix in _MEDIA_TYPES
    }


def _send(request: Request, asset: _Asset) -> Response:
    headers = {
        "ETag": asset.etag,
        "Cache-Control": "no-cache",  # kept, but asked about each time
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)
