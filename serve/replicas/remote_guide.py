"""The remote placement of a guide LM: a `LogprobSource` on the other side of a Serve handle."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.models.rows import Ask, common_prefix, group, invert
from serve.catalog import GuideVersion
from serve.config import GuideConfig
from serve.errors import GuideUnavailableError
from serve.replicas.priority import go_first
from serve.retries import is_retryable
from serve.wire import Question

logger = logging.getLogger(__name__)

_BACKOFF_S = 0.05
_MAX_GRPC_BYTES = 4 * 10**6
"""Serve's gRPC transport takes 4 MiB; its object store path is slower for what fits."""


class RemoteLM:
    """Asks the replicas of one guide; the call is in flight while the base computes.

    An answer is a pure function of the ids, of which a call holds those that its replica has not
    seen. So a call whose replica died is sent to another one with all of them, and one that takes
    too long is sent to a second replica as well: whoever answers first is asked from then on. A
    guide that did not answer in time is left alone for a while, so that no step waits for it.
    """

    def __init__(
        self,
        handle: Any,
        guide: GuideConfig,
        version: GuideVersion,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """`handle` is the deployment handle of a `GuideModel`."""
        self._handle, self._guide, self._version = handle, guide, version
        self._row_bytes = vocab_size * (2 if guide.precision == "half" else 8)
        self._device = device
        # Apart from those of other base replicas, which share the guide's caches.
        self._first_key = secrets.randbits(62) << 64
        self._place = _Place(handle)
        self._down_until = 0.0
        self._loop = _background_loop()

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Send the call; the returned function waits for its log-probs [R, V].

        Either raises `GuideUnavailableError` when nobody answers in time.
        """
        if time.monotonic() < self._down_until:
            raise GuideUnavailableError(self._version.key, "it did not answer a moment ago")
        asks = group(contexts)
        call = asyncio.run_coroutine_threadsafe(self._ask(asks), self._loop)

        def wait() -> Tensor:
            try:
                answer_RV = call.result()
            except Exception as error:
                self._down_until = time.monotonic() + self._guide.cooldown_s
                raise GuideUnavailableError(self._version.key, repr(error)) from error
            # A copy: arrays from the object store are read-only, and guides add in place.
            found_RV = torch.from_numpy(np.array(answer_RV)).to(self._device)
            order = invert([place for ask in asks for place in ask.places])
            found_RV = found_RV if order == sorted(order) else found_RV[order]
            return found_RV.float() if found_RV.dtype == torch.float16 else found_RV

        return wait

    def release(self, keys: Sequence[int]) -> None:
        """Forget what was sent; guide replicas evict what was not used for longest."""
        for key in keys:
            self._place.sent.pop(key, None)

    async def _ask(self, asks: Sequence[Ask]) -> Any:
        """Return the first answer. Raises the last error, or `TimeoutError`."""
        deadline = self._loop.time() + self._guide.timeout_s
        # A second replica is asked once: when the first is late, or at once when it failed.
        calls = {asyncio.ensure_future(self._call(self._place, asks)): self._place}
        late_at = self._loop.time() + self._guide.hedge_s
        try:
            while True:
                until = deadline if late_at is None else min(late_at, deadline)
                left_s = max(0.0, until - self._loop.time())
                done, _ = await asyncio.wait(calls, timeout=left_s, return_when="FIRST_COMPLETED")
                for call in done:
                    place = calls.pop(call)
                    if (error := call.exception()) is None:
                        self._place = place
                        return call.result()
                    if not is_retryable(error) or self._loop.time() >= deadline:
                        raise error
                    logger.warning("guide %s failed, asking elsewhere: %r", self._guide.name, error)
                    await asyncio.sleep(_BACKOFF_S)
                if self._loop.time() >= deadline:
                    raise TimeoutError(f"no answer in {self._guide.timeout_s:g} s")
                if not calls or (late_at is not None and self._loop.time() >= late_at):
                    late_at = None
                    elsewhere = _Place(self._handle)
                    calls[asyncio.ensure_future(self._call(elsewhere, asks))] = elsewhere
        finally:
            for call in calls:
                call.cancel()

    async def _call(self, place: "_Place", asks: Sequence[Ask]) -> Any:
        """Ask the replica of a place, which may have forgotten what it was sent before."""
        num_rows = sum(len(ask.lengths) for ask in asks)
        fits = num_rows * self._row_bytes <= _MAX_GRPC_BYTES
        logprobs = place.quick if fits else place.roomy
        missing = await logprobs.remote(self._version, [self._question(place, ask) for ask in asks])
        if not isinstance(missing, list):
            return missing
        for key in missing:
            place.sent.pop(key - self._first_key, None)
        return await logprobs.remote(self._version, [self._question(place, ask) for ask in asks])

    def _question(self, place: "_Place", ask: Ask) -> Question:
        """Return what to send of a sequence, and note that it was sent."""
        ids = ask.context.token_ids
        sent = place.sent.setdefault(ask.context.key, [])
        kept = common_prefix(sent, ids)
        new = ids[kept:]
        sent[kept:] = new
        return Question(self._first_key + ask.context.key, kept, new, ask.lengths)


class _Place:
    """One guide replica as this process sees it, for as long as both live."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._session = secrets.token_hex(8)
        self.sent: dict[int, list[int]] = {}
        """Ids that the replica has been sent, by the key of the context."""

    # Made where they are used: a handle belongs to the event loop that it is made on.
    @cached_property
    def quick(self) -> Any:
        """Asks by gRPC, which takes so many bytes."""
        return self._asking(_by_reference=False)

    @cached_property
    def roomy(self) -> Any:
        """Asks by the object store."""
        return self._asking(_by_reference=True)

    def _asking(self, **settings: Any) -> Any:
        # Serve sends calls of one session to one replica, and sessions to all of them.
        return self._handle.options(session_id=self._session, **settings).logprobs


@cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop on a thread of its own: the engine's thread has none, and waits."""
    loop = asyncio.new_event_loop()
    loop.call_soon(go_first)
    threading.Thread(target=loop.run_forever, name="remote-guides", daemon=True).start()
    return loop
