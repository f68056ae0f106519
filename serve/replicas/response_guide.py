"""`ResponseGuide:<name>`: replicas that decode one guide which rewrites answers.

Its LM has a vocabulary of its own and no guides. What it is asked is a completion like any other,
so it runs the base's decode loop, and a stream that breaks goes on at another replica the same way.
"""

import functools
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import torch
from torch import Tensor

from pilotfish.context import Context, Prompt
from pilotfish.decode.engine import Engine
from pilotfish.guides.host import load_writer
from pilotfish.models.loading import pick_device
from serve.catalog import Catalog, GuideVersion
from serve.config import ServeConfig
from serve.errors import GuideUnavailableError
from serve.replicas.apart import leave
from serve.replicas.decoding import OFF, Decoding, check_law
from serve.replicas.following import Stock, versions_of
from serve.replicas.shelf import Shelf
from serve.wire import GenerateRequest

_SUMS = (
    "num_open",
    "num_steps",
    "num_running",
    "num_waiting",
    "num_preempted",
    "step_seconds",
    "num_rounds",
    "num_drafted",
    "num_accepted",
)
"""Of the stats of several decode loops."""


class ResponseGuide:
    """One decode loop per version of the guide."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        catalog: Catalog,
        *,
        control: Callable[[], Any] | None = None,
        leave: Callable[[], None] = leave,
    ) -> None:
        """`control` and `leave` are as in `BaseModel`."""
        self._guide = config.guide(name)
        torch.set_num_threads(self._guide.threads)
        self._num_slots = config.guide_slots(self._guide)
        self._open = functools.partial(
            Decoding,
            stall_s=config.base.stall_s,
            items_per_second=config.items_per_second,
            leave=leave,
        )
        self._shelf: Shelf[Decoding] = Shelf(self._load, lambda _, decoding: decoding.close())
        self._off = False
        """Whether the guide is switched off."""
        self._stock = Stock(self._shelf, catalog, versions_of(name), control, self._withdraw)

    async def generate(
        self, request: GenerateRequest, version: GuideVersion
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """Yield a completion of ids in the guide's own vocabulary: see `Decoding.generate`.

        Raises `GuideUnavailableError` when the guide is switched off.
        """
        if self._off:
            raise GuideUnavailableError(version.name, OFF)
        async with (
            self._shelf.lease(version) as decoding,
            aclosing(decoding.generate(request, {})) as stream,
        ):
            async for batch in stream:
                yield batch

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served, and try it.

        Raises what loading it raises, and `CheckpointError` for one that answers nonsense.
        """
        await self._stock.prepare(version)
        async with self._shelf.lease(version) as decoding:
            law_RV = await decoding.ask(functools.partial(_probe, decoding.engine))
        check_law(law_RV, version.key)

    async def stats(self) -> dict[str, Any]:
        """Return `Decoding.stats` of all versions together, and the versions that are loaded."""
        return {**self._stats(), "guides": sorted(version.key for version in self._shelf.loaded)}

    async def check_health(self) -> None:
        """Raise `EngineError` unless decoding makes progress; Serve then replaces the replica."""
        await self._stock.ensure()
        for decoding in self._shelf.loaded.values():
            decoding.thread.check()

    def _stats(self) -> dict[str, Any]:
        every = [decoding.stats() for decoding in self._shelf.loaded.values()]
        total = {name: sum(stats[name] for stats in every) for name in _SUMS}
        shares = [stats["cache_share"] for stats in every]
        return {
            **total,
            "pid": os.getpid(),
            "cache_share": max(shares, default=0.0),
            "guide_seconds": {},
        }

    def close(self) -> None:
        """Stop all decode loops; open streams get nothing more."""
        for decoding in self._shelf.loaded.values():
            decoding.close()

    def _withdraw(self, catalog: Catalog) -> None:
        """End all requests if the guide is switched off."""
        entry = catalog.guide(self._guide.name)
        self._off = entry is not None and not entry.enabled
        if self._off:
            for decoding in self._shelf.loaded.values():
                decoding.thread.end_all(GuideUnavailableError(self._guide.name, OFF))

    def _load(self, version: GuideVersion) -> Decoding:
        folder = version.artifact.load(version.version)
        device = pick_device(self._guide.device)
        lm, tokenizer, end_ids = load_writer(
            folder, device=device, dtype=self._guide.dtype, num_slots=self._num_slots
        )
        engine = Engine(lm, end_ids=end_ids, tokenizer=tokenizer)
        return self._open(engine)


def _probe(engine: Engine) -> Tensor:
    """Return the law behind some tokens from all over the vocabulary."""
    size = engine.base.vocab_size
    ids = list(range(0, size, max(1, size // 16)))
    return engine.law([Context(-1, Prompt(ids), ids)], {})
