"""The decode loop: continuous batching of one base, any guides, and drafts they check together.

Shapes: R rows (a running request at a position), V vocabulary.

Requests join and leave at every step and share one base batch, whatever their guides, weights and
sampling parameters. The loop knows token ids only; text enters where stop strings were asked for.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.context import Context
from pilotfish.decode import tilting
from pilotfish.decode.batch import Batch
from pilotfish.decode.checks import Checks
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.drafting import Drafting, Proposals
from pilotfish.decode.pace import Pace
from pilotfish.decode.reading import PromptBatch
from pilotfish.decode.running import Running
from pilotfish.decode.scheduler import Scheduler
from pilotfish.decode.sequence import PromptEvent, Reading, Request, TokenEvent
from pilotfish.decode.tape import Tape
from pilotfish.decode.telemetry import read
from pilotfish.decode.tilting import Tilt, Tilted
from pilotfish.guides.base import TokenGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.noise import Purpose


@dataclass(slots=True)
class DraftStats:
    """What drafting has come to so far, over sequences with a drafter."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_tokens: int = 0
    speed_up: float | None = None
    """Of the best pace over not drafting, as measured lately; None until both were tried."""

    @property
    def acceptance_length(self) -> float:
        """Tokens per round of a sequence, from 1 (nothing accepted) to `num_tokens` + 1."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0


@dataclass(slots=True)
class EngineStats:
    """What steps have come to so far, by the clock of this process."""

    num_steps: int = 0
    seconds: float = 0.0
    guide_seconds: dict[str, float] = field(default_factory=dict)
    """The part of `seconds` spent in each guide; of work that goes on while the base computes, what
    was waited for."""


class Engine:
    """Decodes requests under the guided law, at least one token per running request and step.

    Not thread-safe: one thread owns it. `submit`, `cancel` and `give_up` only mark; `step` does the
    work. A step that raises has drawn no token.
    """

    def __init__(
        self,
        base: CausalLM,
        guides: Mapping[str, TokenGuide] | None = None,
        *,
        drafters: Mapping[str, CausalLM] | None = None,
        end_ids: frozenset[int] = frozenset(),
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefill_budget: int = 512,
        read_budget: int = 64,
    ) -> None:
        """`end_ids` end every completion. Per step, `prefill_budget` bounds the prompt tokens that
        are fed, and `read_budget` those that are read (see `Request.read_from`)."""
        self.base = base
        self.guides = dict(guides or {})
        self.drafters = dict(drafters or {})
        self.draft_stats = DraftStats()
        self.stats = EngineStats()
        # What is never drawn ends nothing; some generation configs name ids behind the vocabulary.
        self._end_ids = frozenset(i for i in end_ids if i < base.vocab_size)
        self._checks = Checks(base, self.guides, self.drafters, self._end_ids, tokenizer)
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(base, prefill_budget=prefill_budget)
        self._pace = Pace()
        self._read_budget = read_budget
        self._readings: list[PromptEvent] = []
        self._cancelled: set[int] = set()
        self._given_up: list[tuple[int, str]] = []
        self._num_submitted = 0
        self._tape: Tape | None = None
        self._batches: dict[tuple[int, ...], tuple[Batch, Drafting]] = {}
        """For the running rows, by number of drafts of each."""

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_preempted(self) -> int:
        """How often a request lost its slot to come back later."""
        return self._scheduler.num_preempted

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.num_waiting or self.num_running)

    @property
    def cache_share(self) -> float:
        """Share of the base's cache columns that requests in slots take, from 0 to 1."""
        return self._scheduler.num_columns / self.base.body.max_columns

    def check(self, request: Request) -> None:
        """Raise `PromptError` if a request can never be decoded here."""
        self._checks.check(request)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptError` if it can never be decoded."""
        self.check(request)
        params = request.params
        text = None
        if params.stop:
            assert self._tokenizer is not None
            text = TextStream(self._tokenizer, params.stop, min_tokens=params.min_tokens)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._num_submitted += 1
        running = Running(
            request, seed=seed, end_ids=self._end_ids, text=text, arrival=self._num_submitted
        )
        self._scheduler.submit(running)

    def cancel(self, key: int) -> None:
        """Drop a request before the next token; unknown keys are ignored."""
        self._cancelled.add(key)

    def give_up(self, key: int, guide: str) -> None:
        """Let a request go on without a guide from the next step on, as if its weight were 0.

        Requests and guides that are unknown are ignored.
        """
        self._given_up.append((key, guide))

    def remove_guide(self, name: str) -> None:
        """Forget a guide, which no request may have any more that was not cancelled."""
        self._apply_marks()
        del self.guides[name]
        self.drafters.pop(name, None)
        self.stats.guide_seconds.pop(name, None)

    def take_readings(self) -> list[PromptEvent]:
        """Return what steps have read of prompts since the last call, in order.

        All of a request's readings are there before the step that draws its first token.
        """
        taken, self._readings = self._readings, []
        return taken

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance every running request; return the tokens drawn."""
        started = time.perf_counter()
        self._apply_marks()
        if self._scheduler.schedule():
            self._forget_rows()
        if self._scheduler.reading:
            self._read()
        events = self._decode() if self._scheduler.running else []
        self.stats.num_steps += 1
        self.stats.seconds += time.perf_counter() - started
        return events

    @torch.inference_mode()
    def law(self, contexts: Sequence[Context], guides: Mapping[str, float]) -> Tensor:
        """Return the guided law behind each context [R, V], whatever is decoded meanwhile."""
        chain = [(name, weight) for name, weight in guides.items() if weight != 0]
        tilts = tilting.make_tilts([chain] * len(contexts), self.base.device)
        _, guided_RV, _ = self._ask(tilts, contexts)
        keys = [context.key for context in contexts]
        for reader in (self.base, *(self.guides[name] for name, _ in chain)):
            reader.release(keys)
        return guided_RV

    def _ask(
        self, tilts: Sequence[Tilt], contexts: Sequence[Context]
    ) -> tuple[Tensor, Tensor, list[Tilted]]:
        """Return the base's law and the guided one [R, V], and what each guide did."""
        begun = tilting.begin(self.guides, tilts, contexts)
        law = self.base.forward(contexts)
        guided_RV, done = tilting.apply(self.guides, begun, law.logprobs_RV, law.hidden_RD)
        spent = self.stats.guide_seconds
        for one in done:
            spent[one.tilt.guide] = spent.get(one.tilt.guide, 0.0) + one.seconds
        return law.logprobs_RV, guided_RV, done

    def _read(self) -> None:
        """Read the next tokens of prompts."""
        reading = self._scheduler.reading
        batch = PromptBatch(reading, self._read_budget, self.base.device)
        readings: list[Reading] = []
        if batch.contexts:
            base_RV, guided_RV, done = self._ask(batch.tilts, batch.contexts)
            readings = read(base_RV, guided_RV, batch.tokens_R, done, batch.tops)
        events = batch.advance(readings)
        for one in [one for one in reading if not one.unread]:
            if not self._scheduler.end_reading(one):
                self._release(one)
        self._readings += events

    def _decode(self) -> list[TokenEvent]:
        """Draw the next token of every running row, and check what was drafted."""
        batch, drafting = self._plan()
        tape = self._tape
        assert tape is not None
        self._pace.start()
        positions = batch.positions()
        said = drafting.propose(tape, positions) if drafting else None
        contexts = batch.contexts(said.chains if said is not None else {})
        base_RV, guided_RV, done = self._ask(batch.tilts, contexts)
        target_RV = batch.bias.add(guided_RV, positions, base_RV=base_RV)
        if drafting.covers_all:
            tokens_R = torch.zeros(len(contexts), dtype=torch.long, device=batch.device)
        else:
            numbers_R = batch.numbers(tape, range(len(contexts)), positions, Purpose.SAMPLE)
            tokens_R = batch.sampling.draw(target_RV, numbers_R)
        if said is not None:
            tokens_R = drafting.couple(tokens_R, target_RV, said, tape, positions)
        readings = read(base_RV, guided_RV, tokens_R, done, batch.tops)
        self._pace.stop()
        return self._emit(batch, readings, said)

    def _plan(self) -> tuple[Batch, Drafting]:
        """Return the batch of the running rows, with as many drafts as pay."""
        running = self._scheduler.running
        if self._tape is None:
            self._tape = Tape([one.noise_key for one in running])
        num_drafts = tuple(self._pace.choose(running))
        if num_drafts not in self._batches:
            batch = Batch(running, num_drafts, self.base.device)
            self._batches[num_drafts] = batch, Drafting(batch, self.drafters)
        return self._batches[num_drafts]

    def _emit(
        self, batch: Batch, readings: Sequence[Reading], said: Proposals | None
    ) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        ended, row = [], 0
        for place, (one, num_drafts) in enumerate(
            zip(batch.running, batch.num_drafts, strict=True)
        ):
            own = readings[row : row + num_drafts + 1]
            row += num_drafts + 1
            heard = said.heard.get(place) if said is not None else None
            if heard is None:
                events.append(_advance(one, own[0]))
            else:
                events += self._advance_drafted(one, own, heard)
            if events[-1].finish_reason is not None:
                ended.append(place)
        if said is not None:
            self.draft_stats.speed_up = self._pace.speed_up
        for place in reversed(ended):
            self._release(self._scheduler.remove(place))
        if ended:
            self._forget_rows()
        return events

    def _advance_drafted(
        self, one: Running, readings: Sequence[Reading], heard: Sequence[int]
    ) -> list[TokenEvent]:
        """Append a sequence's tokens up to the first one that its drafter did not say in time."""
        events: list[TokenEvent] = []
        for reading, word in zip(readings, heard, strict=True):
            kept = reading.token_id == word
            drafted = kept and len(events) < len(readings) - 1
            events.append(_advance(one, reading, drafted=drafted))
            one.note_draft(kept)
            if not drafted or events[-1].finish_reason is not None:
                break
        stats = self.draft_stats
        stats.num_rounds += 1
        stats.num_drafted += len(readings) - 1
        stats.num_accepted += sum(event.drafted for event in events)
        stats.num_tokens += len(events)
        return events

    def _apply_marks(self) -> None:
        if not self._cancelled and not self._given_up:
            return
        for one in self._scheduler.drop(self._cancelled):
            self._release(one)
        for key, guide in self._given_up:
            one = self._scheduler.find(key)
            if one is not None and guide in dict(one.guides):
                one.give_up(guide)
                self.guides[guide].release([key])
        self._cancelled.clear()
        self._given_up.clear()
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._batches, self._tape = {}, None

    def _release(self, one: Running) -> None:
        keys = [one.request.key]
        self.base.release(keys)
        for name, _ in one.guides:
            self.guides[name].release(keys)
        if one.request.draft is not None:
            self.drafters[one.request.draft.drafter].release(keys)


def _advance(one: Running, reading: Reading, *, drafted: bool = False) -> TokenEvent:
    """Append the token that was read."""
    index = one.num_completed
    return TokenEvent(
        key=one.request.key,
        index=index,
        token_id=reading.token_id,
        logprob=reading.logprob,
        base_logprob=reading.base_logprob,
        kl=reading.kl,
        finish_reason=one.append(reading.token_id),
        moved_by=reading.moved_by,
        drafted=drafted,
        notes=reading.notes,
        top=reading.top,
    )
