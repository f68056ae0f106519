"""Workers that die once, as by the kernel's out-of-memory killer."""

import os
import signal
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from jobs.pool import Chunk
from jobs.worker import WorkerSettings, train_loop

KILLED_AT_STEP = 7


def loop_killed_once(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the real loop; worker 1 kills itself before it reports a step, the first time only."""
    job: WorkerSettings = settings["job"]
    marker = Path(job.config.root) / "killed"
    report = ray.train.report

    def report_or_die(metrics: dict[str, Any], **kwargs: Any) -> None:
        if metrics["step"] == KILLED_AT_STEP and dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report(metrics, **kwargs)

    ray.train.report = report_or_die
    return train_loop(settings)


class Dying:
    """Doubles the items of a chunk; dies at one chunk, the first time that any actor gets it."""

    def __init__(self, marker: str, start: int) -> None:
        self._marker, self._start = Path(marker), start

    def process(self, chunk: Chunk[int]) -> list[int]:
        if chunk.start == self._start and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * item for item in chunk.items]
