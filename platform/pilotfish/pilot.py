"""Pilot: the whole decoder in one object, for scripts and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from pilotfish.answering import Answering, Task
from pilotfish.chain import Chain, make_chain
from pilotfish.chat import PromptInput, render_prompt, stop_ids
from pilotfish.context import Prompt
from pilotfish.decode.driver import Driver
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Completion, Drafting, SamplingParams
from pilotfish.decode.writer import Writer
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides import (
    GUIDES,
    check_guide,
    load_guide,
    make_card,
    variant_name,
    vary_card,
    vary_guide,
)
from pilotfish.guides.base import Guide, Stage, Staged, TokenGuide
from pilotfish.guides.card import GuideCard, WeightUnits, resolve_weights
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import Dtype, load_frozen, load_tokenizer, pick_device
from pilotfish.models.vocab import fingerprint

Source: TypeAlias = str | Path | Mapping[str, Any] | Guide
"""Where a guide comes from: its folder, the fields of a card over models that lie elsewhere, or a
guide made in Python."""


class Pilot:
    """A frozen base and its guides, loaded from folders or hub ids.

    >>> pilot = Pilot("runs/kitchen/base", guides={"helpful": "runs/kitchen/genarm"})
    >>> pilot.generate(["..."], SamplingParams(seed=1), guides={"helpful": 1.0})
    """

    def __init__(
        self,
        base: str | Path,
        guides: Mapping[str, Source] | None = None,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        num_slots: int = 32,
    ) -> None:
        """Load everything; `num_slots` requests decode at a time.

        A guide is a folder; a mapping such as `{"kind": "args", "settings": {"reward": FOLDER}}`;
        or was made in Python: `BestOfN(scorer)` with a scorer of one's own, say. Raises
        `CheckpointError` for a folder that cannot be loaded, `VocabMismatchError` for a token guide
        trained for another vocabulary, and `ConfigError` for guides that cannot act together, in
        this order and at the weights of their cards.
        """
        sources = dict(guides or {})
        where = pick_device(device)
        self.tokenizer = load_tokenizer(base)
        self.cards = self._read_cards(base, sources)
        self._kinds = {name: self._kind(name, source) for name, source in sources.items()}
        self._default = self._default_chain()
        model = load_frozen(base, device=where, dtype=dtype)
        self._host = GuideHost(
            base=CausalLM(model, vocab_size=len(self.tokenizer), num_slots=num_slots),
            tokenizer=self.tokenizer,
            name=str(base),
            end_ids=stop_ids(self.tokenizer, model.generation_config),
            num_slots=num_slots,
            device=where,
            dtype=dtype,
            open_text_model=Writer,
        )
        self._guides = {name: self._load(name, source) for name, source in sources.items()}
        self.engine = self._open_engine(self._guides)
        self._answering = Answering(Driver(self.engine, self.tokenizer), self._guides)

    @property
    def num_forwards(self) -> int:
        """Forwards over one token so far, of the base and all models loaded for guides.

        A reward model counts one per draft that it reads, an Aligner one per token it writes.
        """
        return sum(lm.num_forwards for lm in (self.engine.base, *self._host.lms))

    def generate(
        self,
        prompts: Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
        guides: Mapping[str, float] | None = None,
        *,
        draft: Drafting | None = None,
        weight_units: WeightUnits = "logprob",
        progress: bool = False,
    ) -> list[Completion]:
        """Complete each prompt: messages go through the chat template, text is taken as it is.

        `guides` maps names to weights in the order in which they act: token guides tilt, then one
        guide may select among drafts, then others revise what was selected. `{}` is the base alone,
        and None is every loaded guide at the weight of its card. `weight_units` says what weights
        multiply: see `resolve_weight`. With `draft` a small LM proposes tokens: same law, fewer
        steps. Raises `PromptError` before any work if one of the prompts cannot be decoded.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is a string, wanted a list of prompts: [prompt].")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} sampling parameters for {len(prompts)} prompts.")
        chain = self._chain(guides, weight_units)
        self._open_drafter(draft)
        tasks = [self._task(prompt, own, draft) for prompt, own in zip(prompts, each, strict=True)]
        self._answering.check(tasks, chain)
        return self._answering.answer(tasks, chain, progress=progress)

    def stream(
        self,
        prompt: PromptInput,
        params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        guides: Mapping[str, float] | None = None,
        *,
        draft: Drafting | None = None,
        weight_units: WeightUnits = "logprob",
    ) -> Iterator[str]:
        """Return the pieces of the text that `generate` gives one prompt, as they are decoded.

        Where drafts are selected, the chosen one comes at once (block by block, if it is chosen
        so); where one is revised, what comes is the last revision. A stream that is not read to its
        end is given up when it is closed. Raises `PromptError` before any work.
        """
        chain = self._chain(guides, weight_units)
        self._open_drafter(draft)
        task = self._task(prompt, params, draft)
        self._answering.check([task], chain)
        return self._answering.stream(task, chain)

    def vary(self, guide: str, **settings: Any) -> str:
        """Return the name under which a loaded guide acts with other decode-time settings.

        >>> careful = pilot.vary("proxy", p_t=0.9)
        >>> pilot.generate(["..."], guides={careful: 1.0})

        The models are shared. `settings` are fields of the guide's card; `gate` too, where it tilts
        tokens. Raises `ConfigError` for those that cannot change so, and for bad values.
        """
        if guide not in self.cards:
            known = ", ".join(self.cards) or "none"
            raise ConfigError(
                f"no guide named {guide!r} has a card to vary; loaded with one: {known}."
            )
        card = vary_card(self.cards[guide], settings)
        name = variant_name(guide, settings)
        if name not in self._guides:
            varied = vary_guide(self._guides[guide], self.cards[guide], settings)
            self.cards[name], self._kinds[name] = card, self._kinds[guide]
            self._guides[name] = varied
            if self._kinds[name].stage is Stage.TOKEN:
                self.engine.guides[name] = cast(TokenGuide, varied)
        return name

    def _read_cards(self, base: str | Path, sources: Mapping[str, Source]) -> dict[str, GuideCard]:
        cards, where = {}, {"base": str(base), "base_vocab": fingerprint(self.tokenizer)}
        for name, source in sources.items():
            if isinstance(source, str | Path):
                cards[name] = check_guide(source, **where)
            elif isinstance(source, Mapping):
                cards[name] = make_card(source, **where)
        return cards

    def _kind(self, name: str, source: Source) -> Staged | type[Staged]:
        if name in self.cards:
            return GUIDES[self.cards[name].kind]
        if not isinstance(source, Staged):
            raise ConfigError(
                f"guide {name!r} is a {type(source).__name__}, wanted a folder, a mapping with "
                "its `kind`, or a guide with `stage` and `takes_weight`."
            )
        return source

    def _load(self, name: str, source: Source) -> Guide:
        if name not in self.cards:
            return cast(Guide, source)
        folder = source if isinstance(source, str | Path) else "."
        return load_guide(folder, self.cards[name], self._host)

    def _open_drafter(self, draft: Drafting | None) -> None:
        """Load a model that drafts when it is first named."""
        if draft is not None and draft.model and draft.model not in self.engine.drafters:
            self.engine.drafters[draft.model] = self._host.load_lm(draft.model)

    def _open_engine(self, guides: Mapping[str, Guide]) -> Engine:
        tilting = [name for name, kind in self._kinds.items() if kind.stage is Stage.TOKEN]
        base = self._host.base
        return Engine(
            base,
            {name: cast(TokenGuide, guides[name]) for name in tilting},
            drafters={
                name: guide.source
                for name, guide in guides.items()
                if isinstance(guide, GenARMGuide) and isinstance(guide.source, CausalLM)
            },
            end_ids=self._host.end_ids,
            tokenizer=self.tokenizer,
        )

    def _task(self, prompt: PromptInput, params: SamplingParams, draft: Drafting | None) -> Task:
        token_ids = render_prompt(self.tokenizer, prompt)
        text = prompt if isinstance(prompt, str) else None
        messages = None if isinstance(prompt, str) else tuple(prompt)
        return Task(Prompt(token_ids, messages, text), params, draft)

    def _chain(self, guides: Mapping[str, float] | None, units: WeightUnits) -> Chain:
        if guides is None and units == "logprob":
            return self._default
        return make_chain(resolve_weights(self.cards, guides, units), self._kinds)

    def _default_chain(self) -> Chain:
        weights = {
            name: self.cards[name].weight if name in self.cards else 1.0 for name in self._kinds
        }
        try:
            return make_chain(weights, self._kinds)
        except PromptError as error:
            raise ConfigError(
                "these guides cannot act together, in the order they are given and at the weights "
                f"of their cards: {error}"
            ) from error
