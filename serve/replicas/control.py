"""How replicas find `Guides`, and the address of their machine."""

from typing import Any

from ray import serve
from ray.util import get_node_ip_address

CONTROL = "Guides"
"""The name of its deployment."""


def control_handle() -> Any:
    """Return the handle of `Guides`, from within another replica of the application."""
    return serve.get_deployment_handle(CONTROL, serve.get_replica_context().app_name)


def own_host() -> str:
    """Return the address at which the cluster's other nodes find this one."""
    return get_node_ip_address()
