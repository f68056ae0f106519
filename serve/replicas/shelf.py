"""What one replica has loaded, by version: loaded once, kept while anybody uses it."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from serve.catalog import GuideVersion

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shelf(Generic[T]):
    """Versions of guides in this process.

    A version that is asked for and not there is loaded then; everybody who waits for it gets the
    same one. A version that is neither served any more nor used goes. All methods belong to one
    event loop; loading runs on a thread.
    """

    def __init__(
        self,
        load: Callable[[GuideVersion], T],
        drop: Callable[[GuideVersion, T], None],
    ) -> None:
        self._load, self._drop = load, drop
        self._items: dict[GuideVersion, T] = {}
        self._leases: Counter[GuideVersion] = Counter()
        self._coming: dict[GuideVersion, asyncio.Future[T]] = {}
        self._served: set[GuideVersion] = set()
        # One after the other: two at a time would need the memory of two.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    @property
    def loaded(self) -> dict[GuideVersion, T]:
        return dict(self._items)

    def stock(self, versions: Collection[GuideVersion]) -> None:
        """Serve versions, and load them before there is an event loop. Raises what loading does."""
        for version in versions:
            self._items[version] = self._load(version)
        self._served.update(versions)

    async def get(self, version: GuideVersion) -> T:
        """Return what a version is, loading it if need be. Raises what loading raises."""
        if version not in self._items:
            if version not in self._coming:
                self._coming[version] = asyncio.ensure_future(self._bring(version))
                self._coming[version].add_done_callback(lambda coming: self._came(version, coming))
            # Shielded: one who no longer waits must not take it from the others.
            return await asyncio.shield(self._coming[version])
        return self._items[version]

    @asynccontextmanager
    async def lease(self, version: GuideVersion) -> AsyncIterator[T]:
        """Use a version while the block runs."""
        self._leases[version] += 1
        try:
            yield await self.get(version)
        finally:
            self._leases[version] -= 1
            self._tidy()

    def hold(self, version: GuideVersion) -> None:
        """Count a version as served until the next `keep`."""
        self._served.add(version)

    def keep(self, served: Collection[GuideVersion]) -> None:
        """Say which versions are served now; others go as soon as nobody uses them."""
        self._served = set(served)
        self._tidy()

    async def _bring(self, version: GuideVersion) -> T:
        loop = asyncio.get_running_loop()
        item = await loop.run_in_executor(self._loader, self._load, version)
        self._items[version] = item
        logger.info("loaded %s", version.key)
        return item

    def _came(self, version: GuideVersion, coming: "asyncio.Future[T]") -> None:
        del self._coming[version]
        if not coming.cancelled():
            coming.exception()  # whoever still waits raises it; perhaps nobody does
        self._tidy()  # nor wants it any more

    def _tidy(self) -> None:
        for version in self._items.keys() - self._served:
            if not self._leases[version]:
                self._drop(version, self._items.pop(version))
                del self._leases[version]
                logger.info("dropped %s", version.key)
