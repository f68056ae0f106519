"""The HTTP routes, and the OpenAPI document of them."""

from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Header
from fastapi.responses import Response

import pilotfish
from pilotfish.guides import GUIDES
from serve.api.bodies import StrictRoute
from serve.api.planning import Caller
from serve.api.refusals import add_error_handlers
from serve.api.schema.answers import (
    ChatAnswer,
    DetokenizeAnswer,
    ErrorAnswer,
    ModelCard,
    ModelList,
    ScoreAnswer,
    TextAnswer,
    TokenizeAnswer,
    VersionAnswer,
)
from serve.api.schema.chat import ChatRequest
from serve.api.schema.common import RequestId
from serve.api.schema.reading import DetokenizeRequest, ScoreRequest, TokenizeRequest
from serve.api.schema.text import CompletionRequest
from serve.catalog import Catalog, GuideEntry
from serve.choosing import choose
from serve.errors import APIError
from serve.playground.page import playground_routes


class Answering(Protocol):
    """What the routes need of the pipeline."""

    @property
    def catalog(self) -> Catalog: ...

    async def ready(self) -> bool: ...

    async def answer(self, body: ChatRequest | CompletionRequest, caller: Caller) -> Response: ...

    async def score(self, body: ScoreRequest, caller: Caller) -> Response: ...

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]: ...

    def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]: ...


def build_routes(pipeline: Answering) -> FastAPI:
    """Return the ASGI application of one ingress replica."""
    http = FastAPI(title="Pilotfish", version=pilotfish.__version__, docs_url=None, redoc_url=None)
    http.router.route_class = StrictRoute
    add_error_handlers(http)
    _add_generation(http, pipeline)
    _add_reading(http, pipeline)
    _add_models(http, pipeline)
    _add_health(http, pipeline)
    http.include_router(playground_routes())
    return http


def _read_caller(
    x_request_id: Annotated[RequestId | None, Header()] = None,
    x_session_id: Annotated[RequestId | None, Header()] = None,
) -> Caller:
    return Caller(x_request_id, x_session_id)


_Caller = Annotated[Caller, Depends(_read_caller)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What is wrong with the request."},
    "5XX": {"model": ErrorAnswer, "description": "What is wrong with the server, for now."},
}
_EVENTS: dict[str, Any] = {"text/event-stream": {}}


def _streamed(model: type) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": _EVENTS}, **_ERRORS}


def _add_generation(http: FastAPI, pipeline: Answering) -> None:
    @http.post("/v1/chat/completions", response_model=None, responses=_streamed(ChatAnswer))
    async def chat_completions(body: ChatRequest, caller: _Caller) -> Response:
        return await pipeline.answer(body, caller)

    @http.post("/v1/completions", response_model=None, responses=_streamed(TextAnswer))
    async def completions(body: CompletionRequest, caller: _Caller) -> Response:
        return await pipeline.answer(body, caller)


def _add_reading(http: FastAPI, pipeline: Answering) -> None:
    scored: dict[int | str, dict[str, Any]] = {200: {"model": ScoreAnswer}, **_ERRORS}

    @http.post("/v1/score", response_model=None, responses=scored)
    async def score(body: ScoreRequest, caller: _Caller) -> Response:
        return await pipeline.score(body, caller)

    @http.post("/tokenize", response_model=TokenizeAnswer, responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return pipeline.tokenize(body)

    @http.post("/detokenize", response_model=DetokenizeAnswer, responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return pipeline.detokenize(body)


def _add_models(http: FastAPI, pipeline: Answering) -> None:
    @http.get("/v1/models", response_model=ModelList, responses=_ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": model_cards(pipeline.catalog)}

    @http.get("/v1/models/{model_id:path}", response_model=ModelCard, responses=_ERRORS)
    async def model(model_id: str) -> dict[str, Any]:
        choose(pipeline.catalog, model_id, [], request_id="")
        return next(card for card in model_cards(pipeline.catalog) if card["id"] == model_id)


def _add_health(http: FastAPI, pipeline: Answering) -> None:
    @http.get("/health", response_class=Response, responses=_ERRORS)
    async def health() -> Response:
        """This process is alive; it says nothing of models."""
        return Response()

    @http.get("/ping", response_class=Response, responses=_ERRORS)
    @http.post("/ping", response_class=Response, responses=_ERRORS)
    async def ping() -> Response:
        """The same, for load balancers that ask so."""
        return Response()

    @http.get("/ready", response_class=Response, responses=_ERRORS)
    async def ready() -> Response:
        """Base and guides are loaded and answer."""
        if await pipeline.ready():
            return Response()
        message = "The base, or a guide with replicas of its own, does not answer yet."
        raise APIError(503, message, headers={"Retry-After": "1"})

    @http.get("/version", response_model=VersionAnswer)
    async def version() -> dict[str, str]:
        return {"version": pilotfish.__version__}


def model_cards(catalog: Catalog) -> list[dict[str, Any]]:
    """Return one card for the base, and one per guide whose parent is the base."""

    def card(model_id: str, root: str, guide: GuideEntry | None) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": catalog.created,
            "owned_by": "pilotfish",
            "root": root,
            "parent": None if guide is None else catalog.base.model_id,
            "max_model_len": catalog.base.max_length,
            "permission": [],
            "guide": None if guide is None else _about(guide),
        }

    base_id, *guide_ids = catalog.model_ids()
    cards = [card(base_id, catalog.base.artifact.uri, None)]
    for guide_id, guide in zip(guide_ids, catalog.guides, strict=True):
        cards.append(card(guide_id, guide.current.artifact.uri, guide))
    return cards


def _about(guide: GuideEntry) -> dict[str, Any]:
    version = guide.current
    return {
        "kind": version.kind,
        "stage": version.stage.name.lower(),
        "version": version.version,
        "weight": version.weight,
        "takes_weight": GUIDES[version.kind].takes_weight,
        "enabled": guide.enabled,
    }
