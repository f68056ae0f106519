"""`serve.replicas.shelf`: what is loaded when, and when it goes."""

import asyncio
import threading

import pytest

from serve.artifacts import Artifact
from serve.catalog import GuideVersion
from serve.replicas.shelf import Shelf


def version(number: int) -> GuideVersion:
    return GuideVersion("helpful", str(number), Artifact("a"), "genarm", 1.0)


ONE, TWO = version(1), version(2)


class Models:
    """What a shelf loads: remembers it, and can be slow or broken."""

    def __init__(self) -> None:
        self.loads: list[GuideVersion] = []
        self.drops: list[GuideVersion] = []
        self.broken: set[GuideVersion] = set()
        self.open = threading.Event()
        self.open.set()
        self.shelf: Shelf[str] = Shelf(self._load, self._drop)

    def _load(self, version: GuideVersion) -> str:
        self.loads.append(version)
        assert self.open.wait(5)
        if version in self.broken:
            raise ValueError("broken")
        return f"model {version.version}"

    def _drop(self, version: GuideVersion, _: str) -> None:
        self.drops.append(version)


@pytest.fixture
def models() -> Models:
    return Models()


def test_a_version_is_loaded_once_however_many_ask_for_it(models: Models) -> None:
    async def use() -> str:
        async with models.shelf.lease(ONE) as model:
            return model

    async def run() -> None:
        models.open.clear()
        uses = [asyncio.create_task(use()) for _ in range(3)]
        await asyncio.sleep(0.05)
        uses.pop().cancel()  # one that no longer waits takes it from nobody
        models.open.set()
        assert await asyncio.gather(*uses) == ["model 1", "model 1"]
        assert models.loads == [ONE]

    asyncio.run(run())


def test_what_is_served_stays_and_what_is_not_goes_with_its_last_lease(models: Models) -> None:
    async def run() -> None:
        models.shelf.stock([ONE])
        async with models.shelf.lease(ONE):
            async with models.shelf.lease(ONE), models.shelf.lease(TWO):
                models.shelf.keep([TWO])
            assert (models.drops, set(models.shelf.loaded)) == ([], {ONE, TWO})
        assert (models.drops, set(models.shelf.loaded)) == ([ONE], {TWO})
        async with models.shelf.lease(ONE):  # a late one still gets it
            pass
        assert models.loads == [ONE, TWO, ONE]
        assert models.drops == [ONE, ONE]

    asyncio.run(run())


def test_a_version_that_is_held_stays_until_it_is_said_what_is_served(models: Models) -> None:
    async def run() -> None:
        models.shelf.hold(ONE)
        async with models.shelf.lease(ONE):
            pass
        assert set(models.shelf.loaded) == {ONE}
        models.shelf.keep([])
        assert models.drops == [ONE]

    asyncio.run(run())


def test_a_version_that_nobody_waits_for_any_more_does_not_stay(models: Models) -> None:
    async def use() -> None:
        async with models.shelf.lease(ONE):
            raise AssertionError("it was cancelled")

    async def run() -> None:
        models.open.clear()
        waiting = asyncio.create_task(use())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0)
        models.open.set()
        async with asyncio.timeout(5):
            while not models.drops:
                await asyncio.sleep(0.01)
        assert models.shelf.loaded == {}

    asyncio.run(run())


def test_a_version_that_cannot_be_loaded_raises_for_all_and_is_tried_again(models: Models) -> None:
    async def use() -> str:
        async with models.shelf.lease(ONE) as model:
            return model

    async def run() -> None:
        models.broken.add(ONE)
        failures = await asyncio.gather(use(), use(), return_exceptions=True)
        assert [str(failure) for failure in failures] == ["broken", "broken"]
        models.broken.clear()
        assert await use() == "model 1"
        assert models.loads == [ONE, ONE]

    asyncio.run(run())
