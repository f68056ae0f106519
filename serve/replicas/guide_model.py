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
from serve.catalog import Catalog, GuideVersion
from serve.config import GuideConfig
from serve.replicas.following import Stock, versions_of
from serve.replicas.shelf import Shelf

_LINGER_S = 60
"""A request asks once per step and holds nothing in between; so long may a step take."""


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
        # One thread, since a forward moves rows of the cache about; Serve's own loop stays free.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="guide")

    async def logprobs(
        self, version: GuideVersion, keys: Sequence[int], token_ids: Sequence[list[int]]
    ) -> NDArray[np.floating]:
        """Return the next-token log-probs [R, V] behind each row's ids: a pure function of them.

        `keys` name the rows for the cache; they must be unique among all callers.
        """
        async with self._shelf.lease(version) as lm:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, _forward, lm, keys, token_ids)

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served. Raises what loading it raises."""
        await self._stock.prepare(version)

    async def stats(self) -> dict[str, Any]:
        """Return the process id and what is loaded."""
        return {"pid": os.getpid(), "guides": sorted(v.key for v in self._shelf.loaded)}

    async def check_health(self) -> None:
        """Never fails; Serve's calls begin to follow the catalog."""
        self._stock.ensure()

    def _load(self, version: GuideVersion) -> CausalLM:
        folder = version.artifact.load(version.version)
        device = pick_device(self._guide.device)
        model = load_frozen(folder, device=device, dtype=self._guide.dtype)
        return CausalLM(model, vocab_size=self._vocab_size, num_slots=self._num_slots)


def _forward(
    lm: CausalLM, keys: Sequence[int], token_ids: Sequence[list[int]]
) -> NDArray[np.floating]:
    contexts = [Context(key, Prompt(ids), ids) for key, ids in zip(keys, token_ids, strict=True)]
    return lm.forward(contexts).logprobs_RV.cpu().numpy()
