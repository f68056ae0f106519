"""The HTTP routes, and errors in OpenAI's shape whoever raises them."""

from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import pilotfish
from serve.api.schema import ChatRequest, CompletionRequest
from serve.catalog import Catalog
from serve.choosing import choose
from serve.errors import APIError


class Answering(Protocol):
    """What the routes need of the pipeline."""

    catalog: Catalog

    async def ready(self) -> bool: ...

    async def answer(self, body: ChatRequest | CompletionRequest) -> Response: ...


def build_routes(pipeline: Answering) -> FastAPI:
    """Return the ASGI application of one ingress replica."""
    http = FastAPI(title="Pilotfish", version=pilotfish.__version__, docs_url=None, redoc_url=None)
    http.add_exception_handler(APIError, _send_api_error)
    http.add_exception_handler(RequestValidationError, _send_invalid)
    http.add_exception_handler(HTTPException, _send_http_error)
    http.add_exception_handler(Exception, _send_internal)

    @http.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest) -> Response:
        return await pipeline.answer(body)

    @http.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest) -> Response:
        return await pipeline.answer(body)

    @http.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": model_cards(pipeline.catalog)}

    @http.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        choose(pipeline.catalog, model_id, None, request_id="")
        return next(card for card in model_cards(pipeline.catalog) if card["id"] == model_id)

    @http.get("/health", response_model=None)
    async def health() -> Response:
        """This process is alive; it says nothing of models."""
        return Response()

    @http.get("/ready", response_model=None)
    async def ready() -> Response:
        """Base and guides are loaded and answer."""
        if await pipeline.ready():
            return Response()
        raise APIError(503, "No base replica answers yet.", headers={"Retry-After": "1"})

    return http


def model_cards(catalog: Catalog) -> list[dict[str, Any]]:
    """Return one card for the base, and one per guide whose parent is the base."""

    def card(model_id: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": catalog.created,
            "owned_by": "pilotfish",
            "root": root,
            "parent": parent,
            "max_model_len": catalog.base.max_length,
            "permission": [],
        }

    base_id, *guide_ids = catalog.model_ids()
    cards = [card(base_id, catalog.base.artifact.uri, None)]
    for guide_id, guide in zip(guide_ids, catalog.guides, strict=True):
        cards.append(card(guide_id, guide.current.artifact.uri, base_id))
    return cards


async def _send_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _send_invalid(request: Request, error: Exception) -> Response:
    """Name the field of the first thing wrong with a body."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part != "body"]
    context = found.get("ctx", {})
    if found["type"] == "json_invalid":
        return await _send_api_error(
            request, APIError(400, f"The body is not JSON: {context['error']}.")
        )
    param = context.get("param") or (where[0] if where else None)
    message = found["msg"]
    if found["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {'.'.join(where)}"
    elif where:
        message = f"{'.'.join(where)}: {message}"
    return await _send_api_error(request, APIError(400, message, param=param))


async def _send_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    answer = APIError(error.status_code, message, headers=error.headers)
    return await _send_api_error(request, answer)


async def _send_internal(request: Request, _: Exception) -> Response:
    """Starlette logs the error itself; the client learns nothing of our insides."""
    answer = APIError(500, "The server failed to answer this request.", code="internal")
    return await _send_api_error(request, answer)
