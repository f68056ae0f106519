"""The journal of a request, and the loop that keeps its stream going whatever replica dies.

The ingress sees every token, so it holds all that a request is: prompt, parameters, seed, and the
tokens so far. When a replica dies, stalls or answers out of order, the request goes to another one
with those tokens as its beginning. Draws are counted by position, so the new replica samples the
path the old one was on.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pilotfish.chat import Message
from serve.api.visit import current_visit
from serve.retries import StreamBrokenError, is_retryable
from serve.suspicions import suspect
from serve.wire import Batch, DraftUse, GenerateRequest, GuideUse, Token

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_S = 0.02
_BACKOFF_FACTOR = 4
"""So attempts last longer than a replica stays whose process apart has died."""


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
    """Tokens that the completion has, those included that it began with."""
    read_from: int | None = None
    """The first position of the prompt that is reported; None is none. Position 0 has nothing
    before it and never is."""
    readings: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    gave_up: dict[str, int] = field(default_factory=dict)
    """Guides that failed, and the position from which the completion goes on without each."""
    num_failovers: int = 0
    priority: int = 0

    @property
    def attempt(self) -> str:
        """What the present call to a replica is named."""
        return f"{self.request_id}#{self.num_failovers}"

    def request(self) -> GenerateRequest:
        """Return what any replica needs to go on from here."""
        request = GenerateRequest(
            prompt_ids=self.prompt_ids,
            messages=self.messages,
            text=self.text,
            params=self.params,
            guides=self.guides,
            draft=self.draft,
            completed=list(self.completed),
            gave_up=list(self.gave_up),
            attempt=self.attempt,
        )
        if self.read_from is not None:
            request["read_from"] = max(1, self.read_from) + len(self.readings)
        if self.priority:
            request["priority"] = self.priority
        return request

    def record(self, batch: Batch) -> list[Token]:
        """Take the next tokens, or none of them: `StreamBrokenError` if they are any others."""
        tokens = [Token(*values) for values in batch.tokens]
        _check_positions(tokens, len(self.completed))
        if batch.readings:
            readings = [Token(*values) for values in batch.readings]
            _check_positions(readings, max(1, self.read_from or 0) + len(self.readings))
            self.readings += readings
        for name, num_before in batch.gave_up:
            self.gave_up.setdefault(name, len(self.completed) + num_before)
        self.completed += [token.token_id for token in tokens]
        if tokens:
            self.finish_reason = tokens[-1].finish_reason
        elif batch.ended:
            self.finish_reason = "length"
        return tokens


def _check_positions(tokens: Sequence[Token], start: int) -> None:
    for position, token in enumerate(tokens, start=start):
        if token.position != position:
            raise StreamBrokenError(f"got the token at {token.position}, wanted {position}")


async def follow(
    journal: Journal, send: Callable[[GenerateRequest], TokenStream], patience: Patience
) -> AsyncGenerator[list[Token]]:
    """Yield the tokens of a completion, each exactly once, until it is finished.

    What is read of the prompt is in the journal before the first token comes; a request that draws
    none yields an empty list when it has read everything. Gives up after `max_attempts` failures in
    a row without progress, and raises the last of them; an error that is the request's own is
    raised at once.
    """
    failures = 0
    while journal.finish_reason is None:
        before = _progress(journal)
        try:
            async with aclosing(_attempt(journal, send, patience)) as attempt:
                async for tokens in attempt:
                    yield tokens
        except Exception as error:
            failures = 1 if _progress(journal) > before else failures + 1
            if not is_retryable(error) or failures >= patience.max_attempts:
                raise
            # A replica whose decode loop died looks idle until it leaves, and draws every request.
            suspect(journal.attempt)
            journal.num_failovers += 1
            current_visit().fail_over(error, len(journal.completed))
            logger.warning(
                "%s: failure %d at token %d, going on elsewhere: %r",
                *(journal.request_id, failures, len(journal.completed), error),
            )
            await _back_off(failures)


async def ask(call: Callable[[], Awaitable[T]], patience: Patience) -> T:
    """Return the answer of a call that any replica can answer, as persistently as `follow`."""
    failures = 0
    while True:
        try:
            async with asyncio.timeout(patience.first_token_s):
                return await call()
        except Exception as error:
            failures += 1
            if not is_retryable(error) or failures >= patience.max_attempts:
                raise
            current_visit().fail_over(error, 0)
            logger.warning("failure %d of a call, asking elsewhere: %r", failures, error)
            await _back_off(failures)


async def _back_off(failures: int) -> None:
    await asyncio.sleep(_BACKOFF_S * _BACKOFF_FACTOR ** (failures - 1))


def _progress(journal: Journal) -> int:
    return len(journal.completed) + len(journal.readings)


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
                    batch = Batch(*await anext(stream))
            except StopAsyncIteration:
                raise StreamBrokenError("the stream ended before the completion did") from None
            tokens = journal.record(batch)
            if batch.tokens or batch.readings:
                limit = patience.token_s
            if tokens or journal.finish_reason is not None:
                yield tokens
    finally:
        if journal.finish_reason is None:
            stream.cancel()
