"""The remote placement of a guide LM: a `LogprobSource` on the other side of a Serve handle."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pilotfish.context import Context
from serve.catalog import GuideVersion
from serve.config import GuideConfig
from serve.errors import GuideUnavailableError
from serve.retries import is_retryable

logger = logging.getLogger(__name__)

_BACKOFF_S = 0.05
_MAX_GRPC_BYTES = 4 * 10**6
"""Serve's gRPC transport takes 4 MiB; its object store path is slower for what fits."""


class RemoteLM:
    """Asks the replicas of one guide; the call is in flight while the base computes.

    An answer is a pure function of the ids that are sent, so a call whose replica died, or which
    takes too long, is sent again. Waits on the calling thread, which must not run an event loop.
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
        self._handle = handle
        self._version = version
        self._timeout_s = guide.timeout_s
        self._max_attempts = guide.max_attempts
        self._row_bytes = vocab_size * 8  # float64 at most
        self._device = device
        # Apart from those of other base replicas, which share the guide's caches.
        self._first_key = secrets.randbits(62) << 64
        # One guide replica keeps the caches of one base replica, as long as both live.
        self._session = secrets.token_hex(8)

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Send the call; the returned function waits for its log-probs [R, V].

        It raises `GuideUnavailableError` when none of the attempts is answered.
        """
        keys = [self._first_key + context.key for context in contexts]
        token_ids = [context.token_ids for context in contexts]
        response = self._send(keys, token_ids)
        return lambda: self._wait(response, keys, token_ids)

    def release(self, keys: Sequence[int]) -> None:
        """Nothing to do: guide replicas evict what was not used for longest."""

    def _send(self, keys: list[int], token_ids: list[list[int]]) -> Any:
        fits = len(keys) * self._row_bytes <= _MAX_GRPC_BYTES
        handle = self._handle.options(session_id=self._session, _by_reference=not fits)
        return handle.logprobs.remote(self._version, keys, token_ids)

    def _wait(self, response: Any, keys: list[int], token_ids: list[list[int]]) -> Tensor:
        for attempt in range(1, self._max_attempts + 1):
            try:
                answer_RV = response.result(timeout_s=self._timeout_s)
                # A copy: arrays from the object store are read-only, and guides add in place.
                return torch.from_numpy(np.array(answer_RV)).to(self._device)
            except Exception as error:
                response.cancel()
                if not is_retryable(error) or attempt == self._max_attempts:
                    raise GuideUnavailableError(self._version.key, repr(error)) from error
                logger.warning("guide %s, attempt %d: %r", self._version.key, attempt, error)
            time.sleep(_BACKOFF_S * attempt)
            response = self._send(keys, token_ids)
        raise AssertionError("the loop returns or raises")
