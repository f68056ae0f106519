"""What the machines of a run were busy with, beside its metrics in MLflow."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray.train


@contextmanager
def system_metrics(run_id: str | None, tracking_uri: str | None, *, every: int) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPUs to the run while the block runs.

    Every `every` seconds; 0 logs nothing. One worker of each machine does it, under the machine's
    number in the group.
    """
    context = ray.train.get_context()
    if run_id is None or every == 0 or context.get_local_rank() != 0:
        yield
        return
    # Here: what the other workers need not load.
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id,
        sampling_interval=every,
        resume_logging=True,
        node_id=f"node_{context.get_node_rank()}",
        tracking_uri=tracking_uri,
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
