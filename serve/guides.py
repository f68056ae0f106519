"""`Guides`: decides which versions of guides are served, and has everybody load them first."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pilotfish.errors import PilotfishError
from pilotfish.guides.base import Stage
from serve.artifacts import follows_alias
from serve.catalog import Catalog, GuideEntry, GuideVersion, Trial, resolve_version
from serve.config import ServeConfig
from serve.errors import APIError, cause_of
from serve.retries import is_retryable

logger = logging.getLogger(__name__)

_LONG_POLL_S = 20


class Guides:
    """One replica. The others ask it for the newest catalog and keep what they have without it.

    A version is served once every replica that would run it has loaded it. Where one cannot, none
    serves it, and the version before stays.
    """

    def __init__(self, config: ServeConfig, catalog: Catalog, replicas: Mapping[str, Any]) -> None:
        """`replicas` holds the handle of the base under "", and of guides with replicas by name."""
        self._config = config
        self._replicas = replicas
        self._catalog = catalog
        self._changed = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    async def changes(self, known: Catalog) -> Catalog | None:
        """Return a catalog newer than `known`, as soon as there is one; None after a while.

        Whoever knows a newer one than is known here brings it: that is how a replica of this that
        was restarted learns what was decided before.
        """
        if known.revision > self._catalog.revision:
            self._publish(known)
        if known.revision == self._catalog.revision:
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), _LONG_POLL_S)
            except TimeoutError:
                return None
        return self._catalog

    async def catalog(self) -> Catalog:
        return self._catalog

    async def reload(self, name: str | None = None) -> list[dict[str, Any]]:
        """Look again at where guides come from, and serve what is there now.

        Returns what came of each guide. Raises `APIError` 404 for a guide that is not served.
        """
        names = [name] if name is not None else [entry.name for entry in self._catalog.guides]
        async with self._one_at_a_time:
            return [await self._reload(self._entry(each)) for each in names]

    async def change(self, name: str, change: Mapping[str, Any]) -> GuideEntry:
        """Switch a guide on or off, or try another version of it on a share of the traffic.

        `change` holds `enabled`, or `canary` or `shadow` as a path and a share, or as None. Raises
        `APIError`: 404 for a guide that is not served, 409 for a version that cannot be.
        """
        async with self._one_at_a_time:
            entry = self._entry(name)
            if (enabled := change.get("enabled")) is not None:
                entry = replace(entry, enabled=enabled)
            for trial in ("canary", "shadow"):
                if trial in change:
                    entry = replace(entry, **{trial: await self._trial(entry, change[trial])})
            self._publish(self._catalog.with_guide(entry))
            return entry

    async def check_health(self) -> None:
        """Never fails; Serve's calls begin the watch over aliases."""
        if self._polling is None and self._config.guides_poll_s:
            self._polling = asyncio.create_task(self._poll(self._config.guides_poll_s))

    async def _poll(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            for config in self._config.guides:
                if not follows_alias(config.path):
                    continue
                try:
                    await self.reload(config.name)
                except Exception:
                    logger.exception("cannot look at guide %s", config.name)

    async def _reload(self, entry: GuideEntry) -> dict[str, Any]:
        said = {"name": entry.name, "version": entry.current.version}
        try:
            version = await self._resolve(entry, self._config.guide(entry.name).path)
            if version == entry.current:
                return {**said, "status": "unchanged"}
            await self._prepare(version)
        except Exception as error:
            reason = str(cause_of(error))
            logger.error("guide %s stays at %s: %s", entry.name, entry.current.version, reason)
            return {**said, "status": "refused", "reason": reason}
        # A canary that has become the current version is no trial any more.
        canary = entry.canary
        if canary is not None and canary.version == version:
            canary = None
        self._publish(self._catalog.with_guide(replace(entry, current=version, canary=canary)))
        return {**said, "status": "swapped", "version": version.version, "before": said["version"]}

    async def _trial(self, entry: GuideEntry, wanted: Mapping[str, Any] | None) -> Trial | None:
        if wanted is None:
            return None
        try:
            version = await self._resolve(entry, wanted["path"])
            await self._prepare(version)
        except Exception as error:
            message = f"{wanted['path']!r} cannot be tried: {cause_of(error)}"
            raise APIError(409, message, param="path", code="guide_refused") from error
        return Trial(version, wanted["share"])

    async def _resolve(self, entry: GuideEntry, path: str) -> GuideVersion:
        version = await asyncio.to_thread(
            resolve_version,
            self._config.guide(entry.name),
            self._catalog.base,
            path=path,
            tracking_uri=self._config.tracking_uri,
        )
        if version.stage is not entry.current.stage:
            raise PilotfishError(
                f"it is of kind {version.kind!r}, which cannot stand in for {entry.current.kind!r}."
            )
        return version

    async def _prepare(self, version: GuideVersion) -> None:
        """Have a version loaded by all replicas that would run it. Raises what loading raises."""
        places = [] if version.stage is Stage.REVISION else [""]
        if version.name in self._replicas:
            places.insert(0, version.name)
        try:
            for place in places:
                call = self._replicas[place].broadcast("prepare", version)
                done = await call.results_async(
                    timeout_s=self._config.guide_load_s, return_exceptions=True
                )
                for error in done:
                    # A replica that died meanwhile loads what is served when it is back.
                    if isinstance(error, Exception) and not is_retryable(error):
                        raise error
        except Exception:
            # Who has loaded it lets it go.
            self._publish(replace(self._catalog, revision=self._catalog.revision + 1))
            raise

    def _publish(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._changed.set()
        self._changed = asyncio.Event()

    def _entry(self, name: str) -> GuideEntry:
        entry = self._catalog.guide(name)
        if entry is None:
            known = ", ".join(guide.name for guide in self._catalog.guides) or "none"
            message = f"No guide named {name!r} is served; served: {known}."
            raise APIError(404, message, param="name", code="guide_not_found")
        return entry
