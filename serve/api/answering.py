"""From the pieces of choices to the body of an HTTP answer."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from serve.api.answers import DONE, sse
from serve.api.calls import merge
from serve.api.choices import Choice
from serve.api.details import Details, Piece, join
from serve.api.planning import Plan
from serve.api.schema.generation import StreamOptions
from serve.api.visit import current_visit
from serve.errors import api_error

logger = logging.getLogger(__name__)

_BEGIN_S = 5.0
"""So long a stream may stay without a status, for the sake of one that says what is wrong."""


class Answer:
    """All choices of a request, of which it is consumed once: whole, or as events."""

    def __init__(
        self,
        plan: Plan,
        choices: Sequence[Choice],
        details: Sequence[Details],
        *,
        stream_options: StreamOptions | None,
        metadata: Mapping[str, str] | None,
        with_prompt_ids: bool,
    ) -> None:
        """`details` are those of each choice; `metadata` is the client's own, and goes back."""
        self.plan = plan
        self.choices = choices
        self._details = details
        self._options = stream_options or StreamOptions()
        self._metadata = metadata
        self._with_prompt_ids = with_prompt_ids
        pieces = merge([choice.pieces() for choice in choices])
        self._pieces = current_visit().watch(pieces, len(choices))
        self._num_open = len(choices)
        self._first: asyncio.Future[tuple[int, Piece]] | None = None

    async def whole(self) -> dict[str, Any]:
        """Return the body, once all choices are finished."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        async for index, piece in self._pieces:
            pieces[index].append(piece)
        choices: list[dict[str, Any]] = []
        for index, piece in enumerate(map(join, pieces)):
            choice = self.plan.shape.whole(index, piece.text)
            choice["finish_reason"] = piece.finish_reason
            choices.append({**choice, **self._details[index].of(piece)})
        body = self.plan.header.event(self.plan.shape.whole_kind, choices)
        return {**body, "usage": self.usage(), **self._ending()}

    async def begin(self) -> None:
        """Wait for the first piece, so that what fails before it still has an HTTP status."""
        self._first = asyncio.ensure_future(anext(self._pieces))
        done, _ = await asyncio.wait([self._first], timeout=_BEGIN_S)
        if done:
            self._first.result()

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events; an error in the middle is an event of its own."""
        try:
            for index in range(len(self.choices)):
                if (opening := self.plan.shape.opening(index)) is not None:
                    yield self._event([opening])
            if self._first is not None and (event := self._said(*await self._first)):
                yield event
            async for index, piece in self._pieces:
                if event := self._said(index, piece):
                    yield event
            if self._options.include_usage:
                yield self._event([], usage=self.usage())
        except Exception as error:
            logger.exception("%s failed", self.plan.header.id)
            yield sse(api_error(error).body())
        yield DONE

    async def aclose(self) -> None:
        """Free whatever the choices hold."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._pieces.aclose()

    def usage(self) -> dict[str, int]:
        """Return the tokens so far; each prompt counts once."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.plan.prompts)
        num_new = sum(choice.tally.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        }

    def _said(self, index: int, piece: Piece) -> str:
        """Return an event with a choice, which is empty if there is nothing to say."""
        details = self._details[index]
        if not (piece.text or piece.finish_reason or (details.wanted and piece.tokens)):
            return ""
        choice = self.plan.shape.piece(index, piece.text)
        if details.wanted:
            choice.update(details.of(piece))
        if piece.finish_reason is None:
            return self._event([choice])
        choice["finish_reason"] = piece.finish_reason
        self._num_open -= 1
        return self._event([choice], **({} if self._num_open else self._ending()))

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> str:
        event = self.plan.header.event(self.plan.shape.event_kind, choices)
        if self._options.continuous_usage_stats:
            event["usage"] = self.usage()
        elif self._options.include_usage:
            event["usage"] = None
        return sse({**event, **fields} if fields else event)

    def _ending(self) -> dict[str, Any]:
        """What is said once, in a body or in the last event of a choice."""
        ending: dict[str, Any] = {"guides": self.guides()}
        if self._metadata is not None:
            ending["metadata"] = self._metadata
        if self._with_prompt_ids:
            prompts = [prompt.token_ids for prompt in self.plan.prompts]
            ending["prompt_token_ids"] = prompts[0] if len(prompts) == 1 else prompts
        return ending

    def guides(self) -> list[dict[str, Any]]:
        """Return what the guides of the request did; `mean_kl` is that of all of them together."""
        tallies = [choice.tally for choice in self.choices]
        num_tokens = sum(tally.num_steered for tally in tallies)
        mean_kl = sum(tally.kl_sum for tally in tallies) / max(1, num_tokens)
        echo = []
        for use in self.plan.chosen.uses:
            name = use.version.name
            said = {
                "name": name,
                "version": use.version.version,
                "weight": use.weight,
                "mean_kl": mean_kl,
            }
            rejects = [t.notes[n] for t in tallies if (n := f"{name}.expected_rejects") in t.notes]
            if rejects:
                num_drawn = sum(number for number, _ in rejects)
                said["accept_rate"] = num_drawn / (num_drawn + sum(total for _, total in rejects))
            gave_up = [tally.gave_up[name] for tally in tallies if name in tally.gave_up]
            if name in self.plan.chosen.off:
                gave_up = [0]
            if gave_up:
                said["gave_up_at"] = min(gave_up)
            echo.append(said)
        return echo
