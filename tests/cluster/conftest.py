"""One Ray head for the whole session, with ports and a folder of its own.

Other clusters may run on the machine: nothing here relies on Ray's default ports, and only the
processes started here are stopped. With `RAY_SERVE_ENABLE_HA_PROXY=1` Serve answers through
HAProxy.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray

from jobs import cluster
from jobs.serving import haproxy_environment

_START_SECONDS = 60
_PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start a head, connect to it, and give the address of its dashboard."""
    # Ray's socket paths are limited to 107 characters, so pytest's own folders are too deep.
    folder = tempfile.mkdtemp(prefix="pf-", dir="/tmp")
    ports: dict[str, int] = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        # This process has read its mode when Ray was imported; the head must have the same.
        patch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            for name, value in haproxy_environment().items():
                patch.setenv(name, value)
        head = _start_head(folder, ports)
        try:
            _wait_for(ports["dashboard-port"], head)
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{ports['port']}")
            cluster.connect()
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
            ray.shutdown()
        finally:
            _stop(head)
    shutil.rmtree(folder, ignore_errors=True)


def _start_head(folder: str, ports: Mapping[str, int]) -> "subprocess.Popen[bytes]":
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=3", "--object-store-memory=200000000"),
        *("--disable-usage-stats", "--include-dashboard=true", f"--temp-dir={folder}"),
        '--resources={"seat": 1}',
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def extra_node() -> Iterator[None]:
    """Give the cluster a second node, with one CPU and one seat, while the block runs."""
    names = [name for name in _PORTS if "agent" in name or "metrics" in name]
    ports = zip(names, _free_ports(len(names)), strict=True)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--block"),
        *(f"--address={os.environ['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1"),
        *("--num-cpus=1", '--resources={"seat": 1}', "--object-store-memory=100000000"),
        *("--disable-usage-stats", *(f"--{name}={port}" for name, port in ports)),
    ]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        _stop(node)


def _stop(head: "subprocess.Popen[bytes]") -> None:
    """Kill the head and everything it started, and nothing else."""
    family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    head.wait(timeout=10)


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Ray head ended while starting"
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"the Ray head did not listen on port {port} in {_START_SECONDS} s")
