"""Shadow versions of guides: some requests are decoded once more with them, and nobody waits."""

import asyncio
import logging
from contextvars import Context
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from serve.api.calls import Calls
from serve.api.choices import Choice
from serve.api.planning import Plan
from serve.catalog import Catalog, GuideVersion
from serve.choosing import share_of
from serve.metrics import RequestMetrics

logger = logging.getLogger(__name__)

_BEHIND = 1
"""The priority: whatever clients wait for goes first."""


class Shadows:
    """At most so many at a time; there is no queue of them."""

    def __init__(
        self,
        limit: int,
        calls: Calls,
        tokenizer: PreTrainedTokenizerBase,
        metrics: RequestMetrics,
    ) -> None:
        self._limit = limit
        self._calls, self._tokenizer, self._metrics = calls, tokenizer, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, plan: Plan, catalog: Catalog) -> None:
        """Begin to decode a request's first choice with the shadow versions of its guides.

        Each guide has its own share of the requests, decided by the request's id, and a decoding
        of its own. Only token guides have shadows, and a shadow tilts alone with the others.
        """
        for use in plan.chain.tilts:
            entry = catalog.guide(use.version.name)
            shadow = None if entry is None else entry.shadow
            if shadow is None or shadow.version == use.version:
                continue
            if share_of(plan.request_id, f"shadow of {use.version.name}") < shadow.share:
                self._begin(plan, shadow.version)

    def _begin(self, plan: Plan, version: GuideVersion) -> None:
        if len(self._tasks) >= self._limit:
            self._metrics.count_shadow(version.name, version.version, "skipped", 0, 0.0)
            return
        # In a context of its own: what happens to it is none of the request's.
        task = asyncio.create_task(
            self._decode(plan, version), name=f"shadow {version.key}", context=Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decode(self, plan: Plan, version: GuideVersion) -> None:
        tilts = [
            use._replace(version=version) if use.version.name == version.name else use
            for use in plan.chain.tilts
        ]
        chain = replace(plan.chain, tilts=tilts, selection=None, revisions=())
        task = replace(plan.tasks[0], priority=_BEHIND, read_from=None)
        choice = Choice(task, chain, self._calls, self._tokenizer)
        outcome = "ok"
        try:
            async for _ in choice.pieces():
                pass
        except Exception as error:
            logger.warning("shadow %s failed: %r", version.key, error)
            outcome = "failed"
        tally = choice.tally
        mean_kl = tally.kl_sum / max(1, tally.num_steered)
        self._metrics.count_shadow(
            version.name, version.version, outcome, tally.num_steered, mean_kl
        )
