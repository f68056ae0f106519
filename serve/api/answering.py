"""From a stream of tokens to the body of an HTTP answer."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import CompletionUsage

from pilotfish.decode.detokenize import TextStream
from serve.api.answers import DONE, Header, Outcome, Shape, sse
from serve.api.journal import Journal
from serve.errors import api_error
from serve.wire import GuideUse, Token

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Answer:
    """One completion on its way to a client, of which it is consumed once: whole, or as events."""

    journal: Journal
    tokens: AsyncGenerator[list[Token]]
    text: TextStream
    shape: Shape
    header: Header
    guides: Sequence[GuideUse]
    with_usage: bool
    with_ids: bool
    _first: list[Token] = field(default_factory=list)

    async def begin(self) -> None:
        """Wait for the first tokens, so that what fails before them still has an HTTP status."""
        self._first = await anext(self.tokens)

    async def whole(self) -> dict[str, Any]:
        """Return the body, once the completion is finished."""
        async for tokens in self._all():
            self._push(tokens)
        self.text.flush()
        outcome = Outcome(
            text=self.text.text,
            finish_reason=self.journal.finish_reason,
            usage=self._usage(),
            choice_extras={"token_ids": self.journal.completed} if self.with_ids else {},
            extras=self._extras(),
        )
        return self.shape.whole(self.header, outcome)

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events; an error in the middle is an event of its own."""
        try:
            if (opening := self.shape.opening()) is not None:
                yield sse(self.shape.event(self.header, [opening]))
            async for tokens in self._all():
                piece = self._push(tokens)
                if self.journal.finish_reason is not None:
                    yield sse(self._last(piece + self.text.flush(), tokens))
                elif piece or self.with_ids:
                    yield sse(self.shape.event(self.header, [self._choice(piece, tokens)]))
            if self.with_usage:
                usage = {"usage": self._usage().model_dump(exclude_unset=True)}
                yield sse({**self.shape.event(self.header, []), **usage})
        except Exception as error:
            logger.exception("%s failed", self.header.id)
            yield sse(api_error(error).body())
        yield DONE

    async def _all(self) -> AsyncIterator[list[Token]]:
        if self._first:
            yield self._first
        async for tokens in self.tokens:
            yield tokens

    def _push(self, tokens: Sequence[Token]) -> str:
        return "".join([self.text.push(token.token_id) for token in tokens])

    def _choice(self, piece: str, tokens: Sequence[Token]) -> dict[str, Any]:
        choice = self.shape.piece(piece)
        if self.with_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return choice

    def _last(self, piece: str, tokens: Sequence[Token]) -> dict[str, Any]:
        choice = self._choice(piece, tokens)
        choice["finish_reason"] = self.journal.finish_reason
        return {**self.shape.event(self.header, [choice]), **self._extras()}

    def _usage(self) -> CompletionUsage:
        num_prompt, num_new = len(self.journal.prompt_ids), len(self.journal.completed)
        return CompletionUsage(
            prompt_tokens=num_prompt,
            completion_tokens=num_new,
            total_tokens=num_prompt + num_new,
        )

    def _extras(self) -> dict[str, Any]:
        """What is ours: the guides used. Their `mean_kl` is that of the whole chain."""
        mean_kl = self.journal.mean_kl
        echo = [
            {
                "name": use.version.name,
                "weight": use.weight,
                "version": use.version.version,
                "mean_kl": mean_kl,
            }
            for use in self.guides
        ]
        ids = {"prompt_token_ids": self.journal.prompt_ids} if self.with_ids else {}
        return {"guides": echo, **ids}
