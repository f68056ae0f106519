"""One decode loop and the streams of tokens that come out of it."""

import asyncio
import itertools
import logging
import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from torch import Tensor

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import PromptEvent, TokenEvent
from pilotfish.errors import CheckpointError
from serve.errors import EngineError
from serve.frames import ReplyTo
from serve.replicas.apart import leave
from serve.replicas.engine_thread import EngineThread
from serve.replicas.lines import Lines
from serve.replicas.outbox import Outbox
from serve.replicas.priority import go_first
from serve.replicas.streams import Posted, Pulled, Stream, hand_out
from serve.wire import GenerateRequest, to_request

logger = logging.getLogger(__name__)

T = TypeVar("T")

OFF = "it was switched off"
"""Why a guide does not answer, when somebody wanted that."""
_LEAVE_AFTER_S = 0.5


class Decoding:
    """Decodes requests by continuous batching and streams their tokens.

    Knows ids only. A request may begin with tokens another replica drew (`completed`): it goes on
    behind them, so nothing here needs to survive.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        stall_s: float,
        items_per_second: float,
        leave: Callable[[], None] = leave,
    ) -> None:
        """`items_per_second` is what all streams together send; see `ServeConfig`.

        `leave` is called soon after the decode loop died.
        """
        self.engine = engine
        self.thread = EngineThread(
            engine,
            on_events=self._on_events,
            on_give_up=self._on_give_up,
            on_failure=self._on_failure,
            stall_s=stall_s,
        )
        self._leave = leave
        self._keys = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._lines = Lines()
        self._outbox = Outbox(self._deliver, lambda: len(self._streams) / items_per_second)
        self._unheard: set[int] = set()
        """Keys of streams that nothing was sent on."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(
        self,
        request: GenerateRequest,
        guide_keys: Mapping[str, str],
        *,
        gave_up: Sequence[str] = (),
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """Yield a completion as `wire.Batch` tuples, with all the tokens that there are at a time.

        They go where the request wants them, if it says so; then nothing is yielded. `guide_keys`
        are what the engine calls the guides that act, by name; `gave_up` are those that it goes on
        without from here. Raises `PromptError` for a request that can never be decoded,
        `GuideUnavailableError` when a remote guide of it is gone, and `EngineError` when this
        replica cannot go on. Closing the stream frees the request's slot at the next step.
        """
        key = next(self._keys)
        job = to_request(key, request, guide_keys)
        if (loop := asyncio.get_running_loop()) is not self._loop:
            self._loop = loop
            go_first()
        stream = self._streams[key] = await self._stream(request.get("reply_to"))
        spared = [
            guide_keys[use.version.name]
            for use in request["guides"]
            if use.on_failure == "base" and use.version.name in guide_keys
        ]
        ended = False
        try:
            if gave_up:
                hand_out([(stream, gave_up)], loop)
            self._unheard.add(key)
            self.thread.submit(job, goes_on_without=spared)
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    yield tuple(batch)
            ended = True
        finally:
            del self._streams[key]
            self._unheard.discard(key)
            if not ended:
                self.thread.cancel(key)

    async def ask(self, work: Callable[[], T]) -> T:
        """Do something that needs the engine to itself, between two steps.

        Raises what it raises.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work_and_tell() -> None:
            try:
                result = work()
            except Exception as error:
                loop.call_soon_threadsafe(answer.set_exception, error)
            else:
                loop.call_soon_threadsafe(answer.set_result, result)

        self.thread.call(work_and_tell)
        return await answer

    def close(self) -> None:
        """Stop the loop; open streams get nothing more."""
        self.thread.close()

    def stats(self) -> dict[str, Any]:
        """Return the process id, the requests here at this moment, and totals since the start."""
        engine, drafts = self.engine, self.engine.draft_stats
        return {
            "pid": os.getpid(),
            "num_open": self.thread.num_open,
            "num_steps": self.thread.num_steps,
            "num_running": engine.num_running,
            "num_waiting": engine.num_waiting,
            "num_preempted": engine.num_preempted,
            "cache_share": engine.cache_share,
            "step_seconds": engine.stats.seconds,
            "guide_seconds": dict(engine.stats.guide_seconds),
            "num_rounds": drafts.num_rounds,
            "num_drafted": drafts.num_drafted,
            "num_accepted": drafts.num_accepted,
        }

    def _on_events(self, events: Sequence[PromptEvent | TokenEvent]) -> None:
        urgent = []
        for event in events:
            self._outbox.add(event.key, event)
            if event.finish_reason is not None or event.key in self._unheard:
                self._unheard.discard(event.key)
                urgent.append(event.key)
        self._outbox.send(urgent)

    def _on_give_up(self, key: int, guide: str) -> None:
        self._outbox.add(key, guide)  # goes with the next token

    def _deliver(self, items: Mapping[int, Sequence[Any]]) -> None:
        assert self._loop is not None, "tokens come only after a request"
        streams = ((self._streams.get(key), own) for key, own in items.items())
        hand_out(((stream, own) for stream, own in streams if stream is not None), self._loop)

    async def _stream(self, reply_to: ReplyTo | None) -> Stream:
        """Return a stream to an ingress: posted, or pulled where no line leads there."""
        line = None if reply_to is None else await self._lines.to(reply_to)
        return Pulled() if reply_to is None or line is None else Posted(line, reply_to.key)

    def _on_failure(self, keys: Sequence[int], error: BaseException) -> None:
        for key in keys:
            self._outbox.drop(key)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._break, keys, error)

    def _break(self, keys: Sequence[int], error: BaseException) -> None:
        for key in keys:
            if key in self._streams:
                self._streams[key].fail(error)
        if isinstance(error, EngineError):
            asyncio.get_running_loop().call_later(_LEAVE_AFTER_S, self._leave)


def check_law(law_RV: Tensor, guide: str) -> None:
    """Raise `CheckpointError` unless each row of log-probs is a law."""
    for total in law_RV.exp().sum(-1).tolist():
        if not math.isclose(total, 1, abs_tol=1e-3):
            raise CheckpointError(
                f"guide {guide} gives log-probs whose probabilities sum to {total}. Its weights "
                "are broken; train or upload it again."
            )
