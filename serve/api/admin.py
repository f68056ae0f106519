"""Routes for those who run the server: which versions of guides are served, and the metrics."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.api import metrics_page
from serve.api.bodies import StrictRoute
from serve.api.keys import Role
from serve.api.schema.common import refused
from serve.api.visit import current_visit
from serve.catalog import Catalog, GuideEntry
from serve.errors import APIError, api_error


class _AdminBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Trial(_AdminBody):
    """A version to try, and the share of the requests to try it on."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    share: Annotated[float, Field(gt=0, le=1)]


class Change(_AdminBody):
    """What is to be different; null ends a trial."""

    enabled: bool = True
    canary: Trial | None = None
    shadow: Trial | None = None

    @model_validator(mode="after")
    def _something(self) -> "Change":
        if not self.model_fields_set:
            raise refused("enabled", "give enabled, canary or shadow")
        return self


class Reload(_AdminBody):
    name: Annotated[str, Field(max_length=256)] | None = None
    """None is all guides."""


def admin_routes(control: Any, *, open_metrics: bool) -> APIRouter:
    """Return the routes; `control` is the handle of `Guides`."""
    router = APIRouter(route_class=StrictRoute, include_in_schema=False)
    admin = [Depends(_admins_only)]

    async def ask(call: Any) -> Any:
        try:
            return await call
        except Exception as error:
            raise api_error(error) from error

    @router.get("/admin/guides", dependencies=admin)
    async def guides() -> dict[str, Any]:
        catalog: Catalog = await ask(control.catalog.remote())
        loaded: dict[str, dict[str, int]] = await ask(control.loaded.remote())
        data = [_describe(entry, loaded) for entry in catalog.guides]
        return {"object": "list", "revision": catalog.revision, "data": data}

    @router.post("/admin/guides/reload", dependencies=admin)
    async def reload(body: Reload) -> dict[str, Any]:
        return {"object": "list", "data": await ask(control.reload.remote(body.name))}

    @router.post("/admin/guides/{name}", dependencies=admin)
    async def change(name: str, body: Change) -> dict[str, Any]:
        asked = body.model_dump(exclude_unset=True)
        entry: GuideEntry = await ask(control.change.remote(name, asked))
        return _describe(entry, await ask(control.loaded.remote()))

    @router.get("/metrics", dependencies=[] if open_metrics else admin)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await metrics_page.page(), media_type=metrics_page.MEDIA_TYPE)

    return router


async def _admins_only() -> None:
    client = current_visit().client
    if client is None or client.role is not Role.ADMIN:
        message = "This takes the API key of an admin."
        raise APIError(403, message, code="admin_only")


def _describe(entry: GuideEntry, loaded: dict[str, dict[str, int]]) -> dict[str, Any]:
    trials = {"canary": entry.canary, "shadow": entry.shadow}
    roles = [("current", entry.current, None)]
    roles += [(role, one.version, one.share) for role, one in trials.items() if one is not None]
    return {
        "object": "guide",
        "name": entry.name,
        "kind": entry.current.kind,
        "stage": entry.current.stage.name.lower(),
        "placement": entry.placement,
        "enabled": entry.enabled,
        "versions": [
            {
                "role": role,
                "version": version.version,
                "path": version.artifact.uri,
                "share": share,
                # By deployment, of which the base is called "base" here.
                "replicas": {
                    place or "base": keys[version.key]
                    for place, keys in loaded.items()
                    if version.key in keys
                },
            }
            for role, version, share in roles
        ],
    }
