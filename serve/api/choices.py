"""One choice of an answer, from its first token to its finish reason: the chain of
`pilotfish.answering`, over replicas."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pilotfish.context import Prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.guides.base import Draft
from pilotfish.noise import Purpose, draft_seed, request_key, uniforms
from serve.api.calls import Calls, all_of, drain
from serve.api.details import Piece, join
from serve.api.journal import Journal
from serve.api.whole_answers import Revision, Selection
from serve.errors import GuideUnavailableError, cause_of
from serve.retries import is_retryable
from serve.wire import DraftUse, GuideUse, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The guides of a request that act, by stage."""

    tilts: list[GuideUse]
    draft: DraftUse | None
    selection: Selection | None
    revisions: Sequence[Revision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a choice is to be, all of it decided."""

    request_id: str
    session_id: str | None
    prompt: Prompt
    params: Mapping[str, Any]
    """Fields of `SamplingParams`, seed and length included."""
    completed: list[int]
    keep_stop: bool
    """Whether a stop string that ends the text is part of it."""
    echo: str
    """Text that comes first."""
    read_from: int | None
    priority: int = 0


@dataclass(slots=True)
class Tally:
    """What a choice came to so far."""

    num_tokens: int = 0
    """Of the answer: where it was rewritten, those of the draft and of every revision."""
    num_steered: int = 0
    kl_sum: float = 0.0
    notes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By name: at how many tokens it was noted, and the sum."""
    gave_up: dict[str, int] = field(default_factory=dict)
    """By guide: the position from which the completion goes on without it."""

    def count(self, tokens: Sequence[Token]) -> None:
        self.num_tokens += len(tokens)
        self.num_steered += len(tokens)
        for token in tokens:
            self.kl_sum += token.kl
            for name, value in token.notes.items():
                number, total = self.notes.get(name, (0, 0.0))
                self.notes[name] = number + 1, total + value


@dataclass(slots=True)
class _Grown:
    """A draft, as far as it goes."""

    journal: Journal
    text: TextStream
    tokens: list[Token] = field(default_factory=list)
    """From the first of the completion that was drawn for this request."""

    def draft(self) -> Draft:
        text = self.text.fork()  # the draft may go on, so nothing is flushed from its own
        text.flush()
        return Draft(text.text, self.journal.completed)


class Choice:
    """Consumed once, by `pieces`. Closing that frees whatever the choice holds anywhere."""

    def __init__(
        self, task: Task, chain: Chain, calls: Calls, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.task = task
        self.tally = Tally()
        self.journals: list[Journal] = []
        """Everything that replicas were asked for it."""
        self._chain = chain
        self._calls = calls
        self._tokenizer = tokenizer

    def pieces(self) -> AsyncGenerator[Piece]:
        """Return what comes of it; the last piece alone has a finish reason.

        It raises what `follow` and `ask` raise, and `PromptError` for a draft too long to rewrite.
        """
        if self._chain.selection is None or self.task.params["max_tokens"] == 0:
            stream = self._decoded()
        else:
            stream = self._selected(self._chain.selection)
        return self._revised(stream) if self._chain.revisions else stream

    async def _decoded(self) -> AsyncGenerator[Piece]:
        task = self.task
        journal, text = self._journal(task.params, task.completed), self._text()
        for token_id in task.completed:
            text.push(token_id)
        echo, readings = task.echo, journal.readings
        async with aclosing(self._calls.decode(journal, task.session_id)) as stream:
            async for tokens in stream:
                self._count(tokens, journal)
                released = _released(text, tokens, journal)
                yield Piece(echo + released, tokens, readings, journal.finish_reason)
                echo, readings = "", []

    async def _selected(self, selection: Selection) -> AsyncGenerator[Piece]:
        """Draw drafts, go on behind the chosen one, and so on."""
        max_tokens = self.task.params["max_tokens"]
        chosen: _Grown | None = None
        echo, ended, num_read = self.task.echo, False, 0
        while not ended:
            drafts = await self._drafts(selection, chosen)
            # The first reads the prompt, whichever is chosen.
            readings = drafts[0].journal.readings if chosen is None else []
            sent = "" if chosen is None else chosen.text.text
            chosen = drafts[await self._place(selection, chosen, drafts)]
            journal = chosen.journal
            num_tokens = len(journal.completed)
            ended = journal.finish_reason == "stop" or num_tokens >= max_tokens
            if ended:
                chosen.text.flush()
            tokens, num_read = chosen.tokens[num_read:], num_tokens
            self._count(tokens, journal)
            released = echo + chosen.text.text[len(sent) :]
            yield Piece(released, tokens, readings, journal.finish_reason if ended else None)
            echo = ""

    async def _drafts(self, selection: Selection, chosen: _Grown | None) -> list[_Grown]:
        numbers = range(selection.selector.num_drafts)
        return await all_of([self._draft(selection, chosen, number) for number in numbers])

    async def _draft(self, selection: Selection, behind: _Grown | None, number: int) -> _Grown:
        """Return a draft whose seed depends on its number alone: draft 0 has the choice's own."""
        params, block = self.task.params, selection.selector.block_tokens
        completed = [] if behind is None else behind.journal.completed
        max_tokens = params["max_tokens"]
        if block is not None:
            max_tokens = min(max_tokens, len(completed) + block)
        own = {
            **params,
            "seed": draft_seed(params["seed"], number),
            "max_tokens": max_tokens,
            "min_tokens": min(params["min_tokens"], max_tokens),
        }
        journal = self._journal(own, completed, f"-{number}")
        if behind is not None:
            journal.gave_up = dict(behind.journal.gave_up)
            grown = _Grown(journal, behind.text.fork(), behind.tokens.copy())
        else:
            grown = _Grown(journal, self._text())
        if behind is not None or number > 0:
            journal.read_from = None
        new = await drain(self._calls.decode(journal, self.task.session_id))
        for token in new:
            grown.text.push(token.token_id)
        grown.tokens += new
        return grown

    async def _place(
        self, selection: Selection, chosen: _Grown | None, drafts: Sequence[_Grown]
    ) -> int:
        if len(drafts) == 1:
            return 0
        prompt, seed = self.task.prompt, self.task.params["seed"]
        key = request_key(seed, prompt.token_ids)
        position = 0 if chosen is None else len(chosen.journal.completed)
        [uniform] = uniforms(
            np.array([key], dtype=np.uint64), np.array([position], dtype=np.uint64), Purpose.SELECT
        )
        written = [grown.draft() for grown in drafts]
        try:
            return await self._calls.choose(selection.use, prompt, written, float(uniform))
        except Exception as error:
            self._go_on_without(selection.use, position, error)
            return 0

    async def _revised(self, drafted: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """Have the draft rewritten; only the last revision comes in pieces."""
        draft = whole = join([piece async for piece in drafted])
        *first, last = self._chain.revisions
        for revision in first:
            whole = join([piece async for piece in self._revision(revision, whole)])
        async with aclosing(self._revision(last, whole)) as pieces:
            async for piece in pieces:
                if piece.finish_reason is None:
                    yield piece
                else:
                    yield piece._replace(tokens=draft.tokens, draft_text=draft.text)

    async def _revision(self, revision: Revision, before: Piece) -> AsyncGenerator[Piece]:
        """Yield what replaces a text, or the text where its guide is gone and can be spared."""
        journal = revision.journal(self.task.prompt, before.text, self.task.request_id)
        self.journals.append(journal)
        text = revision.text()
        try:
            async with aclosing(self._calls.revise(journal, revision.use.version)) as stream:
                async for tokens in stream:
                    self.tally.num_tokens += len(tokens)
                    released = _released(text, tokens, journal)
                    yield Piece(released, finish_reason=journal.finish_reason)
        except Exception as error:
            if journal.completed:
                raise
            self._go_on_without(revision.use, 0, error)
            yield before

    def _go_on_without(self, use: GuideUse, position: int, error: Exception) -> None:
        """Give up a guide that no replica answers for, or raise the error."""
        gone = is_retryable(error) or isinstance(cause_of(error), GuideUnavailableError)
        if use.on_failure != "base" or not gone:
            raise error
        self.tally.gave_up[use.version.name] = position

    def _journal(
        self, params: Mapping[str, Any], completed: Sequence[int], suffix: str = ""
    ) -> Journal:
        task, messages = self.task, self.task.prompt.messages
        journal = Journal(
            request_id=task.request_id + suffix,
            prompt_ids=task.prompt.token_ids,
            messages=None if messages is None else list(messages),
            text=task.prompt.text,
            params=dict(params),
            guides=self._chain.tilts,
            draft=self._chain.draft,
            completed=list(completed),
            read_from=task.read_from,
            priority=task.priority,
        )
        self.journals.append(journal)
        return journal

    def _text(self) -> TextStream:
        params = self.task.params
        return TextStream(
            self._tokenizer,
            params["stop"],
            min_tokens=params["min_tokens"],
            keep_stop=self.task.keep_stop,
        )

    def _count(self, tokens: Sequence[Token], journal: Journal) -> None:
        self.tally.count(tokens)
        self.tally.gave_up.update(journal.gave_up)


def _released(text: TextStream, tokens: Sequence[Token], journal: Journal) -> str:
    """Push tokens, and return the text that they release."""
    released = "".join([text.push(token.token_id) for token in tokens])
    return released if journal.finish_reason is None else released + text.flush()
