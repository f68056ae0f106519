"""`Guides`: decides which versions of guides are served, and has everybody load them first."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pilotfish.errors import ConfigError
from pilotfish.guides.base import Stage
from serve.artifacts import Artifact, follows_alias, is_mlflow_uri, pin
from serve.catalog import Catalog, GuideEntry, GuideVersion, Trial, resolve_version
from serve.config import ServeConfig
from serve.errors import APIError, cause_of
from serve.metrics import GuideMetrics
from serve.retries import is_retryable

logger = logging.getLogger(__name__)

_LONG_POLL_S = 20
_ATTEMPTS = 3
_RETRY_S = 2.0
_STATS_S = 5.0
_REFUSED_S = 300.0


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
        self._metrics = GuideMetrics(config.base.model_id)
        self._polling: asyncio.Task[None] | None = None
        self._refused: dict[str, tuple[Artifact, float]] = {}
        """By guide, what was refused last, and when to look whether it is better now."""

    async def changes(self, known: Catalog) -> Catalog | None:
        """Return a catalog newer than `known`, as soon as there is one; None after a while.

        Whoever knows a newer one than is known here brings it: that is how a replica of this that
        was restarted learns what was decided before. While one deployment of the application
        follows another, replicas of the two have nothing to say to each other.
        """
        if known.is_newer(self._catalog):
            self._publish(known)
        if not self._catalog.is_newer(known):
            changed = self._changed
            try:
                async with asyncio.timeout(_LONG_POLL_S):
                    await changed.wait()
            except TimeoutError:
                return None
        return self._catalog if self._catalog.is_newer(known) else None

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
        entry = self._entry(name)
        if (enabled := change.get("enabled")) is not None:
            entry = self._update(name, enabled=enabled)  # at once, whatever is being loaded
        trials = [trial for trial in ("canary", "shadow") if trial in change]
        if not trials:
            return entry
        async with self._one_at_a_time:
            try:
                found = {trial: await self._trial(entry, trial, change[trial]) for trial in trials}
            except APIError:
                self._let_go()
                raise
            return self._update(name, **found)

    async def loaded(self) -> dict[str, dict[str, int]]:
        """Return on how many replicas each version is loaded, by deployment ("" is the base)."""
        places = list(self._replicas)
        found = await asyncio.gather(*(self._loaded(place) for place in places))
        return dict(zip(places, found, strict=True))

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
                async with self._one_at_a_time:
                    await self._reload(self._entry(config.name), knows_refused=True)

    async def _reload(self, entry: GuideEntry, *, knows_refused: bool = False) -> dict[str, Any]:
        """Serve what is there now; with `knows_refused` not what was refused a while ago."""
        name, path = entry.name, self._config.guide(entry.name).path
        said = {"name": name, "version": entry.current.version}
        artifact = None
        try:
            artifact = await asyncio.to_thread(pin, path, self._config.tracking_uri)
            if is_mlflow_uri(artifact.uri) and artifact == entry.current.artifact:
                return {**said, "status": "unchanged"}  # known without a download
            refused, until = self._refused.get(name, (None, 0.0))
            if knows_refused and artifact == refused and time.monotonic() < until:
                return {**said, "status": "refused"}
            version = await self._resolve(entry, artifact)
            if version == entry.current:
                return {**said, "status": "unchanged"}
            await self._prepare(version)
        except Exception as error:
            if artifact is not None and not is_retryable(error):
                self._refused[name] = artifact, time.monotonic() + _REFUSED_S
            self._metrics.count_swap(name, "", "refused")
            reason = str(cause_of(error))
            logger.error("guide %s stays at %s: %s", name, entry.current.version, reason)
            return {**said, "status": "refused", "reason": reason}
        # A trial version that has become the current one is no trial any more.
        over = {
            trial: None
            for trial, one in (("canary", entry.canary), ("shadow", entry.shadow))
            if one is not None and one.version == version
        }
        self._update(name, current=version, **over)
        self._metrics.count_swap(name, version.version, "swapped")
        return {**said, "status": "swapped", "version": version.version, "before": said["version"]}

    async def _trial(
        self, entry: GuideEntry, trial: str, wanted: Mapping[str, Any] | None
    ) -> Trial | None:
        if wanted is None:
            return None
        if trial == "shadow" and entry.current.stage is not Stage.TOKEN:
            message = (
                f"Guide {entry.name!r} acts on whole answers, and a shadow decodes tokens. Try "
                "the version as a canary."
            )
            raise APIError(409, message, param=trial, code="guide_refused")
        try:
            path, uri = wanted["path"], self._config.tracking_uri
            version = await self._resolve(entry, await asyncio.to_thread(pin, path, uri))
            await self._prepare(version)
        except Exception as error:
            message = f"{wanted['path']!r} cannot be tried: {cause_of(error)}"
            raise APIError(409, message, param=trial, code="guide_refused") from error
        return Trial(version, wanted["share"])

    async def _resolve(self, entry: GuideEntry, artifact: Artifact) -> GuideVersion:
        guide = self._config.guide(entry.name)
        version = await asyncio.to_thread(
            resolve_version, guide, self._catalog.base, artifact=artifact
        )
        if version.stage is not entry.current.stage:
            raise ConfigError(
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
                await self._load_at(place, version)
        except Exception:
            self._let_go()
            raise

    async def _load_at(self, place: str, version: GuideVersion) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            call = self._replicas[place].broadcast("prepare", version)
            done = await call.results_async(
                timeout_s=self._config.guide_load_s, return_exceptions=True
            )
            errors = [each for each in done if isinstance(each, Exception)]
            if not errors:
                return
            # A replica may have died of something else. One that dies again died of loading.
            lasting = next((each for each in errors if not is_retryable(each)), None)
            if lasting is not None or attempt == _ATTEMPTS:
                raise lasting or errors[0]
            await asyncio.sleep(_RETRY_S)

    async def _loaded(self, place: str) -> dict[str, int]:
        call = self._replicas[place].broadcast("stats")
        try:
            done = await call.results_async(timeout_s=_STATS_S, return_exceptions=True)
        except Exception as error:
            logger.warning("cannot ask what is loaded: %r", error)
            return {}
        return Counter(
            key for each in done if not isinstance(each, Exception) for key in each["guides"]
        )

    def _let_go(self) -> None:
        """Have replicas drop what they prepared in vain."""
        self._publish(replace(self._catalog, revision=self._catalog.revision + 1))

    def _update(self, name: str, **changes: Any) -> GuideEntry:
        """Change what is known of a guide now, which may be more than it was some seconds ago."""
        entry = replace(self._entry(name), **changes)
        self._publish(self._catalog.with_guide(entry))
        return entry

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
