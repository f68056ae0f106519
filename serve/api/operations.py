"""What surrounds the routes of the API in a replica of the ingress."""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client

from serve.api.access_log import AccessLog
from serve.api.admin import admin_routes
from serve.api.gate import Gate
from serve.api.keys import Doorman, check_exposure, is_loopback, load_keys
from serve.api.traces import Traces
from serve.api.visit import Visit
from serve.ingress_config import IngressConfig
from serve.metrics import RequestMetrics


def operate(http: FastAPI, config: IngressConfig, control: Any, metrics: RequestMetrics) -> FastAPI:
    """Put a gate in front of routes, and admin routes beside them; from within a Serve replica.

    Raises `ConfigError` for keys that cannot be read, and for a server that would be open to all.
    """
    host = _bound_host()
    check_exposure(config, host)
    # Whoever reaches a HAProxy that others reach, too, comes to us from its own address.
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return surround(
        http,
        config,
        control,
        metrics,
        replica=serve.get_replica_context().replica_tag,
        sees_peers=is_loopback(host) or not behind_haproxy,
    )


def surround(
    http: FastAPI,
    config: IngressConfig,
    control: Any,
    metrics: RequestMetrics,
    *,
    replica: str,
    sees_peers: bool = True,
) -> FastAPI:
    """Do the same anywhere. Raises `ConfigError` for keys that cannot be read."""
    log = AccessLog(replica=replica, prompts=config.log_prompts) if config.access_log else None
    traces = None if config.trace is None else Traces(config.trace)

    def over(visit: Visit) -> None:
        metrics.count(visit)
        if log is not None:
            log.write(visit)
        if traces is not None:
            traces.write(visit)

    http.include_router(admin_routes(control, open_metrics=config.open_metrics))
    doorman = Doorman(
        load_keys(config),
        allow_unauthenticated=config.allow_unauthenticated,
        sees_peers=sees_peers,
    )
    http.add_middleware(
        Gate,
        doorman=doorman,
        limits=config.limits,
        over=over,
        keep_bodies=config.log_prompts,
        also_open=("/metrics",) if config.open_metrics else (),
    )
    return http


def _bound_host() -> str | None:
    """Return the address that Serve's proxies listen on; None if there are none."""
    client = _get_global_client()
    assert client is not None, "within a replica there is a Serve instance"
    return client.http_config.host
