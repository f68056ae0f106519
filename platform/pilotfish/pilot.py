"""Pilot: the whole decoder in one object, for scripts and notebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tqdm import tqdm

from pilotfish.chat import Message, render_prompt, stop_ids
from pilotfish.context import Prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import (
    Completion,
    Request,
    SamplingParams,
    TokenEvent,
)
from pilotfish.errors import ConfigError
from pilotfish.guides import check_guide, load_guide
from pilotfish.guides.base import TokenGuide
from pilotfish.guides.card import WeightUnits, resolve_weights
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import Dtype, load_frozen, load_tokenizer, pick_device
from pilotfish.models.vocab import fingerprint


class Pilot:
    """A frozen base and its guides, loaded from folders or hub ids.

    >>> pilot = Pilot("runs/kitchen/base", guides={"helpful": "runs/kitchen/genarm"})
    >>> pilot.generate(["..."], SamplingParams(seed=1), guides={"helpful": 1.0})
    """

    def __init__(
        self,
        base: str | Path,
        guides: Mapping[str, str | Path] | None = None,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        num_slots: int = 32,
    ) -> None:
        """Load everything; `num_slots` requests decode at a time.

        Raises `CheckpointError` for a folder that cannot be loaded and `VocabMismatchError` for a
        guide trained for another vocabulary.
        """
        where = pick_device(device)
        self.tokenizer = load_tokenizer(base)
        vocab, vocab_size = fingerprint(self.tokenizer), len(self.tokenizer)
        self.cards = {
            name: check_guide(folder, base=str(base), base_vocab=vocab)
            for name, folder in (guides or {}).items()
        }
        model = load_frozen(base, device=where, dtype=dtype)
        base_lm = CausalLM(model, vocab_size=vocab_size, num_slots=num_slots)
        end_ids = stop_ids(self.tokenizer, model.generation_config)
        self._host = GuideHost(
            base=base_lm,
            tokenizer=self.tokenizer,
            name=str(base),
            end_ids=end_ids,
            num_slots=num_slots,
            device=where,
            dtype=dtype,
        )
        loaded = {
            name: load_guide(folder, self.cards[name], self._host)
            for name, folder in (guides or {}).items()
        }
        self.engine = Engine(
            base_lm,
            cast("dict[str, TokenGuide]", loaded),
            end_ids=end_ids,
            tokenizer=self.tokenizer,
        )
        self._num_requests = 0

    @property
    def num_forwards(self) -> int:
        """Forwards over one token so far, of the base and all guides."""
        return sum(lm.num_forwards for lm in (self.engine.base, *self._host.lms))

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
        guides: Mapping[str, float] | None = None,
        *,
        weight_units: WeightUnits = "logprob",
        progress: bool = False,
    ) -> list[Completion]:
        """Complete each prompt: messages go through the chat template, text is taken as it is.

        `guides` maps names to weights in the order of tilting; `{}` is the base alone, and None is
        every loaded guide at the weight of its card. `weight_units` says what they multiply: see
        `resolve_weight`. Raises `PromptError` before any work if one of the prompts cannot be
        decoded.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is a string, wanted a list of prompts: [prompt].")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} sampling parameters for {len(prompts)} prompts.")
        guides = resolve_weights(self.cards, guides, weight_units)
        drafts = [
            _Draft(self._request(prompt, own, guides), TextStream(self.tokenizer, own.stop))
            for prompt, own in zip(prompts, each, strict=True)
        ]
        for draft in drafts:
            self.engine.check(draft.request)
        self._decode({draft.request.key: draft for draft in drafts}, progress=progress)
        return [draft.completion() for draft in drafts]

    def _request(
        self, prompt: str | Sequence[Message], params: SamplingParams, guides: Mapping[str, float]
    ) -> Request:
        token_ids = render_prompt(self.tokenizer, prompt)
        text = prompt if isinstance(prompt, str) else None
        messages = None if isinstance(prompt, str) else tuple(prompt)
        self._num_requests += 1
        return Request(
            key=self._num_requests,
            prompt=Prompt(token_ids, messages, text),
            params=params,
            guides=dict(guides),
        )

    def _decode(self, drafts: "dict[int, _Draft]", *, progress: bool) -> None:
        for draft in drafts.values():
            self.engine.submit(draft.request)
        try:
            with tqdm(total=len(drafts), unit="answer", disable=not progress) as bar:
                while self.engine.busy:
                    for event in self.engine.step():
                        drafts[event.key].take(event)
                        bar.update(event.finish_reason is not None)
        except BaseException:
            for key in drafts:  # an interrupt leaves no request behind for the next call
                self.engine.cancel(key)
            raise


@dataclass(slots=True)
class _Draft:
    """A completion while it grows."""

    request: Request
    text: TextStream
    events: list[TokenEvent] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.text.push(event.token_id)

    def completion(self) -> Completion:
        self.text.flush()
        reason = self.events[-1].finish_reason
        assert reason is not None
        return Completion(
            text=self.text.text,
            token_ids=[event.token_id for event in self.events],
            logprobs=[event.logprob for event in self.events],
            base_logprobs=[event.base_logprob for event in self.events],
            kl=[event.kl for event in self.events],
            finish_reason=reason,
        )
