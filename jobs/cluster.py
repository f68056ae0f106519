"""Connect to Ray: a running cluster, or a private one on this machine."""

import json
import logging
import os
import socket
from contextlib import closing
from pathlib import Path

import ray
from ray.util import get_node_ip_address

from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent

# Set by Ray's job manager in the driver of a submitted job.
_SUBMITTED_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_LOCAL_OBJECT_STORE_BYTES = 200 * 1024 * 1024


def connect(*, num_cpus: int = 1, gpus: bool = False) -> None:
    """Connect this process to Ray, unless it already is.

    `RAY_ADDRESS` names a running cluster; without it a private cluster with a dashboard is started
    here, with at least `num_cpus`. Call before any other Ray function.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    # Ray Train polls its workers this often, and each report waits for a poll.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    env = worker_env(gpus=gpus)
    if address is None:
        _start_private(num_cpus, env)
    else:
        ray.init(address=address, runtime_env={"env_vars": env})
    # Ray has switched token authentication on for a private cluster. State what is in force, so
    # that child processes (`ray job submit`, `serve status`) do not have to guess it.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    logger.info("connected to Ray at %s", ray.get_runtime_context().gcs_address)


def _start_private(num_cpus: int, env: dict[str, str]) -> None:
    """Start a cluster on this machine that every process of it can name by `RAY_ADDRESS`.

    Ray Train's processes look their cluster up by that variable, and give up when several clusters
    run on one machine; so the port is chosen here, before the first process is started.
    """
    with closing(socket.socket()) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    own = f"{get_node_ip_address()}:{port}"
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes it away
    try:
        ray.init(
            address="local",  # never another cluster that happens to run on this machine
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=True,  # without it Ray Train's state queries fail every second
            runtime_env={"env_vars": {**env, "RAY_ADDRESS": own}},
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]
    os.environ["RAY_ADDRESS"] = own


def worker_env(*, gpus: bool) -> dict[str, str]:
    """Return the environment of worker processes, less what the submitted job sets itself."""
    env = {
        # One thread per process, waiting passively: with more processes than cores, spinning
        # threads cost several times the work.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "platform")]),
    }
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
    if interval := os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = interval
    # Ray refuses a driver that sets a variable which the job's runtime environment also sets.
    taken = _submitted_env()
    return {name: value for name, value in env.items() if name not in taken}


def is_submitted_job() -> bool:
    """Say whether this process is the entrypoint of `ray job submit`."""
    return _SUBMITTED_JOB_ENV in os.environ


def check_root(root: str | Path) -> Path:
    """Return `root` as an absolute path.

    Raises `ConfigError` for a relative one inside a submitted job: it would lie in the uploaded
    copy of the repository, which the cluster throws away.
    """
    path = Path(root).expanduser()
    if is_submitted_job() and not path.is_absolute():
        raise ConfigError(
            f"root is {str(root)!r}, a relative path, in a job submitted to a Ray cluster. It "
            "would be written into the uploaded copy of the repository and thrown away. Pass "
            "root=/shared/folder, a folder that every node sees."
        )
    return path.resolve()


def _submitted_env() -> dict[str, str]:
    job = json.loads(os.environ.get(_SUBMITTED_JOB_ENV, "{}"))
    return (job.get("runtime_env") or {}).get("env_vars") or {}
