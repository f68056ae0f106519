"""`BaseModel`: a replica that owns the base, its colocated guides, and the decode loop."""

import functools
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from pilotfish.chat import Message, render_prompt, stop_ids
from pilotfish.context import Context, Prompt
from pilotfish.decode.engine import Engine
from pilotfish.guides import load_guide, scorer_of, variant_name, vary_guide
from pilotfish.guides.base import Draft, Guide, Selector, Stage, TokenGuide
from pilotfish.guides.card import GuideCard, read_card
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_tokenizer, pick_device
from serve.catalog import Catalog, GuideVersion
from serve.config import ServeConfig
from serve.errors import GuideUnavailableError
from serve.replicas.apart import leave
from serve.replicas.decoding import OFF, Decoding, check_law
from serve.replicas.following import Stock
from serve.replicas.remote_guide import Attend, RemoteLM
from serve.replicas.shelf import Shelf
from serve.wire import GenerateRequest, GuideUse


@dataclass(slots=True)
class _Loaded:
    """A version of a guide, and the requests that use it with settings of their own."""

    guide: Guide
    card: GuideCard
    remote: RemoteLM | None
    varied: dict[str, "_Acting"] = field(default_factory=dict)


@dataclass(slots=True)
class _Acting:
    """A guide of requests: as its card has it, or with settings of their own."""

    key: str
    """What the engine calls it. No other variant, before or after, is called so: what is removed
    from the engine is gone only after its running step, when the same settings may be back."""
    guide: Guide
    num_requests: int = 0


class BaseModel:
    """Decodes requests under base and guides. Guides come and go while it runs."""

    def __init__(
        self,
        config: ServeConfig,
        catalog: Catalog,
        remote: Mapping[str, Attend],
        *,
        control: Callable[[], Any] | None = None,
        leave: Callable[[], None] = leave,
    ) -> None:
        """Load everything. `remote` says how to find replicas, for guides that have their own.

        `control` returns the handle of `Guides`, which tells of other versions; without one there
        are those of `catalog`. `leave` is called soon after the decode loop died.
        """
        torch.set_num_threads(config.base.threads)
        self._config, self._remote = config, remote
        self._variants = itertools.count()
        folder = catalog.base.artifact.load(catalog.base.version)
        tokenizer = load_tokenizer(folder)
        device = pick_device(config.base.device)
        model = load_frozen(folder, device=device, dtype=config.base.dtype)
        base = CausalLM(model, vocab_size=catalog.base.vocab_size, num_slots=config.base.num_slots)
        self._host = GuideHost(
            base=base,
            tokenizer=tokenizer,
            name=config.base.path,
            end_ids=stop_ids(tokenizer, model.generation_config),
            num_slots=config.base.num_slots,
            device=device,
        )
        engine = Engine(base, end_ids=self._host.end_ids, tokenizer=tokenizer)
        self._decoding = Decoding(
            engine,
            stall_s=config.base.stall_s,
            items_per_second=config.items_per_second,
            leave=leave,
        )
        self._shelf = Shelf(self._load, self._drop)
        self._off: frozenset[str] = frozenset()
        """Names of guides that are switched off."""
        self._stock = Stock(self._shelf, catalog, _versions, control, self._withdraw)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Any, ...]]:
        """Yield a completion: see `Decoding.generate`.

        Raises `ConfigError` for settings that a guide cannot take, besides.
        """
        # The ingress that sent it may not have heard yet of a guide that is switched off.
        gave_up: list[str] = []
        if off := [use for use in _acting(request) if use.version.name in self._off]:
            gave_up = [use.version.name for use in off]
            if any(use.on_failure == "fail" for use in off):
                raise GuideUnavailableError(gave_up[0], OFF)
            request = GenerateRequest(**{**request, "gave_up": [*request["gave_up"], *gave_up]})
        async with AsyncExitStack() as stack:
            keys = {
                use.version.name: (await stack.enter_async_context(self._acting(use))).key
                for use in _acting(request)
            }
            stream = self._decoding.generate(request, keys, gave_up=gave_up)
            async with aclosing(stream):
                async for batch in stream:
                    yield batch

    async def choose(
        self, use: GuideUse, prompt: Prompt, drafts: Sequence[Draft], uniform: float
    ) -> int:
        """Return the place of the draft that a selecting guide goes on with: `Selector.choose`.

        Raises `GuideUnavailableError` when the guide is switched off.
        """
        if use.version.name in self._off:
            raise GuideUnavailableError(use.version.name, OFF)
        async with self._acting(use) as acting:
            selector = cast("Selector", acting.guide)
            return await self._decoding.ask(lambda: selector.choose(prompt, drafts, uniform))

    async def rewards(
        self, uses: Sequence[GuideUse], prompt: Prompt, answers: Sequence[Draft]
    ) -> dict[str, list[float]]:
        """Return what each guide that has a reward or value model finds the answers worth.

        Raises `PromptError` for an answer that is longer than such a model reads.
        """
        found = {}
        for use in uses:
            async with self._acting(use) as acting:
                scorer = scorer_of(acting.guide)
                if scorer is not None:
                    score = functools.partial(scorer.score, prompt, answers)
                    found[use.version.name] = list(await self._decoding.ask(score))
        return found

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served, and try it.

        Raises what loading it raises, and `CheckpointError` for one that answers nonsense.
        """
        await self._stock.prepare(version)
        if version.stage is Stage.TOKEN:
            await self._decoding.ask(lambda: self._probe(version))

    async def stats(self) -> dict[str, Any]:
        """Return `Decoding.stats`, and the guides that are loaded."""
        loaded = sorted(version.key for version in self._shelf.loaded)
        return {**self._decoding.stats(), "guides": loaded}

    async def check_health(self) -> None:
        """Raise `EngineError` unless decoding makes progress; Serve then replaces the replica."""
        await self._stock.ensure()
        self._decoding.thread.check()

    def close(self) -> None:
        """Stop the decode loop; open streams get nothing more."""
        self._decoding.close()

    @asynccontextmanager
    async def _acting(self, use: GuideUse) -> AsyncIterator[_Acting]:
        """Have a guide loaded while the block runs, and in the engine if it tilts."""
        async with self._shelf.lease(use.version) as loaded:
            if not use.args:
                yield _Acting(use.version.key, loaded.guide)
                return
            name = variant_name(use.version.key, use.args)
            if name not in loaded.varied:
                guide = vary_guide(loaded.guide, loaded.card, use.args)
                loaded.varied[name] = _Acting(f"{name}#{next(self._variants)}", guide)
                self._add(loaded.varied[name].key, guide, use.version.stage)
            variant = loaded.varied[name]
            variant.num_requests += 1
            try:
                yield variant
            finally:
                variant.num_requests -= 1
                if not variant.num_requests:
                    del loaded.varied[name]
                    self._remove(variant.key, use.version.stage)

    def _load(self, version: GuideVersion) -> _Loaded:
        folder = version.artifact.load(version.version)
        config = self._config.guide(version.name)
        remote = None
        if (attend := self._remote.get(version.name)) is not None:
            size, device = self._host.base.vocab_size, self._host.device
            remote = RemoteLM(attend, config, version, vocab_size=size, device=device)
        host = self._host.for_guide(
            num_slots=self._config.guide_slots(config), dtype=config.dtype, remote=remote
        )
        card = read_card(folder)
        loaded = _Loaded(load_guide(folder, card, host), card, remote)
        self._add(version.key, loaded.guide, version.stage)
        return loaded

    def _drop(self, version: GuideVersion, loaded: _Loaded) -> None:
        self._remove(version.key, version.stage)
        if loaded.remote is not None:
            self._decoding.thread.call(loaded.remote.close)

    def _add(self, key: str, guide: Guide, stage: Stage) -> None:
        if stage is not Stage.TOKEN:
            return
        engine = self._decoding.engine
        engine.guides[key] = cast("TokenGuide", guide)
        if isinstance(guide, GenARMGuide) and isinstance(guide.source, CausalLM):
            engine.drafters[key] = guide.source

    def _remove(self, key: str, stage: Stage) -> None:
        if stage is not Stage.TOKEN:
            return
        engine = self._decoding.engine
        guide = engine.guides[key]

        def remove() -> None:
            if engine.guides.get(key) is guide:  # and not one that was loaded again meanwhile
                engine.remove_guide(key)

        # On the engine's own thread, behind whatever was asked of it before.
        self._decoding.thread.call(remove)

    def _probe(self, version: GuideVersion) -> None:
        """Raise `CheckpointError` unless the guide gives a law behind a short prompt."""
        messages = (Message(role="user", content="Hello."),)
        ids = render_prompt(self._host.tokenizer, list(messages))
        context = Context(-1, Prompt(ids, messages), ids)
        law_RV = self._decoding.engine.law([context], {version.key: version.weight or 1.0})
        check_law(law_RV, version.key)

    def _withdraw(self, catalog: Catalog) -> None:
        """End or free the requests of guides that are switched off."""
        self._off = frozenset(entry.name for entry in catalog.guides if not entry.enabled)
        for name in self._off:
            self._decoding.thread.withdraw(name, OFF)


def _versions(catalog: Catalog) -> list[GuideVersion]:
    """Return what a base replica has of the catalog's guides."""
    every = [version for entry in catalog.guides for version in entry.versions]
    return [version for version in every if version.stage is not Stage.REVISION]


def _acting(request: GenerateRequest) -> list[GuideUse]:
    """Return the uses of guides that tilt or draft; one that was given up may still draft."""
    drafter = request["draft"] and request["draft"]["guide"]
    return [
        use
        for use in request["guides"]
        if use.version.name == drafter
        or (use.weight != 0 and use.version.name not in request["gave_up"])
    ]
