"""A served application for the length of a `with` block, started as a user would start it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import ray
import yaml
from openai import OpenAI
from ray import serve as ray_serve

from jobs.cluster import REPOSITORY
from pilotfish.errors import PilotfishError

_ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""By default each item of a stream crosses three threads of a replica, which costs a third of the
ingress's time. Nothing in ours blocks the one that is left: models are loaded, and decode, in
threads of their own."""


def application(name: str, args: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """Return one application of a Serve config; its processes find the code of this repository."""
    search_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "platform")])
    return {
        "name": name,
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "runtime_env": {"env_vars": {"PYTHONPATH": search_path, **_ONE_LOOP, **environment}},
        "args": dict(args),
    }


def haproxy_environment() -> dict[str, str]:
    """Return what a cluster's environment has, before it starts, to answer through HAProxy.

    Ingress replicas then speak HTTP themselves, behind a proxy in C that Ray brings along on Linux.
    Serve's own proxy, in Python, costs about a millisecond of a core per item of a stream.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # By default 4, which on a small machine only wake each other.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 4))),
        # By default these are fixed, and two clusters on one machine would want the same.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port(9101)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port(8404)),
        # So long a replica that leaves stays, by default 30 s, for proxies elsewhere to hear of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }


def write_serve_config(
    path: Path, applications: Sequence[Mapping[str, Any]], *, port: int, **settings: Any
) -> None:
    """Write a Serve config file that listens on this machine alone.

    `settings` are other fields of such a file.
    """
    http = {"host": "127.0.0.1", "port": port}
    config = {**settings, "http_options": http, "applications": [dict(a) for a in applications]}
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@contextmanager
def served(config: Path, *, port: int, patience_s: float = 180.0) -> Iterator[OpenAI]:
    """Run `serve run CONFIG` on the connected cluster and give a client once it is ready."""
    address = ray.get_runtime_context().gcs_address
    command = Path(sys.executable).with_name("serve")
    log = config.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(command), "run", str(config), "--address", address],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log, patience_s)
        yield OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    finally:
        # Not by Ctrl-C's signal, which a process started in the background ignores.
        ray_serve.shutdown()
        process.terminate()
        process.wait(timeout=30)


def free_port(wanted: int) -> int:
    """Return the wanted local port, or another free one where it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise PilotfishError("no local port is free.")


def _wait_until_ready(
    url: str, process: "subprocess.Popen[bytes]", log: Path, patience_s: float
) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PilotfishError(f"serve run ended with code {process.returncode}; see {log}.")
        try:
            with urlopen(f"{url}/ready", timeout=2):
                return
        except OSError:  # nobody listens yet, or 503 from who does
            time.sleep(0.5)
    raise PilotfishError(f"{url} was not ready within {patience_s:.0f} s; see {log}.")
