"""The decode loop: continuous batching of one base, any guides, and drafts they check together.

Shapes: R rows (a running request at a position), V vocabulary.

Requests join and leave at every step and share one base batch, whatever their guides, weights and
sampling parameters. The loop knows token ids only; text enters where stop strings were asked for.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.context import Context
from pilotfish.decode import tilting
from pilotfish.decode.batch import Batch
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.drafting import Drafting, Proposals
from pilotfish.decode.pace import Pace
from pilotfish.decode.running import Running
from pilotfish.decode.scheduler import Scheduler
from pilotfish.decode.sequence import Request, TokenEvent
from pilotfish.decode.tape import Tape
from pilotfish.decode.telemetry import Reading, read
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import ChecksPrompts, TokenGuide, max_length_of
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


class Engine:
    """Decodes requests under the guided law, at least one token per running request and step.

    Not thread-safe: one thread owns it. `submit` and `cancel` only mark; `step` does the work. A
    step that raises has drawn no token.
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
    ) -> None:
        """`end_ids` end every completion; `prefill_budget` bounds the prompt tokens per step."""
        self.base = base
        self.guides = dict(guides or {})
        self.drafters = dict(drafters or {})
        self.draft_stats = DraftStats()
        self._end_ids = end_ids
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(base, prefill_budget=prefill_budget)
        self._pace = Pace()
        self._cancelled: set[int] = set()
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

    def check(self, request: Request) -> None:
        """Raise `PromptError` if a request can never be decoded here."""
        unknown = [name for name in request.guides if name not in self.guides]
        if unknown:
            known = ", ".join(self.guides) or "none"
            raise PromptError(f"no guide named {unknown[0]!r} is loaded; loaded: {known}.")
        if request.draft is not None and request.draft.drafter not in self.drafters:
            known = ", ".join(self.drafters) or "none"
            raise PromptError(
                f"nothing named {request.draft.drafter!r} can draft here; drafters: {known}."
            )
        self._check_length(request)
        size = self.base.vocab_size
        strange = next((i for i in request.prompt.token_ids if not 0 <= i < size), None)
        if strange is not None:
            raise PromptError(f"prompt token id {strange} is outside the vocabulary of {size}.")
        if request.params.stop and self._tokenizer is None:
            raise ConfigError("stop strings need a tokenizer. Build the engine with one.")
        for name, weight in request.guides.items():
            guide = self.guides[name]
            if weight != 0 and isinstance(guide, ChecksPrompts):
                guide.check_prompt(request.prompt)

    def _check_length(self, request: Request) -> None:
        num_prompt, num_new = len(request.prompt.token_ids), request.params.max_tokens
        if num_prompt == 0:
            raise PromptError("the prompt has no tokens. Give at least one.")
        readers: dict[str, object] = {"the model": self.base}
        for name, weight in request.guides.items():
            if weight != 0:
                readers[f"guide {name!r}"] = self.guides[name]
        if request.draft is not None:
            readers["the drafter"] = self.drafters[request.draft.drafter]
        for name, reader in readers.items():
            if num_prompt + num_new > (limit := max_length_of(reader)):
                raise PromptError(
                    f"prompt of {num_prompt} tokens plus max_tokens={num_new} is more than the "
                    f"{limit} positions of {name}. Shorten one of them."
                )

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptError` if it can never be decoded."""
        self.check(request)
        params = request.params
        text = None
        if params.stop:
            assert self._tokenizer is not None
            text = TextStream(self._tokenizer, params.stop)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._num_submitted += 1
        running = Running(
            request, seed=seed, end_ids=self._end_ids, text=text, arrival=self._num_submitted
        )
        self._scheduler.submit(running)

    def cancel(self, key: int) -> None:
        """Drop a request before the next token; unknown keys are ignored."""
        self._cancelled.add(key)

    def remove_guide(self, name: str) -> None:
        """Forget a guide, or a drafter, that no request uses any more."""
        self._drop_cancelled()
        self.guides.pop(name, None)
        self.drafters.pop(name, None)

    @torch.inference_mode()
    def law(self, contexts: Sequence[Context], guides: Mapping[str, float]) -> Tensor:
        """Return the guided law [R, V] of contexts that are not decoded here."""
        tilts = [
            tilting.Tilt(name, [(row, weight) for row in range(len(contexts))], len(contexts))
            for name, weight in guides.items()
        ]
        begun = tilting.begin(self.guides, [tilt.to(self.base.device) for tilt in tilts], contexts)
        law = self.base.forward(contexts)
        guided_RV, _ = tilting.apply(self.guides, begun, law.logprobs_RV, law.hidden_RD)
        keys = [context.key for context in contexts]
        self.base.release(keys)
        for name in guides:
            self.guides[name].release(keys)
        return guided_RV

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance every running request; return the tokens drawn."""
        self._drop_cancelled()
        if self._scheduler.schedule():
            self._forget_rows()
        if not self._scheduler.running:
            return []
        batch, drafting = self._plan()
        tape = self._tape
        assert tape is not None
        self._pace.start()
        positions = batch.positions()
        said = drafting.propose(tape, positions) if drafting else None
        contexts = batch.contexts(said.chains if said is not None else {})
        begun = tilting.begin(self.guides, batch.tilts, contexts)
        law = self.base.forward(contexts)
        guided_RV, done = tilting.apply(self.guides, begun, law.logprobs_RV, law.hidden_RD)
        if drafting.covers_all:
            tokens_R = torch.zeros(len(contexts), dtype=torch.long, device=batch.device)
        else:
            numbers_R = batch.numbers(tape, range(len(contexts)), positions, Purpose.SAMPLE)
            tokens_R = batch.sampling.draw(guided_RV, numbers_R)
        if said is not None:
            tokens_R = drafting.couple(tokens_R, guided_RV, said, tape, positions)
        readings = read(law.logprobs_RV, guided_RV, tokens_R, done)
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

    def _drop_cancelled(self) -> None:
        if self._cancelled:
            for one in self._scheduler.drop(self._cancelled):
                self._release(one)
            self._cancelled.clear()
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
    )
