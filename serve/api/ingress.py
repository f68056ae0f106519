"""`Pipeline`: the OpenAI-compatible ingress in front of base and guides."""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pilotfish.chat import Message, render_prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.errors import PromptError
from pilotfish.models.loading import load_tokenizer
from serve.api.admission import Admission
from serve.api.answering import Answer
from serve.api.answers import ChatShape, Header, Shape, TextShape
from serve.api.journal import Journal, Patience, follow
from serve.api.routes import build_routes
from serve.api.schema import ChatRequest, CompletionRequest
from serve.catalog import Catalog
from serve.choosing import choose
from serve.errors import APIError, api_error
from serve.ingress_config import IngressConfig
from serve.replicas.following import Following

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 2


class Pipeline:
    """Turns bodies into journals, and journals into answers. Holds no state of a model."""

    def __init__(
        self,
        config: IngressConfig,
        catalog: Catalog,
        base: Any,
        revising: Mapping[str, Any],
        control: Any,
    ) -> None:
        """Handles: of `BaseModel`, of each `ResponseGuide` by name, and of `Guides`."""
        self._config, self._control = config, control
        self._following = Following(catalog, self._adopt, lambda: control)
        self._tokenizer = load_tokenizer(catalog.base.artifact.fetch())
        # Tokens are small: gRPC is quicker than a round through the object store.
        small = base.options(_by_reference=False)
        self._stats = small.stats
        self._generate = small.options(stream=True).generate
        self._patience = Patience(
            first_token_s=config.first_token_deadline_s,
            token_s=config.token_deadline_s,
            max_attempts=config.max_attempts,
        )
        self.admission = Admission(config)

    @property
    def catalog(self) -> Catalog:
        """What is served at this moment."""
        return self._following.catalog

    async def check_health(self) -> None:
        """Never fails; Serve's calls begin to follow the catalog."""
        self._following.ensure()

    async def _adopt(self, catalog: Catalog) -> None:
        logger.info("serving revision %d of the guides", catalog.revision)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve calls for the HTTP side of a replica."""
        return build_routes(self)

    async def ready(self) -> bool:
        """Whether a base replica, with base and guides loaded, answers."""
        try:
            await asyncio.wait_for(self._stats.remote(), _READY_TIMEOUT_S)
        except Exception:
            return False
        return True

    async def answer(self, body: ChatRequest | CompletionRequest) -> Response:
        """Answer a request, whole or as a stream. Raises `APIError`."""
        async with AsyncExitStack() as stack:
            answer = self._start(body)
            await stack.enter_async_context(self.admission.places(1))
            stack.push_async_callback(answer.tokens.aclose)
            try:
                if not body.stream:
                    return JSONResponse(await answer.whole())
                await answer.begin()
            except Exception as error:
                answered = api_error(error)
                if answered.status >= 500:
                    logger.exception("%s failed", answer.header.id)
                raise answered from error
            return _EventStream(answer.events(), stack.pop_all())

    def _start(self, body: ChatRequest | CompletionRequest) -> Answer:
        """Check everything that can be checked here, and open the stream of tokens."""
        shape: Shape = ChatShape() if isinstance(body, ChatRequest) else TextShape()
        request_id = f"{shape.id_prefix}{uuid.uuid4().hex}"
        chosen = choose(self.catalog, body.model, body.asked_guides, request_id=request_id)
        prompt_ids, messages = self._prompt(body)
        journal = Journal(
            request_id=request_id,
            prompt_ids=prompt_ids,
            messages=messages,
            params=self._params(body, len(prompt_ids)),
            guides=chosen.tilts,
        )
        versions = [use.version for use in chosen.uses]
        fingerprint = self.catalog.system_fingerprint(versions)
        return Answer(
            journal=journal,
            tokens=follow(journal, self._generate.remote, self._patience),
            text=TextStream(self._tokenizer, body.stops),
            shape=shape,
            header=Header(
                id=journal.request_id,
                created=int(time.time()),
                model=body.model,
                system_fingerprint=fingerprint,
            ),
            guides=chosen.uses,
            with_usage=body.stream_options is not None and body.stream_options.include_usage,
            with_ids=body.return_token_ids,
        )

    def _prompt(
        self, body: ChatRequest | CompletionRequest
    ) -> tuple[list[int], list[Message] | None]:
        messages = None
        if isinstance(body, ChatRequest):
            prompt = messages = [message.plain() for message in body.messages]
        else:
            prompt = body.only_prompt
            if not isinstance(prompt, str):
                return self._check_ids(prompt), None
        try:
            return render_prompt(self._tokenizer, prompt), messages
        except PromptError as error:
            param = "prompt" if messages is None else "messages"
            raise APIError(400, str(error), param=param) from error

    def _check_ids(self, token_ids: list[int]) -> list[int]:
        size = self.catalog.base.vocab_size
        strange = next((i for i in token_ids if not 0 <= i < size), None)
        if strange is not None:
            message = f"prompt token id {strange} is outside the vocabulary of {size}."
            raise APIError(400, message, param="prompt")
        return token_ids

    def _params(self, body: ChatRequest | CompletionRequest, num_prompt: int) -> dict[str, Any]:
        """Return the fields of `SamplingParams`, with the seed and the length decided."""
        room = self.catalog.base.max_length - num_prompt
        wanted = body.token_limit
        if room < (wanted or 1):
            message = (
                f"This model's maximum context length is {self.catalog.base.max_length} tokens, "
                f"but the prompt has {num_prompt} and {wanted or 1} more were asked for. Shorten "
                "the prompt, or lower max_tokens."
            )
            param = "messages" if isinstance(body, ChatRequest) else "prompt"
            raise APIError(400, message, param=param, code="context_length_exceeded")
        return {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": max(0, body.top_k),
            "max_tokens": wanted or min(room, self._config.max_tokens),
            "seed": secrets.randbits(64) if body.seed is None else body.seed % 2**64,
            "stop": body.stops,
            "stop_token_ids": body.stop_token_ids,
            "ignore_eos": body.ignore_eos,
        }


class _EventStream(StreamingResponse):
    """Server-sent events that give back what the request holds, even if nobody ever reads them."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)
