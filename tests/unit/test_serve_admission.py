"""`serve.api.admission`: who gets a place, who waits, and who is told to come back."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serve.api.admission import Admission
from serve.errors import APIError
from serve.ingress_config import IngressConfig, LimitsConfig


def admission(*, per_key: int | None = None, **settings: Any) -> Admission:
    settings = {"max_in_flight": 2, "max_queued": 8, "queue_timeout_s": 5, **settings}
    limits = LimitsConfig(choices_per_key=per_key)
    return Admission(IngressConfig(**settings, api_keys_env="KEYS", limits=limits))


class Door:
    """Requests in front of an admission, and the order in which they came in."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, num: int = 1, client: str = "") -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._stay(name, num, client))
        await settle()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settle()

    async def go_away(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()

    async def refusal(self, name: str) -> APIError:
        with pytest.raises(APIError) as caught:
            await self._tasks[name]
        return caught.value

    async def _stay(self, name: str, num: int, client: str) -> None:
        async with self.admission.places(num, client=client):
            self.order.append(name)
            await self._ends[name].wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def through(door: Door, visit: Callable[[Door], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(visit(door), 10))


def test_those_who_find_no_place_wait_their_turn() -> None:
    async def visit(door: Door) -> None:
        for name in "abcd":
            await door.come(name)
        assert (door.order, door.admission.num_queued) == (["a", "b"], 2)
        await door.end("b")
        await door.end("a")
        assert door.order == ["a", "b", "c", "d"]

    through(Door(admission()), visit)


def test_a_request_takes_a_place_per_choice_and_is_not_overtaken_by_a_smaller_one() -> None:
    async def visit(door: Door) -> None:
        await door.come("one")
        await door.come("two", num=2)
        await door.come("small")
        assert (door.order, door.admission.num_in_flight) == (["one"], 1)
        await door.end("one")
        assert (door.order, door.admission.num_in_flight) == (["one", "two"], 2)
        await door.end("two")
        assert door.order[-1] == "small"

    through(Door(admission()), visit)


def test_clients_take_turns_however_many_requests_one_of_them_has() -> None:
    async def visit(door: Door) -> None:
        await door.come("first", client="x")
        for number in range(3):
            await door.come(f"x{number}", client="x")
        await door.come("y", client="y")
        for name in ("first", "x0", "y", "x1"):
            await door.end(name)
        assert door.order == ["first", "x0", "y", "x1", "x2"]

    through(Door(admission(max_in_flight=1)), visit)


def test_a_full_queue_is_429_with_retry_after() -> None:
    async def visit(door: Door) -> None:
        for name in "abcd":
            await door.come(name)
        refused = await door.refusal("d")
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        assert refused.headers == {"Retry-After": "7"}
        await door.end("a")
        assert door.order == ["a", "b", "c"]

    through(Door(admission(max_queued=1, retry_after_s=7)), visit)


def test_who_waited_too_long_is_429_and_makes_room_for_the_next() -> None:
    async def visit(door: Door) -> None:
        await door.come("a")
        await door.come("large", num=2)
        await door.come("also large", num=2)
        await asyncio.sleep(0.1)
        await door.come("small")
        refused = await door.refusal("large")
        assert (refused.status, "0.2 s" in refused.message) == (429, True)
        assert (await door.refusal("also large")).status == 429
        assert door.order == ["a", "small"]
        await door.end("a")
        await door.end("small")

    door = Door(admission(queue_timeout_s=0.2))
    through(door, visit)
    assert (door.admission.num_in_flight, door.admission.num_queued) == (0, 0)


def test_who_goes_away_while_waiting_leaves_nothing_behind() -> None:
    async def visit(door: Door) -> None:
        for name in "abcd":
            await door.come(name)
        await door.go_away("c")
        assert door.admission.num_queued == 1
        await door.end("a")
        assert door.order == ["a", "b", "d"]
        # Away at the very moment of being admitted: the place is given on.
        await door.come("e")
        await door.come("f")
        door._ends["b"].set()
        await asyncio.sleep(0)
        await door.go_away("e")
        assert door.order[-1] == "f"

    through(Door(admission()), visit)


def test_more_choices_than_there_are_places_is_a_bad_request() -> None:
    async def visit(door: Door) -> None:
        await door.come("huge", num=3)
        refused = await door.refusal("huge")
        assert (refused.status, refused.param) == (400, "n")

    through(Door(admission()), visit)


def test_a_key_has_no_more_choices_than_it_may_decoding_and_waiting() -> None:
    async def visit(door: Door) -> None:
        await door.come("a", num=2, client="x")
        await door.come("b", client="x")
        await door.come("c", client="x")
        refused = await door.refusal("c")
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        await door.come("d", client="y")
        await door.end("a")
        await door.end("b")
        assert door.order == ["a", "b", "d"]
        await door.come("e", num=2, client="x")
        await door.end("d")
        assert door.order[-1] == "e"

    through(Door(admission(per_key=3)), visit)


def test_overload_keeps_all_places_busy_and_recovers_at_once() -> None:
    """Four times as many arrive as can be served: as many are served as if no more had come."""

    async def visit(door: Door) -> None:
        busy: list[int] = []
        refused = 0

        async def ask() -> None:
            nonlocal refused
            try:
                async with door.admission.places(1):
                    busy.append(door.admission.num_in_flight)
                    await asyncio.sleep(0.01)
            except APIError as error:
                refused += error.status == 429

        arrivals = []
        for _ in range(40):
            arrivals += [asyncio.create_task(ask()) for _ in range(8)]
            await asyncio.sleep(0.01)
        assert len(busy) > 50
        assert sum(busy) / len(busy) > 1.9
        assert refused > 150
        await asyncio.gather(*arrivals)
        assert (door.admission.num_in_flight, door.admission.num_queued) == (0, 0)
        async with asyncio.timeout(0.5), door.admission.places(2):
            pass

    through(Door(admission(max_queued=4)), visit)
