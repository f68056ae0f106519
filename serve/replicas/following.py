"""How a process learns which guides are served: it asks `Guides`, and waits until that changes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from serve.catalog import Catalog, GuideVersion
from serve.replicas.shelf import Shelf

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_CATCH_UP_S = 5.0


class Following:
    """The newest catalog that this process knows of."""

    def __init__(
        self,
        catalog: Catalog,
        adopt: Callable[[Catalog], Awaitable[None]],
        control: Callable[[], Any] | None,
    ) -> None:
        """`adopt` is awaited for every newer catalog. Without `control` there is never one."""
        self.catalog = catalog
        self._adopt, self._control = adopt, control
        self._task: asyncio.Task[None] | None = None

    def ensure(self) -> None:
        """Begin to follow, once there is an event loop: Serve calls `check_health` in it."""
        if self._control is not None and self._task is None:
            self._task = asyncio.create_task(self._follow(self._control))

    async def catch_up(self) -> bool:
        """Return whether there is a newer catalog by now, which has been adopted then."""
        assert self._control is not None
        async with asyncio.timeout(_CATCH_UP_S):
            newest = await self._control().catalog.remote()
        if not newest.is_newer(self.catalog):
            return False
        await self._take(newest)
        return True

    async def _follow(self, control: Callable[[], Any]) -> None:
        while True:
            try:
                newer = await control().changes.remote(self.catalog)
                if newer is not None:
                    await self._take(newer)
            except Exception as error:
                # What is loaded goes on being served; whoever is missing will be back.
                logger.warning("cannot follow the catalog: %r", error)
                await asyncio.sleep(_RETRY_S)

    async def _take(self, catalog: Catalog) -> None:
        await self._adopt(catalog)
        self.catalog = catalog


class Stock:
    """Has on a shelf what a catalog says, and whatever newer catalogs say."""

    def __init__(
        self,
        shelf: Shelf[Any],
        catalog: Catalog,
        versions: Callable[[Catalog], list[GuideVersion]],
        control: Callable[[], Any] | None,
        adopted: Callable[[Catalog], None] = lambda _: None,
    ) -> None:
        """Load what there is now. `versions` are those of a catalog that belong on this shelf.

        `adopted` is called with every newer catalog once the shelf holds it.
        """
        self._shelf, self._versions, self._adopted = shelf, versions, adopted
        self._following = Following(catalog, self._adopt, control)
        self._lacks: Exception | None = None
        try:
            shelf.stock(versions(catalog))
        except Exception as error:
            # Where this replica is a new one of an old application, others are served by now.
            if control is None:
                raise
            self._lacks = error

    @property
    def catalog(self) -> Catalog:
        """The newest one, all of which is on the shelf."""
        return self._following.catalog

    async def ensure(self) -> None:
        """Begin to follow, once there is an event loop: Serve calls `check_health` in it.

        Raises what loading the first catalog raised, unless a newer one has taken its place.
        """
        if self._lacks is not None:
            if not await self._following.catch_up():
                raise self._lacks
            self._lacks = None
        self._following.ensure()

    async def prepare(self, version: GuideVersion) -> None:
        """Load a version beside what is served. Raises what loading it raises."""
        self._shelf.hold(version)
        await self._shelf.get(version)

    async def _adopt(self, catalog: Catalog) -> None:
        served = self._versions(catalog)
        for version in served:
            await self.prepare(version)
        self._shelf.keep(served)
        self._adopted(catalog)


def versions_of(name: str) -> Callable[[Catalog], list[GuideVersion]]:
    """Return what finds all served versions of one guide in a catalog."""

    def find(catalog: Catalog) -> list[GuideVersion]:
        entry = catalog.guide(name)
        return [] if entry is None else entry.versions

    return find
