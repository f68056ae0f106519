"""`serve.replicas.apart`: calls to a process apart, and what happens when either one dies."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import psutil
import pytest

from pilotfish.errors import CheckpointError, PromptError
from serve.errors import EngineError, GuideUnavailableError
from serve.replicas.apart import Apart
from serve.replicas.peer import Peer


class Parrot:
    """What runs in the process apart."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer, self._name = peer, name
        self.num_closed = 0

    async def say(self, *words: str) -> tuple[str, ...]:
        return (self._name, *words)

    async def count(self, first: int) -> AsyncGenerator[int]:
        try:
            for number in range(first, first + 10**6):
                yield number
                await asyncio.sleep(0)
        finally:
            self.num_closed += 1

    async def few(self) -> AsyncGenerator[int]:
        for number in range(3):
            yield number

    async def closed(self) -> int:
        return self.num_closed

    async def fail(self, error: Exception) -> None:
        raise error

    async def fail_oddly(self) -> None:
        class LocalError(Exception):
            pass

        raise LocalError("cannot leave this process")

    async def wait(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            self.num_closed += 1

    async def ask_back(self, number: int) -> int:
        return await self._peer.call("double", number)

    async def ask_back_on_a_thread(self, number: int) -> int:
        return await asyncio.to_thread(lambda: self._peer.begin("double", number).result(5))


class Doubler:
    """What runs on this side."""

    async def double(self, number: int) -> int:
        return 2 * number


def break_down(_: Peer) -> None:
    raise CheckpointError("no weights")


def die(_: Peer) -> None:
    os._exit(3)


class Parent:
    """A process apart, and whether this one would have left."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.apart = Apart("parrot", Parrot, "polly", services=Doubler(), leave=self.left.set)

    def run(self, use: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(30):
                await use()

        asyncio.run(limited())


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.apart.close()


def test_calls_go_there_and_back_and_answers_too(parent: Parent) -> None:
    call = parent.apart.call

    async def use() -> None:
        said = await asyncio.gather(*(call("say", str(number)) for number in range(20)))
        assert said == [("polly", str(number)) for number in range(20)]
        assert [number async for number in parent.apart.stream("few")] == [0, 1, 2]
        assert await call("ask_back", 4) == 8
        assert await call("ask_back_on_a_thread", 5) == 10

    parent.run(use)


@pytest.mark.parametrize(
    "error",
    [PromptError("too long"), GuideUnavailableError("far", "gone"), EngineError("dead")],
)
def test_what_is_raised_there_is_raised_here(parent: Parent, error: Exception) -> None:
    async def use() -> None:
        with pytest.raises(type(error)) as raised:
            await parent.apart.call("fail", error)
        assert raised.value.args == error.args

    parent.run(use)


def test_an_error_that_cannot_travel_is_described(parent: Parent) -> None:
    async def use() -> None:
        with pytest.raises(EngineError, match="cannot leave this process"):
            await parent.apart.call("fail_oddly")

    parent.run(use)


def test_who_no_longer_listens_stops_what_runs_there(parent: Parent) -> None:
    async def use() -> None:
        async with aclosing(parent.apart.stream("count", 5)) as numbers:
            assert [await anext(numbers) for _ in range(3)] == [5, 6, 7]
        call = asyncio.create_task(parent.apart.call("wait"))
        await asyncio.sleep(0.05)
        call.cancel()
        while await parent.apart.call("closed") < 2:
            await asyncio.sleep(0.01)

    parent.run(use)


def test_what_cannot_be_made_there_raises_here() -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        Apart("broken", break_down)
    with pytest.raises(EngineError, match="ended while it was loading"):
        Apart("dying", die)


def test_calls_to_a_process_that_dies_end_and_this_one_leaves(parent: Parent) -> None:
    async def use() -> None:
        waiting = [asyncio.create_task(parent.apart.call("wait")) for _ in range(3)]
        stream = parent.apart.stream("count", 0)
        await anext(stream)
        os.kill(parent.apart.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="is gone"):
            async for _ in stream:
                pass
        ended: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in ended] == [EngineError] * 3
        assert not parent.left.is_set()  # the callers hear of it first
        with pytest.raises(EngineError, match="is gone"):
            await parent.apart.call("say")
        assert await asyncio.to_thread(parent.left.wait, 10)

    parent.run(use)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_apart_does_not_outlive_the_one_that_started_it(hangs: bool) -> None:
    code = """
import asyncio, time
from serve.replicas.apart import Apart
from tests.unit.test_serve_apart import Parrot
print(Apart("orphan", Parrot, "polly").pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        orphan = psutil.Process(int(starter.stdout.readline()))
        if hangs:
            orphan.suspend()
        starter.kill()
    deadline = time.monotonic() + 20
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)
