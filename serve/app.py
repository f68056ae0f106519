"""The Serve application: `serve run serve.app:build`, or a Serve config file that names it."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from serve.api.ingress import Pipeline
from serve.catalog import Catalog, GuideEntry, make_catalog
from serve.config import GuideConfig, ProcessConfig, ServeConfig, parse_args
from serve.replicas.base_model import BaseModel
from serve.replicas.guide_model import GuideModel

_STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_HEALTH: dict[str, Any] = {"health_check_period_s": 2, "health_check_timeout_s": 10}
# Long answers finish before a replica is replaced.
_DRAIN_S = 120


# Not annotated with ServeConfig: Serve would then validate it without the hints of `parse_args`.
def build(args: dict[str, Any] | ServeConfig) -> Application:
    """Return the application. Raises a `PilotfishError` before anything starts if it cannot run.

    `args` is a tree like `serve/configs/kitchen.yaml`, or dotted keys from the command line:
    `serve run serve.app:build base.path=runs/kitchen/base`.
    """
    config = args if isinstance(args, ServeConfig) else parse_args(args)
    catalog = make_catalog(config, created=int(time.time()))
    remote = {
        guide.name: _guide(config, guide, entry, catalog)
        for guide, entry in zip(config.guides, catalog.guides, strict=True)
        if guide.placement == "remote"
    }
    return _ingress(config, catalog, _base(config, catalog, remote))


def _ingress(config: ServeConfig, catalog: Catalog, base: Application) -> Application:
    ingress = config.ingress
    deployment = serve.deployment(
        name="Pipeline",
        num_replicas=ingress.num_replicas,
        # Beyond the requests in flight it must still have room to say 429.
        max_ongoing_requests=4 * ingress.max_in_flight,
        ray_actor_options={"num_cpus": ingress.num_cpus},
        graceful_shutdown_timeout_s=_DRAIN_S,
        **_HEALTH,
    )(serve.api.ingress()(Pipeline))
    return deployment.bind(ingress, catalog, base)


def _base(config: ServeConfig, catalog: Catalog, remote: Mapping[str, Application]) -> Application:
    deployment = serve.deployment(
        name="BaseModel",
        num_replicas=config.base.num_replicas,
        max_ongoing_requests=config.base.ongoing,
        ray_actor_options=_resources(config.base),
        graceful_shutdown_timeout_s=_DRAIN_S,
        **_HEALTH,
    )(BaseModel)
    return deployment.bind(config, catalog, dict(remote))


def _guide(
    config: ServeConfig, guide: GuideConfig, entry: GuideEntry, catalog: Catalog
) -> Application:
    deployment = serve.deployment(
        name=f"Guide:{guide.name}",
        num_replicas=guide.num_replicas,
        # Each base replica has one call in flight, and a second where the first went missing.
        max_ongoing_requests=2 * config.base.num_replicas,
        ray_actor_options=_resources(guide),
        # Calls of one base replica go where its caches are.
        request_router_config={"request_router_class": _STICKY},
        logging_config={"enable_access_log": False},  # one line per token otherwise
        **_HEALTH,
    )(GuideModel)
    return deployment.bind(
        guide,
        entry,
        vocab_size=catalog.base.vocab_size,
        num_slots=config.guide_slots(guide),
    )


def _resources(process: ProcessConfig) -> dict[str, float]:
    return {"num_cpus": process.num_cpus, "num_gpus": process.num_gpus}
