"""The journal of a request, and the loop that keeps its stream going whatever replica dies.

The ingress sees every token, so it holds all that a request is: prompt, parameters, seed, and the
tokens so far. When a replica dies, stalls or answers out of order, the request goes to another one
with those tokens as its beginning. Draws are counted by position, so the new replica samples the
path the old one was on.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from pilotfish.chat import Message
from serve.retries import StreamBrokenError, is_retryable
from serve.wire import Batch, DraftUse, GenerateRequest, GuideUse, Token

logger = logging.getLogger(__name__)

_BACKOFF_S = 0.02


class TokenStream(Protocol):
    """A streaming call to a base replica."""

    async def __anext__(self) -> tuple[Any, ...]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When to give up on a replica, and on a request."""

    first_token_s: float
    token_s: float
    max_attempts: int


@dataclass(slots=True, kw_only=True)
class Journal:
    """One completion, at any moment of its life."""

    request_id: str
    prompt_ids: list[int]
    messages: list[Message] | None = None
    text: str | None = None
    """The prompt as it was written, where it was no conversation."""
    params: dict[str, Any]
    """Fields of `SamplingParams`. The seed is set before the first attempt and never changes."""
    guides: list[GuideUse] = field(default_factory=list)
    """Those that tilt, with their versions: a replica that has never heard of one loads it."""
    draft: DraftUse | None = None
    completed: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    kl_sum: float = 0.0
    gave_up: dict[str, int] = field(default_factory=dict)
    """Guides that failed, and the position from which the completion goes on without each."""
    num_failovers: int = 0

    @property
    def mean_kl(self) -> float:
        """KL(guided || base) in nats per token so far."""
        return self.kl_sum / max(1, len(self.completed))

    def request(self) -> GenerateRequest:
        """Return what any replica needs to go on from here."""
        return GenerateRequest(
            prompt_ids=self.prompt_ids,
            messages=self.messages,
            text=self.text,
            params=self.params,
            guides=self.guides,
            draft=self.draft,
            completed=list(self.completed),
            gave_up=list(self.gave_up),
        )

    def record(self, batch: Batch) -> list[Token]:
        """Take the next tokens, or none of them: `StreamBrokenError` if they are any others."""
        tokens = [Token(*values) for values in batch.tokens]
        for position, token in enumerate(tokens, start=len(self.completed)):
            if token.position != position:
                raise StreamBrokenError(f"got the token at {token.position}, wanted {position}")
        self.completed += [token.token_id for token in tokens]
        self.kl_sum += sum(token.kl for token in tokens)
        for name in batch.gave_up:
            self.gave_up.setdefault(name, len(self.completed))
        if tokens:
            self.finish_reason = tokens[-1].finish_reason
        return tokens


async def follow(
    journal: Journal, send: Callable[[GenerateRequest], TokenStream], patience: Patience
) -> AsyncGenerator[list[Token]]:
    """Yield the tokens of a completion, each exactly once, until it is finished.

    Gives up after `max_attempts` failures in a row without a token, and raises the last of them;
    an error that is the request's own is raised at once.
    """
    failures = 0
    while journal.finish_reason is None:
        before = len(journal.completed)
        try:
            async with aclosing(_attempt(journal, send, patience)) as attempt:
                async for tokens in attempt:
                    yield tokens
        except Exception as error:
            failures = 1 if len(journal.completed) > before else failures + 1
            if not is_retryable(error) or failures >= patience.max_attempts:
                raise
            journal.num_failovers += 1
            logger.warning(
                "%s: failure %d at token %d, going on elsewhere: %r",
                *(journal.request_id, failures, len(journal.completed), error),
            )
            await asyncio.sleep(_BACKOFF_S * failures)


async def _attempt(
    journal: Journal, send: Callable[[GenerateRequest], TokenStream], patience: Patience
) -> AsyncGenerator[list[Token]]:
    """Stream from one replica until the completion ends, or something breaks."""
    stream = send(journal.request())
    limit = patience.first_token_s
    try:
        while journal.finish_reason is None:
            try:
                async with asyncio.timeout(limit):
                    sent = await anext(stream)
            except StopAsyncIteration:
                raise StreamBrokenError("the stream ended before the completion did") from None
            if tokens := journal.record(Batch(*sent)):
                yield tokens
                limit = patience.token_s
    finally:
        if journal.finish_reason is None:
            stream.cancel()
