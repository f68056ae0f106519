"""One HTTP request as those who run the server see it: who asked, for what, and how it went.

Whatever works on a request notes what it knows in `current_visit()`. Log line, metrics and trace
are made of that when the request is over, so that none of them is in the way of a token.
"""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from serve.api.details import Piece
from serve.api.keys import Client

T = TypeVar("T")


class Stage(NamedTuple):
    """One part of the work on a request."""

    began: float
    first: float
    """When something came of it."""
    ended: float


@dataclass(slots=True, kw_only=True)
class Visit:
    """Moments are seconds of the monotonic clock."""

    method: str = ""
    path: str = ""
    request_id: str | None = None
    session_id: str | None = None
    client: Client | None = None
    """None where nobody had to say who they are."""
    body: bytes = b""
    began_at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    began: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    """When it had its places."""
    first: float | None = None
    """When there was something to send."""
    ended: float | None = None
    status: int = 0
    """Of the HTTP answer; 499 if the client left before there was one."""
    model: str = ""
    guides: Sequence[Mapping[str, Any]] = ()
    """As answers name them: name, version, weight, mean_kl, accept_rate, gave_up_at."""
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    """Of choices in the order in which they ended; `error` and `abort` besides OpenAI's."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between pieces of the same choice."""
    failovers: list[tuple[str, int]] = field(default_factory=list)
    """What broke, and how many tokens were there then."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """By name, of all choices together."""

    @property
    def client_id(self) -> str:
        return "" if self.client is None else self.client.id

    def admit(self) -> None:
        self.admitted = time.monotonic()

    def fail_over(self, error: BaseException, num_tokens: int) -> None:
        """Note that a call is made again, because of an error, behind so many tokens."""
        self.failovers.append((type(error).__name__, num_tokens))

    def answer(
        self,
        request_id: str,
        model: str,
        usage: Mapping[str, int],
        guides: Sequence[Mapping[str, Any]],
    ) -> None:
        """Note what an answer says of itself."""
        self.request_id, self.model, self.guides = request_id, model, guides
        self.num_prompt_tokens = usage["prompt_tokens"]
        self.num_new_tokens = usage["completion_tokens"]

    async def stage(self, name: str, stream: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """Pass a stream on, and note from when to when it ran."""
        began, first = time.monotonic(), None
        try:
            async with aclosing(stream):
                async for item in stream:
                    first = first or time.monotonic()
                    yield item
        finally:
            ended = time.monotonic()
            stage = Stage(began, first or ended, ended)
            before = self.stages.get(name, stage)
            self.stages[name] = Stage(
                min(before.began, stage.began),
                min(before.first, stage.first),
                max(before.ended, stage.ended),
            )

    async def watch(
        self, pieces: AsyncGenerator[tuple[int, Piece]], num_choices: int
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """Pass the pieces of choices on, and note when they came and how each choice ended."""
        last: dict[int, float] = {}
        missing = "abort"
        try:
            async with aclosing(pieces):
                async for index, piece in pieces:
                    now = time.monotonic()
                    if self.first is None:
                        self.first = now
                    if index in last:
                        self.gaps.append(now - last[index])
                    last[index] = now
                    if piece.finish_reason is not None:
                        self.finish_reasons.append(piece.finish_reason)
                    yield index, piece
        except Exception:
            missing = "error"
            raise
        finally:
            self.finish_reasons += [missing] * (num_choices - len(self.finish_reasons))


_current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def enter(visit: Visit) -> Token[Visit | None]:
    """Make a visit that of this task and of those that it starts."""
    return _current.set(visit)


def leave(token: Token[Visit | None]) -> None:
    _current.reset(token)


def current_visit() -> Visit:
    """Return the visit that this task works for; outside of any, one that nobody will look at."""
    return _current.get() or Visit()
