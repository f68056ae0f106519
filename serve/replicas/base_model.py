"""`BaseModel`: a replica that owns the base, its colocated guides, and the decode loop."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, cast

import torch

from pilotfish.chat import stop_ids
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import TokenEvent
from pilotfish.guides import load_guide
from pilotfish.guides.base import TokenGuide
from pilotfish.guides.card import read_card
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_tokenizer, pick_device
from serve.catalog import Catalog
from serve.config import ServeConfig
from serve.errors import EngineError
from serve.replicas.engine_thread import EngineThread
from serve.replicas.remote_guide import RemoteLM
from serve.wire import GenerateRequest, to_request, to_token

logger = logging.getLogger(__name__)

_LEAVE_AFTER_S = 0.5


def _leave() -> None:
    """End this process. Serve's router drops a dead replica at once, and an unhealthy one only
    after some health checks, through which it would look idle and draw every request."""
    os._exit(1)


class BaseModel:
    """Decodes requests by continuous batching and streams their tokens.

    Knows ids only. A request may begin with tokens another replica drew (`completed`): it goes on
    behind them, so nothing here needs to survive.
    """

    def __init__(
        self,
        config: ServeConfig,
        catalog: Catalog,
        remote: Mapping[str, Any],
        leave: Callable[[], None] = _leave,
    ) -> None:
        """Load everything. `remote` holds a handle for each guide with replicas of its own.

        `leave` is called soon after the decode loop died.
        """
        torch.set_num_threads(config.base.threads)
        engine = load_engine(config, catalog, remote)
        self._engine = engine
        self._thread = EngineThread(
            engine,
            on_tokens=self._on_tokens,
            on_failure=self._on_failure,
            stall_s=config.base.stall_s,
        )
        self._leave = leave
        self._keys = itertools.count()
        self._streams: dict[int, asyncio.Queue[tuple[Any, ...] | BaseException]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[tuple[Any, ...]]]:
        """Yield the tokens of a completion as `wire.Token` tuples, all that there are at a time.

        Raises `PromptError` for a request that can never be decoded, `GuideUnavailableError` when
        a remote guide of it is gone, and `EngineError` when this replica cannot go on. Closing the
        stream frees the request's slot at the next step.
        """
        key = next(self._keys)
        job = to_request(key, request)
        self._engine.check(job)
        self._loop = asyncio.get_running_loop()
        queue = self._streams[key] = asyncio.Queue()
        ended = False
        try:
            self._thread.submit(job)
            while not ended:
                tokens = await _take_all(queue)
                yield tokens
                ended = tokens[-1][-1] is not None
        finally:
            del self._streams[key]
            if not ended:
                self._thread.cancel(key)

    async def stats(self) -> dict[str, int]:
        """Return the process id, the requests in this replica, and the steps made so far."""
        return {
            "pid": os.getpid(),
            "num_open": self._thread.num_open,
            "num_steps": self._thread.num_steps,
        }

    async def check_health(self) -> None:
        """Raise `EngineError` unless decoding makes progress; Serve then replaces the replica."""
        self._thread.check()

    def close(self) -> None:
        """Stop the decode loop; open streams get nothing more."""
        self._thread.close()

    def _on_tokens(self, events: Sequence[TokenEvent]) -> None:
        assert self._loop is not None, "tokens come only after a request"
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if event.key in self._streams:
                self._streams[event.key].put_nowait(to_token(event))

    def _on_failure(self, keys: Sequence[int], error: BaseException) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._break, keys, error)

    def _break(self, keys: Sequence[int], error: BaseException) -> None:
        for key in keys:
            if key in self._streams:
                self._streams[key].put_nowait(error)
        if isinstance(error, EngineError):
            asyncio.get_running_loop().call_later(_LEAVE_AFTER_S, self._leave)


def load_engine(config: ServeConfig, catalog: Catalog, remote: Mapping[str, Any]) -> Engine:
    """Load base and colocated guides, and connect the remote ones."""
    device = pick_device(config.base.device)
    folder = catalog.base.artifact.fetch()
    tokenizer = load_tokenizer(folder)
    model = load_frozen(folder, device=device, dtype=config.base.dtype)
    vocab_size = catalog.base.vocab_size
    base = CausalLM(model, vocab_size=vocab_size, num_slots=config.base.num_slots)
    end_ids = stop_ids(tokenizer, model.generation_config)
    guides: dict[str, TokenGuide] = {}
    for guide, entry in zip(config.guides, catalog.guides, strict=True):
        host = GuideHost(
            base=base,
            tokenizer=tokenizer,
            name=config.base.path,
            end_ids=end_ids,
            num_slots=config.guide_slots(guide),
            device=device,
            dtype=guide.dtype,
            remote=RemoteLM(remote[guide.name], guide, vocab_size=vocab_size, device=device)
            if guide.placement == "remote"
            else None,
        )
        guide_folder = entry.artifact.fetch()
        loaded = load_guide(guide_folder, read_card(guide_folder), host)
        guides[guide.name] = cast("TokenGuide", loaded)
    logger.info("loaded %s with guides: %s", folder, ", ".join(guides) or "none")
    return Engine(base, guides, end_ids=end_ids, tokenizer=tokenizer)


async def _take_all(queue: "asyncio.Queue[tuple[Any, ...] | BaseException]") -> list[Any]:
    """Wait for the next token and take those behind it; raise what broke the stream.

    Tokens in front of an error are given up: they are drawn again, and come out the same.
    """
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    for item in items:
        if isinstance(item, EngineError):
            raise EngineError(*item.args)  # one traceback per stream
        if isinstance(item, BaseException):
            raise item
    return items
