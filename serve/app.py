"""The Serve application: `serve run serve.app:build`, or a Serve config file that names it."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from pilotfish.guides.base import Stage
from serve.api.ingress import Pipeline
from serve.catalog import Catalog, make_catalog
from serve.config import ServeConfig, parse_args
from serve.guides import Guides
from serve.replicas.control import CONTROL, control_handle, own_host
from serve.replicas.front import Front, make_base, make_response_guide
from serve.replicas.guide_model import GuideModel
from serve.replicas_config import ProcessConfig, ReplicasConfig
from serve.routing import ROUTER

_COMMON: dict[str, Any] = {
    "health_check_period_s": 2,
    "health_check_timeout_s": 5,
    "logging_config": {"enable_access_log": False},  # a line per call; the ingress writes its own
}
# Long answers finish before a replica is replaced.
_DRAIN_S = 120
# Base replicas go on at another replica of a guide, with all that they need.
_MOVE_S = 1
# Every replica of the application waits at `Guides` for changes.
_MANY = 10_000
_FULL = 0.75
"""Share of a replica's slots that autoscaling aims at."""


# Not annotated with ServeConfig: Serve would then validate it without the hints of `parse_args`.
def build(args: dict[str, Any] | ServeConfig) -> Application:
    """Return the application. Raises a `PilotfishError` before anything starts if it cannot run.

    `args` is a tree like `serve/configs/kitchen.yaml`, or dotted keys from the command line:
    `serve run serve.app:build base.path=runs/kitchen/base`.
    """
    config = args if isinstance(args, ServeConfig) else parse_args(args)
    catalog = make_catalog(config, created=int(time.time()))
    remote: dict[str, Application] = {}
    revising: dict[str, Application] = {}
    for entry in catalog.guides:
        if entry.current.stage is Stage.REVISION:
            revising[entry.name] = _response_guide(config, entry.name, catalog)
        elif entry.placement == "remote":
            remote[entry.name] = _guide(config, entry.name, catalog)
    base = _base(config, catalog, remote)
    replicas = {"": base, **remote, **revising}
    guides = serve.deployment(
        name=CONTROL,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=0,  # whoever waits there for news can go without
        **_COMMON,
    )(Guides)
    control = guides.bind(config, catalog, replicas)
    return _ingress(config, catalog, base, {**remote, **revising}, control)


def _ingress(
    config: ServeConfig,
    catalog: Catalog,
    base: Application,
    guides: Mapping[str, Application],
    control: Application,
) -> Application:
    ingress = config.ingress
    deployment = serve.deployment(
        name="Pipeline",
        # Beyond what decodes and what waits it must still have room to say 429.
        max_ongoing_requests=2 * (ingress.max_in_flight + ingress.max_queued),
        ray_actor_options={"num_cpus": ingress.num_cpus},
        graceful_shutdown_timeout_s=_DRAIN_S,
        **_replicas(ingress, ingress.max_in_flight),
        **_COMMON,
    )(serve.ingress()(Pipeline))
    return deployment.bind(ingress, catalog, base, dict(guides), control)


def _base(config: ServeConfig, catalog: Catalog, remote: Mapping[str, Application]) -> Application:
    deployment = serve.deployment(
        name="BaseModel",
        max_ongoing_requests=config.base.ongoing,
        ray_actor_options=_resources(config.base),
        graceful_shutdown_timeout_s=_DRAIN_S,
        request_router_config={"request_router_class": ROUTER},
        **_replicas(config.base, config.base.num_slots),
        **_COMMON,
    )(Front)
    return deployment.bind(
        *("BaseModel", make_base, config, catalog, list(remote)),
        remote=dict(remote),
        control=control_handle,
    )


def _guide(config: ServeConfig, name: str, catalog: Catalog) -> Application:
    guide = config.guide(name)
    deployment = serve.deployment(
        name=f"Guide:{name}",
        # A call lasts as long as a base replica uses a version here. It must always get in.
        max_ongoing_requests=_MANY,
        ray_actor_options=_resources(guide),
        graceful_shutdown_timeout_s=_MOVE_S,
        **_replicas(guide, 1),
        **_COMMON,
    )(GuideModel)
    slots = config.guide_slots(guide)
    return deployment.bind(guide, catalog, num_slots=slots, host=own_host, control=control_handle)


def _response_guide(config: ServeConfig, name: str, catalog: Catalog) -> Application:
    guide = config.guide(name)
    num_slots = config.guide_slots(guide)
    deployment = serve.deployment(
        name=f"ResponseGuide:{name}",
        max_ongoing_requests=2 * num_slots,
        ray_actor_options=_resources(guide),
        graceful_shutdown_timeout_s=_DRAIN_S,
        request_router_config={"request_router_class": ROUTER},
        **_replicas(guide, num_slots),
        **_COMMON,
    )(Front)
    return deployment.bind(
        *(f"ResponseGuide:{name}", make_response_guide, config, name, catalog),
        remote={},
        control=control_handle,
    )


def _replicas(config: ReplicasConfig, num_slots: int) -> dict[str, Any]:
    """Return how many replicas a deployment has; `num_slots` is what one works on at a time."""
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.num_replicas}
    target = scaling.target_ongoing_requests or max(1, _FULL * num_slots)
    return {
        "autoscaling_config": {
            **scaling.model_dump(exclude={"target_ongoing_requests"}),
            "target_ongoing_requests": target,
        }
    }


def _resources(process: ProcessConfig) -> dict[str, float]:
    return {"num_cpus": process.num_cpus, "num_gpus": process.num_gpus}
