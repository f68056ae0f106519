"""Numbers that are shown as long as a process lives."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0


class Reporting:
    """Calls something about once a second."""

    def __init__(self, report: Callable[[], Awaitable[None]]) -> None:
        self._report = report
        self._task: asyncio.Task[None] | None = None

    def ensure(self) -> None:
        """Begin, once there is an event loop: Serve calls `check_health` in it."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                await self._report()
            except Exception as error:
                logger.warning("nothing to report: %r", error)
            await asyncio.sleep(_PERIOD_S)
