"""`Guide:<name>`: replicas that answer for one guide LM, in every version that is served."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from serve.replicas.priority import go_first
from serve.replicas.shelf import Shelf
from serve.wire import Question

_LINGER_S = 60
"""A request asks once per step and holds nothing in between; so long may a step take."""
_TEXTS_PER_SLOT = 4
"""Ids are small beside caches, which are rebuilt from them."""


class GuideModel:
    """A guide LM behind calls. Its caches are found by key and prefix, so any replica can answer
    any call: the first one about a sequence is a slower step, nothing else."""

    def __init__(
        self,
        guide: GuideConfig,
        catalog: Catalog,
        *,
        num_slots: int,
        control: Callable[[], Any] | None = None,
    ) -> None:
        """`control` is as in `BaseModel`."""
        torch.set_num_threads(guide.threads)
        self._guide = guide
        self._vocab_size, self._num_slots = catalog.base.vocab_size, num_slots
        self._shelf = Shelf(self._load, lambda _version, _lm: None, linger_s=_LINGER_S)
        self._stock = Stock(self._shelf, catalog, versions_of(guide.name), control)
        self._texts: dict[int, list[int]] = {}
        """Sequences by key, from the one that was not asked about for longest."""
        self._num_texts = _TEXTS_PER_SLOT * num_slots
        # One thread, since a forward moves rows of the cache about; Serve's own loop stays free.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="guide", initializer=go_first)

    async def logprobs(
        self, version: GuideVersion, questions: Sequence[tuple[Any, ...]]
    ) -> NDArray[np.floating] | list[int]:
        """Return the log-probs [R, V] that `wire.Question` tuples ask for, sequence by sequence.

        They are a pure function of the ids. Where beginnings are not known here (any more), returns
        the keys of those sequences instead.
        """
        async with self._shelf.lease(version) as lm:
            loop = asyncio.get_running_loop()
            asked = [Question(*values) for values in questions]
            return await loop.run_in_executor(self._worker, self._answer, lm, asked)

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served. Raises what loading it raises."""
        await self._stock.prepare(version)

    async def stats(self) -> dict[str, Any]:
        """Return the process id and what is loaded."""
        return {"pid": os.getpid(), "guides": sorted(v.key for v in self._shelf.loaded)}

    async def check_health(self) -> None:
        """Fail only if nothing could be loaded; Serve's calls begin to follow the catalog."""
        go_first()
        await self._stock.ensure()

    def _answer(
        self, lm: CausalLM, questions: Sequence[Question]
    ) -> NDArray[np.floating] | list[int]:
        texts = self._texts
        missing = [one.key for one in questions if len(texts.get(one.key, ())) < one.kept]
        if missing:
            return missing
        contexts = []
        for one in questions:
            ids = texts.pop(one.key, [])  # put back as the last one that was used
            ids[one.kept :] = one.new_ids
            texts[one.key] = ids
            whole = Context(one.key, Prompt(ids), ids)
            contexts += [prefix(whole, length) for length in one.lengths]
        while len(texts) > self._num_texts:
            del texts[next(iter(texts))]
        logprobs_RV = lm.forward(contexts).logprobs_RV
        if self._guide.precision == "half":
            logprobs_RV = logprobs_RV.half()
        return logprobs_RV.cpu().numpy()

    def _load(self, version: GuideVersion) -> CausalLM:
        folder = version.artifact.load(version.version)
        device = pick_device(self._guide.device)
        model = load_frozen(folder, device=device, dtype=self._guide.dtype)
        return CausalLM(model, vocab_size=self._vocab_size, num_slots=self._num_slots)
