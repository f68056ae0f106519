"""`Pipeline`: the OpenAI-compatible ingress in front of base and guides."""

import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from pilotfish.models.loading import load_tokenizer
from serve.api import tokenizing, whole_answers
from serve.api.admission import Admission
from serve.api.answering import Answer
from serve.api.calls import Calls
from serve.api.choices import Choice
from serve.api.details import Details, Vocabulary
from serve.api.inbox import Inbox
from serve.api.journal import Patience
from serve.api.operations import operate
from serve.api.planning import Caller, Plan, Planner
from serve.api.routes import build_routes
from serve.api.schema.chat import ChatRequest
from serve.api.schema.reading import DetokenizeRequest, ScoreRequest, TokenizeRequest
from serve.api.schema.text import CompletionRequest
from serve.api.scoring import Scoring
from serve.api.shadows import Shadows
from serve.api.streaming import EventStream
from serve.api.token_text import TokenTexts
from serve.api.visit import current_visit
from serve.catalog import Catalog
from serve.choosing import choose
from serve.errors import APIError, api_error
from serve.ingress_config import IngressConfig
from serve.metrics import RequestMetrics
from serve.replicas.control import own_host
from serve.replicas.following import Stock
from serve.replicas.reporting import Reporting
from serve.replicas.shelf import Shelf

logger = logging.getLogger(__name__)


class Pipeline:
    """Turns bodies into journals, and journals into answers. Holds no weights of a model."""

    def __init__(
        self,
        config: IngressConfig,
        catalog: Catalog,
        base: Any,
        guides: Mapping[str, Any],
        control: Any,
    ) -> None:
        """Handles: of `BaseModel`, of guides with replicas of their own by name, of `Guides`.

        Without a handle of `Guides` there are no other versions than those of `catalog`.
        """
        shelf = Shelf(whole_answers.load, lambda _version, _guide: None)
        follow = None if control is None else lambda: control
        self._stock = Stock(shelf, catalog, whole_answers.versions, follow, self._adopted)
        self._tokenizer = load_tokenizer(catalog.base.artifact.fetch())
        self._texts = TokenTexts(self._tokenizer)
        self._planner = Planner(config, self._tokenizer, shelf)
        patience = Patience(
            first_token_s=config.first_token_deadline_s,
            token_s=config.token_deadline_s,
            max_attempts=config.max_attempts,
        )
        self._calls = Calls(base, guides, patience)
        self._config, self._control = config, control
        self.admission = Admission(config)
        self._metrics = RequestMetrics(catalog.base.model_id)
        self._shadows = Shadows(config.max_shadows, self._calls, self._tokenizer, self._metrics)
        self._reporting = Reporting(self._show)

    @property
    def catalog(self) -> Catalog:
        """What is served at this moment."""
        return self._stock.catalog

    async def check_health(self) -> None:
        """Never fails; Serve's calls begin to follow the catalog, and to receive tokens."""
        await self._stock.ensure()
        if self._calls.inbox is not None:
            await self._calls.inbox.ensure()
        self._reporting.ensure()

    def _adopted(self, catalog: Catalog) -> None:
        logger.info("serving revision %d of the guides", catalog.revision)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the HTTP side of a replica. Raises `ConfigError`."""
        self._calls.inbox = Inbox(own_host())
        return operate(build_routes(self), self._config, self._control, self._metrics)

    async def ready(self) -> bool:
        """Whether base and guides answer, all of them loaded."""
        return await self._calls.ready()

    async def answer(self, body: ChatRequest | CompletionRequest, caller: Caller) -> Response:
        """Answer a request, whole or as a stream. Raises `APIError`."""
        async with AsyncExitStack() as held:
            with _answering_errors():
                plan = await self._planner.plan(body, caller, self.catalog, held)
                await held.enter_async_context(self._places(plan.num_streams))
                answer = self._answer(body, plan)
                held.callback(_note, answer)
                held.push_async_callback(answer.aclose)
                self._shadows.follow(plan, self.catalog)
                headers = {"X-Request-Id": plan.request_id}
                if not body.stream:
                    return JSONResponse(await answer.whole(), headers=headers)
                await answer.begin()
            return EventStream(answer.events(), held.pop_all(), headers)

    async def score(self, body: ScoreRequest, caller: Caller) -> Response:
        """Say what guides, base and reward models find answers worth. Raises `APIError`."""
        request_id = body.request_id or caller.request_id or uuid.uuid4().hex
        with _answering_errors():
            scoring = Scoring(body, self.catalog, self._planner, request_id)
            async with self._places(len(body.answers)):
                answered = await scoring.score(self._calls, self._texts)
        current_visit().answer(request_id, body.model, answered["usage"], answered["guides"])
        return JSONResponse(answered, headers={"X-Request-Id": request_id})

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Return the ids of a text. Raises `APIError`, as `detokenize` does."""
        self._check_model(body.model)
        return tokenizing.tokenize(self._tokenizer, self.catalog.base, body)

    def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """Return the text of ids."""
        self._check_model(body.model)
        return tokenizing.detokenize(self._tokenizer, self.catalog.base, body)

    @asynccontextmanager
    async def _places(self, num: int) -> AsyncIterator[None]:
        visit = current_visit()
        async with self.admission.places(num, client=visit.client_id):
            visit.admit()
            yield

    async def _show(self) -> None:
        admission = self.admission
        self._metrics.show(in_flight=admission.num_in_flight, queued=admission.num_queued)

    def _check_model(self, model: str | None) -> None:
        if model is not None:
            choose(self.catalog, model, [], request_id="")

    def _answer(self, body: ChatRequest | CompletionRequest, plan: Plan) -> Answer:
        vocabulary = Vocabulary(
            self._tokenizer, self._texts, as_ids=body.return_tokens_as_token_ids
        )
        choices, details = [], []
        for task in plan.tasks:
            echoed = task.prompt.token_ids if task.echo else ()
            logprobs = plan.shape.logprobs(vocabulary, echoed) if body.wants_logprobs else None
            choices.append(Choice(task, plan.chain, self._calls, self._tokenizer))
            details.append(
                Details(
                    vocabulary,
                    logprobs=logprobs,
                    steering=body.return_steering,
                    token_ids=body.return_token_ids,
                )
            )
        return Answer(
            plan,
            choices,
            details,
            stream_options=body.stream_options,
            metadata=body.metadata,
            with_prompt_ids=body.return_token_ids,
        )


def _note(answer: Answer) -> None:
    """Leave behind what an answer came to, finished or not."""
    plan = answer.plan
    current_visit().answer(plan.request_id, plan.header.model, answer.usage(), answer.guides())


@contextmanager
def _answering_errors() -> Iterator[None]:
    """Raise an `APIError` for whatever fails inside; what is our own fault goes to the log."""
    try:
        yield
    except APIError:
        raise
    except Exception as error:
        answered = api_error(error)
        if answered.status >= 500:
            logger.exception("a request failed")
        raise answered from error
