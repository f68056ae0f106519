"""`Guide:<name>`: replicas that answer for one guide LM."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from pilotfish.context import Context, Prompt
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, pick_device
from serve.catalog import GuideEntry
from serve.config import GuideConfig


class GuideModel:
    """A guide LM behind calls. Its caches are found by key and prefix, so any replica can answer
    any call: the first one about a sequence is a slower step, nothing else."""

    def __init__(
        self, guide: GuideConfig, entry: GuideEntry, *, vocab_size: int, num_slots: int
    ) -> None:
        torch.set_num_threads(guide.threads)
        model = load_frozen(
            entry.artifact.fetch(), device=pick_device(guide.device), dtype=guide.dtype
        )
        self._lm = CausalLM(model, vocab_size=vocab_size, num_slots=num_slots)
        # One thread, since a forward moves rows of the cache about; Serve's own loop stays free.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="guide")

    async def logprobs(
        self, keys: Sequence[int], token_ids: Sequence[list[int]]
    ) -> NDArray[np.floating]:
        """Return the next-token log-probs [R, V] behind each row's ids: a pure function of them.

        `keys` name the rows for the cache; they must be unique among all callers.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._forward, keys, token_ids)

    def _forward(self, keys: Sequence[int], token_ids: Sequence[list[int]]) -> NDArray[np.floating]:
        contexts = [
            Context(key, Prompt(ids), ids) for key, ids in zip(keys, token_ids, strict=True)
        ]
        return self._lm.forward(contexts).logprobs_RV.cpu().numpy()
