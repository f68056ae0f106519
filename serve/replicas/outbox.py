"""What a decode loop has to say, until it is sent."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class Outbox:
    """Items of all streams, by key. Belongs to the engine's thread.

    It is sent as rarely as streams allow: all of them wait for the next step meanwhile.
    """

    def __init__(
        self,
        deliver: Callable[[Mapping[int, Sequence[Any]]], None],
        pause: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pause` returns the seconds from one delivery of everything to the next."""
        self._deliver, self._pause, self._clock = deliver, pause, clock
        self._waiting: dict[int, list[Any]] = {}
        self._next_at = 0.0

    def add(self, key: int, item: Any) -> None:
        """Add an item behind those of its stream."""
        self._waiting.setdefault(key, []).append(item)

    def drop(self, key: int) -> None:
        """Forget a stream that has no use for its items."""
        self._waiting.pop(key, None)

    def send(self, urgent: Iterable[int] = ()) -> None:
        """Deliver everything if the pause is over, and otherwise streams that cannot wait."""
        now = self._clock()
        if now >= self._next_at:
            items, self._waiting = self._waiting, {}
            self._next_at = now + self._pause()
        else:
            items = {key: self._waiting.pop(key) for key in urgent if key in self._waiting}
        if items:
            self._deliver(items)
