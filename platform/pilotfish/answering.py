"""Whole answers: drafts from the engine, then whoever selects, then whoever revises."""

import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from tqdm import tqdm

from pilotfish.chain import Chain
from pilotfish.context import Prompt
from pilotfish.decode.driver import Driver, Growing
from pilotfish.decode.sequence import Completion, Drafting, FinishReason, SamplingParams
from pilotfish.errors import PromptError
from pilotfish.guides.base import Draft, Guide, ResponseGuide, Selector
from pilotfish.noise import Purpose, draft_seed, request_key, uniforms


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to answer, and how to draw."""

    prompt: Prompt
    params: SamplingParams
    draft: Drafting | None = None


class Answering:
    """Runs chains of guides on a driver's engine. `guides` are those of all stages, by name."""

    def __init__(self, driver: Driver, guides: Mapping[str, Guide]) -> None:
        self._driver = driver
        self._guides = guides

    def check(self, tasks: Sequence[Task], chain: Chain) -> None:
        """Raise `PromptError` if one of the tasks can never be answered by this chain."""
        selector = self._selector(chain)
        for task in tasks:
            request = self._driver.request(task.prompt, task.params, chain.tilts, draft=task.draft)
            self._driver.engine.check(request)
            if selector is not None:
                _check_selection(task, selector, chain)
            for name in chain.revisions:
                self._reviser(name).check(task.prompt)

    def answer(
        self, tasks: Sequence[Task], chain: Chain, *, progress: bool = False
    ) -> list[Completion]:
        """Answer everything in shared batches; `progress` counts the drafts that are decided."""
        ready: deque[_Drafts] = deque()
        drafts = [self._drafts(task, chain, ready) for task in tasks]
        try:
            with tqdm(total=len(tasks), unit="answer", disable=not progress) as bar:
                for num_done in self._advance(drafts, ready, self._selector(chain)):
                    bar.update(num_done)
        finally:  # an interrupt leaves no request behind for the next call
            for one in drafts:
                one.close()
        return self._revise(tasks, [one.completion() for one in drafts], chain.revisions)

    def stream(self, task: Task, chain: Chain) -> Iterator[str]:
        """Yield the text of one answer as soon as it is sure: see `Pilot.stream`."""
        ready: deque[_Drafts] = deque()
        drafts = self._drafts(task, chain, ready)
        sent = 0
        try:
            for _ in self._advance([drafts], ready, self._selector(chain)):
                piece = "" if chain.revisions else drafts.text[sent:]
                if piece:
                    sent += len(piece)
                    yield piece
        finally:
            drafts.close()
        completion = drafts.completion()
        if not chain.revisions:
            if rest := completion.text[sent:]:
                yield rest
            return
        *first, last = chain.revisions
        [before] = self._revise([task], [completion], first)
        yield from self._reviser(last).revise(task.prompt, before.text)

    def _advance(
        self, drafts: "Sequence[_Drafts]", ready: "deque[_Drafts]", selector: Selector | None
    ) -> Iterator[int]:
        """Decode until all is decided, and say after every step how many were decided by it."""
        waiting = iter(drafts)
        num_undecided = len(drafts)
        while num_undecided:
            # No more at once than keeps every slot busy: the next block of an answer should find
            # its beginning still cached.
            while self._driver.has_room and (one := next(waiting, None)) is not None:
                one.open()
            if not ready:
                self._driver.step()
            ended = list(ready)
            ready.clear()
            places = _choose(ended, selector)
            num_done = sum(one.settle(place) for one, place in zip(ended, places, strict=True))
            num_undecided -= num_done
            yield num_done

    def _revise(
        self, tasks: Sequence[Task], completions: list[Completion], names: Sequence[str]
    ) -> list[Completion]:
        prompts = [task.prompt for task in tasks]
        for name in names:
            texts = [completion.text for completion in completions]
            revised = self._reviser(name).revise_all(prompts, texts)
            completions = [
                replace(
                    completion,
                    text=written.text,
                    finish_reason=FinishReason.STOP if written.complete else FinishReason.LENGTH,
                    draft_text=completion.draft_text if completion.revised_by else completion.text,
                    revised_by=(*completion.revised_by, name),
                )
                for completion, written in zip(completions, revised, strict=True)
            ]
        return completions

    def _drafts(self, task: Task, chain: Chain, ready: "deque[_Drafts]") -> "_Drafts":
        return _Drafts(task, chain.tilts, self._selector(chain), self._driver, ready)

    def _selector(self, chain: Chain) -> Selector | None:
        # The stage says what a guide is; `make_chain` has looked at it.
        return None if chain.selection is None else cast(Selector, self._guides[chain.selection])

    def _reviser(self, name: str) -> ResponseGuide:
        return cast(ResponseGuide, self._guides[name])


class _Drafts:
    """The drafts of one task, until one of them is the answer.

    Without a selector there is one, drawn as it is. With one, draft i has a seed of its own that
    depends on i alone, and draft 0 has the request's: one draft is exactly what is drawn without a
    selector, and more drafts only add to fewer.
    """

    def __init__(
        self,
        task: Task,
        tilts: Mapping[str, float],
        selector: Selector | None,
        driver: Driver,
        ready: "deque[_Drafts]",
    ) -> None:
        """`ready` is told when all open drafts have ended, and it is time to `settle`."""
        self.prompt, self._tilts, self._selector = task.prompt, tilts, selector
        self._driver, self._ready, self._draft = driver, ready, task.draft
        self._open: list[Growing] = []
        self._num_open = 0
        self._chosen: Growing | None = None
        params = task.params
        if params.seed is None and selector is not None:
            params = replace(params, seed=secrets.randbits(64))
        self._params = params
        self._noise_key = 0
        if selector is not None and params.seed is not None:
            self._noise_key = request_key(params.seed, self.prompt.token_ids)

    @property
    def text(self) -> str:
        """As much of the answer's text as is sure."""
        if self._selector is None and self._open:
            return self._open[0].text.text
        return "" if self._chosen is None else self._chosen.text.text

    @property
    def counter(self) -> tuple[int, int]:
        """Key and position of the next choice's randomness."""
        return self._noise_key, 0 if self._chosen is None else len(self._chosen.events)

    def drafts(self) -> list[Draft]:
        return [_draft(growing) for growing in self._open]

    def open(self) -> None:
        """Submit the next drafts, behind what was chosen so far."""
        selector, max_tokens = self._selector, self._params.max_tokens
        completed = [] if self._chosen is None else self._chosen.token_ids
        if selector is not None and selector.block_tokens is not None:
            max_tokens = min(max_tokens, len(completed) + selector.block_tokens)
        self._num_open = 1 if selector is None else selector.num_drafts
        self._open = []
        for number in range(self._num_open):
            seed = self._params.seed
            params = replace(
                self._params,
                max_tokens=max_tokens,
                min_tokens=min(self._params.min_tokens, max_tokens),
                seed=None if seed is None else draft_seed(seed, number),
            )
            request = self._driver.request(
                self.prompt, params, self._tilts, completed=completed, draft=self._draft
            )
            self._open.append(
                self._driver.open(request, behind=self._chosen, on_end=self._count_end)
            )

    def settle(self, place: int) -> bool:
        """Go on with one of the drafts, all of which have ended; say whether the answer has too."""
        chosen = self._open[place]
        self._chosen, self._open = chosen, []
        stopped = chosen.finish_reason is FinishReason.STOP
        if stopped or len(chosen.events) >= self._params.max_tokens:
            return True
        self.open()
        return False

    def close(self) -> None:
        """Give up what is still open."""
        self._driver.close(self._open)

    def completion(self) -> Completion:
        assert self._chosen is not None
        return self._chosen.completion()

    def _count_end(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._ready.append(self)


def _choose(ended: Sequence[_Drafts], selector: Selector | None) -> list[int]:
    """Return for each the place of the draft that goes on."""
    if not ended or selector is None or selector.num_drafts == 1:
        return [0] * len(ended)
    keys, positions = zip(*(one.counter for one in ended), strict=True)
    drawn = uniforms(
        np.array(keys, dtype=np.uint64), np.array(positions, dtype=np.uint64), Purpose.SELECT
    )
    prompts = [one.prompt for one in ended]
    return selector.choose_all(prompts, [one.drafts() for one in ended], drawn.tolist())


def _draft(growing: Growing) -> Draft:
    text = growing.text.fork()  # the draft may go on, so nothing is flushed from its own
    text.flush()
    return Draft(text.text, growing.token_ids)


def _check_selection(task: Task, selector: Selector, chain: Chain) -> None:
    if task.params.temperature == 0 and selector.num_drafts > 1:
        raise PromptError(
            f"guide {chain.selection!r} selects among {selector.num_drafts} drafts, but at "
            "temperature 0 they are all the same. Raise the temperature, or leave the guide out."
        )
    selector.check(task.prompt, task.params.max_tokens)
