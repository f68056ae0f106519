"""`Guide:<name>`: replicas that answer for one guide LM, in every version that is served."""

import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pilotfish.context import Context, Prompt
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, pick_device
from pilotfish.models.rows import prefix
from serve.catalog import Catalog, GuideVersion
from serve.config import GuideConfig
from serve.replicas.following import Stock, versions_of
from serve.replicas.guide_desk import Desk
from serve.replicas.guide_line import Address, Question
from serve.replicas.shelf import Shelf


class GuideModel:
    """A guide LM behind calls. Its caches are found by key and prefix, so any replica can answer
    any call: the first one about a sequence is a slower step, nothing else."""

    def __init__(
        self,
        guide: GuideConfig,
        catalog: Catalog,
        *,
        num_slots: int,
        host: Callable[[], str],
        control: Callable[[], Any] | None = None,
    ) -> None:
        """`host` returns the address at which base replicas find this machine; `control` is as in
        `BaseModel`."""
        torch.set_num_threads(guide.threads)
        self._guide = guide
        self._vocab_size, self._num_slots = catalog.base.vocab_size, num_slots
        self._shelf = Shelf(self._load, lambda _version, _lm: None)
        self._stock = Stock(self._shelf, catalog, versions_of(guide.name), control)
        self._desk = Desk(host())
        # A forward moves rows of the cache about.
        self._one_at_a_time = threading.Lock()

    async def attend(self, version: GuideVersion, ticket: str) -> AsyncGenerator[Address]:
        """Yield where a caller with the ticket is answered; lasts until it has gone.

        So the calls of a replica are those who use it, which is what autoscaling counts. What it
        says about a sequence is a pure function of the ids.
        """
        async with self._shelf.lease(version) as lm:
            texts: dict[int, list[int]] = {}
            visit = self._desk.expect(ticket, lambda *asked: self._answer(lm, texts, *asked))
            try:
                yield self._desk.address
                await visit.over()
            finally:
                self._desk.forget(ticket)
                visit.close()

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served. Raises what loading it raises."""
        await self._stock.prepare(version)

    async def stats(self) -> dict[str, Any]:
        """Return the process id and what is loaded."""
        return {"pid": os.getpid(), "guides": sorted(v.key for v in self._shelf.loaded)}

    async def check_health(self) -> None:
        """Fail only if nothing could be loaded; Serve's calls begin to follow the catalog."""
        await self._stock.ensure()

    def close(self) -> None:
        """Let nobody in any more."""
        self._desk.close()

    def _answer(
        self,
        lm: CausalLM,
        texts: dict[int, list[int]],
        caller: int,
        questions: Sequence[Question],
        released: Sequence[int],
    ) -> NDArray[np.floating]:
        """Return the log-probs [R, V] of all questions; `texts` are what the caller has sent."""
        for key in released:
            texts.pop(key, None)
        contexts = []
        for one in questions:
            ids = texts.setdefault(one.key, [])
            ids[one.kept :] = one.new_ids
            whole = Context((caller << 64) + one.key, Prompt(ids), ids)
            contexts += [prefix(whole, length) for length in one.lengths]
        with self._one_at_a_time:
            logprobs_RV = lm.forward(contexts).logprobs_RV
            if self._guide.precision == "half":
                logprobs_RV = logprobs_RV.half()
            return logprobs_RV.cpu().numpy()

    def _load(self, version: GuideVersion) -> CausalLM:
        folder = version.artifact.load(version.version)
        device = pick_device(self._guide.device)
        model = load_frozen(folder, device=device, dtype=self._guide.dtype)
        return CausalLM(model, vocab_size=self._vocab_size, num_slots=self._num_slots)
