"""How many requests an ingress replica works on at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import APIError


class Admission:
    """A bounded number of places. Who finds none is told to come back, and never waits."""

    def __init__(self, limit: int, *, retry_after_s: int) -> None:
        self._limit = limit
        self._retry_after_s = retry_after_s
        self.num_in_flight = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while the block runs. Raises `APIError` 429 if all are taken."""
        if self.num_in_flight >= self._limit:
            raise APIError(
                429,
                f"{self._limit} requests are in flight, as many as this server takes. Try again.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self._retry_after_s)},
            )
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
