"""Answers while they grow, and what makes them grow: an engine and callers that wait for it."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from pilotfish.context import Prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import (
    Completion,
    Drafting,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
)


@dataclass(slots=True, eq=False)
class Growing:
    """A completion while it grows."""

    request: Request
    text: TextStream
    events: list[TokenEvent] = field(default_factory=list)
    """From the first token of the completion, whichever request drew it."""
    ended: bool = False
    on_end: Callable[[], None] | None = None

    @property
    def token_ids(self) -> list[int]:
        return [event.token_id for event in self.events]

    @property
    def finish_reason(self) -> FinishReason:
        reason = self.events[-1].finish_reason
        assert reason is not None
        return reason

    def take(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.text.push(event.token_id)

    def completion(self) -> Completion:
        """Return what has grown, which nothing is added to any more."""
        self.text.flush()
        return Completion(
            text=self.text.text,
            token_ids=self.token_ids,
            logprobs=[event.logprob for event in self.events],
            base_logprobs=[event.base_logprob for event in self.events],
            kl=[event.kl for event in self.events],
            finish_reason=self.finish_reason,
            moved_by=[event.moved_by for event in self.events],
            drafted=[event.drafted for event in self.events],
            notes=[event.notes for event in self.events],
            top=[event.top for event in self.events],
        )


class Driver:
    """Steps an engine for callers in one thread, each of whom waits for requests of its own.

    Callers may overlap, as a stream that was not read to its end does with whatever is asked
    meanwhile: a step serves them all. The engine belongs to the driver.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._keys = itertools.count(1)
        self._open: dict[int, Growing] = {}

    @property
    def has_room(self) -> bool:
        """Whether a slot would stay empty in the next step."""
        return len(self._open) < self.engine.base.num_slots

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        guides: Mapping[str, float] | None = None,
        *,
        completed: Sequence[int] = (),
        draft: Drafting | None = None,
    ) -> Request:
        """Return a request with a key that no other one of this engine has."""
        return Request(
            key=next(self._keys),
            prompt=prompt,
            params=params,
            guides=dict(guides or {}),
            completed=tuple(completed),
            draft=draft,
        )

    def open(
        self,
        request: Request,
        *,
        behind: Growing | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Growing:
        """Submit a request. `behind` is what its `completed` ids grew as.

        `on_end` is called by the step that ends it, whoever asked for that step; it may only mark.
        Raises `PromptError` for what can never be decoded.
        """
        if behind is None:
            growing = Growing(request, TextStream(self._tokenizer, request.params.stop))
        else:
            growing = Growing(request, behind.text.fork(), behind.events.copy())
        growing.text.min_tokens = request.params.min_tokens
        growing.on_end = on_end
        self.engine.submit(request)
        self._open[request.key] = growing
        return growing

    def step(self) -> None:
        """Advance everything that is open."""
        for event in self.engine.step():
            growing = self._open[event.key]
            growing.take(event)
            if event.finish_reason is not None:
                del self._open[event.key]
                growing.ended = True
                if growing.on_end is not None:
                    growing.on_end()

    def follow(self, request: Request) -> Iterator[str]:
        """Decode one request and yield its text as it grows; a closed iterator gives it up."""
        growing = self.open(request)
        sent = 0
        try:
            while not growing.ended:
                self.step()
                if piece := growing.text.text[sent:]:
                    sent += len(piece)
                    yield piece
        finally:
            self.close([growing])
        if piece := growing.text.flush():
            yield piece

    def close(self, growing: Sequence[Growing]) -> None:
        """Give up those that have not ended."""
        for one in growing:
            if self._open.pop(one.request.key, None) is not None:
                self.engine.cancel(one.request.key)
