"""How many choices an ingress replica has decoded at a time, who waits for a place, how long."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve.errors import APIError
from serve.ingress_config import IngressConfig


class Admission:
    """A bounded number of places, and a bounded queue in front of them.

    A request takes one place per choice, all at once. Clients take turns, and each client's own
    requests go first come, first served. Nothing is worked on before it has its places, so
    what is turned away under overload has cost nothing. All methods belong to one event loop.
    """

    def __init__(self, config: IngressConfig) -> None:
        self._config = config
        self.num_in_flight = 0
        """Places taken."""
        self._queues: dict[str, deque[_Waiting]] = {}
        """By client; the next turn is that of the first."""
        self._held: Counter[str] = Counter()
        """Choices of each client, decoding and waiting."""

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._queues.values())

    @asynccontextmanager
    async def places(self, num: int, *, client: str = "") -> AsyncIterator[None]:
        """Hold `num` places while the block runs, which begins once they are free.

        Raises `APIError`: 400 for more places than there are, 429 if the queue is full, if none
        were free in time, or if the client has too many.
        """
        self._check(num, client)
        self._held[client] += num
        try:
            await self._enter(num, client)
            try:
                yield
            finally:
                self._leave(num)
        finally:
            self._held[client] -= num
            if not self._held[client]:
                del self._held[client]

    def _check(self, num: int, client: str) -> None:
        if num > (limit := self._config.max_in_flight):
            message = f"{num} choices (prompts times n) were asked for; at most {limit} are served."
            raise APIError(400, message, param="n")
        most = self._config.limits.choices_per_key
        if most is not None and self._held[client] + num > most:
            raise self._busy(
                f"{self._held[client]} choices of this API key are in flight, {num} more were "
                f"asked for, and {most} are allowed. Wait for some of them."
            )

    async def _enter(self, num: int, client: str) -> None:
        if not self._queues and self.num_in_flight + num <= self._config.max_in_flight:
            self.num_in_flight += num
            return
        if self.num_queued >= (limit := self._config.max_queued):
            raise self._busy(
                f"All {self._config.max_in_flight} places are taken and {limit} requests wait. "
                "Try again."
            )
        waiting = _Waiting(num, asyncio.get_running_loop().create_future())
        self._queues.setdefault(client, deque()).append(waiting)
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                await waiting.admitted
        except BaseException as error:
            self._stop_waiting(waiting, client)
            if isinstance(error, TimeoutError):
                waited = f"No place became free within {self._config.queue_timeout_s:g} s."
                raise self._busy(f"{waited} Try again.") from None
            raise

    def _stop_waiting(self, waiting: "_Waiting", client: str) -> None:
        if not waiting.admitted.cancelled():  # admitted at the very moment at which it gave up
            self._leave(waiting.num)
            return
        queue = self._queues.get(client, deque())
        if waiting in queue:
            queue.remove(waiting)
            if not queue:
                del self._queues[client]
        self._admit()  # it may have been too large for what is free, and the next one is not

    def _leave(self, num: int) -> None:
        self.num_in_flight -= num
        self._admit()

    def _admit(self) -> None:
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            waiting = queue[0]
            gave_up = waiting.admitted.cancelled()  # just now: its own task has yet to run
            if not gave_up and self.num_in_flight + waiting.num > self._config.max_in_flight:
                return
            queue.popleft()
            del self._queues[client]
            if queue:
                self._queues[client] = queue  # behind the others
            if not gave_up:
                self.num_in_flight += waiting.num
                waiting.admitted.set_result(None)

    def _busy(self, message: str) -> APIError:
        headers = {"Retry-After": str(self._config.retry_after_s)}
        return APIError(429, message, code="rate_limit_exceeded", headers=headers)


@dataclass(eq=False, slots=True)
class _Waiting:
    num: int
    admitted: asyncio.Future[None]
