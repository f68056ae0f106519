"""Processes that die or stop in mid-work, as they do on clusters."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch.distributed as dist

from jobs.config import JobConfig
from jobs.pool import Chunk
from jobs.train import train
from jobs.worker import WorkerSettings, train_loop
from pilotfish import config as configs

ACTOR_STEP, CUT_STEP = 2, 7
STARTS, STUCK, KILLED, KILLED_ACTOR = "starts", "stuck", "killed", "killed-actor"
"""Files under the job's root: a line for each start of the loop, and what happened at the step."""


def loop_killed_once(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the real loop; worker 1 kills itself before it reports a step, the first time only.

    As by the kernel's out-of-memory killer.
    """

    def die(root: Path) -> None:
        if dist.get_rank() == 1 and not (root / KILLED).exists():
            (root / KILLED).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _loop(settings, {CUT_STEP: die})


def loop_killed_twice(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the real loop of one worker; at a step one of its two rollout actors is killed, and at a
    later one the worker kills itself; each the first time only."""

    def kill(root: Path) -> None:
        raylet = psutil.Process().parent()  # of this cluster: there may be others on the machine
        assert raylet is not None
        rollers = [one for one in raylet.children() if "RollerActor" in one.cmdline()[0]]
        assert len(rollers) == 2
        (root / KILLED_ACTOR).write_text(str(rollers[0].pid))
        rollers[0].kill()

    def die(root: Path) -> None:
        if not (root / KILLED).exists():
            (root / KILLED).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _loop(settings, {ACTOR_STEP: kill, CUT_STEP: die})


def loop_stuck_alone(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the real loop; a worker without others does not come past a step."""

    def wait(root: Path) -> None:
        if dist.get_world_size() == 1:
            _be_stuck(root)

    return _loop(settings, {CUT_STEP: wait})


def loop_stuck(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the real loop; nobody comes past a step."""
    return _loop(settings, {CUT_STEP: _be_stuck})


def train_stuck(argv: Sequence[str]) -> None:
    """Train from a config and its overrides until somebody kills this process in mid-run."""
    train(configs.load(JobConfig, argv[0], argv[1:]), loop=loop_stuck)


def _be_stuck(root: Path) -> None:
    (root / STUCK).touch()
    time.sleep(600)


def _loop(
    settings: dict[str, Any], at_steps: Mapping[int, Callable[[Path], None]]
) -> list[dict[str, float]]:
    job: WorkerSettings = ray.get(settings["job"])
    root = Path(job.config.root)
    if dist.get_rank() == 0:
        _note_start(root)
    report = ray.train.report

    def report_after(metrics: dict[str, Any], **kwargs: Any) -> None:
        if metrics["step"] in at_steps:
            # Checkpoints before this step are safe.
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED
            )
            at_steps[metrics["step"]](root)
        report(metrics, **kwargs)

    ray.train.report = report_after
    return train_loop(settings)


def _note_start(root: Path) -> None:
    with (root / STARTS).open("a") as file:
        resumes = ray.train.get_checkpoint() is not None
        file.write(f"{dist.get_world_size()} workers, {'resumed' if resumes else 'new'}\n")


class Dying:
    """Doubles the items of a chunk; dies at one chunk, the first time that any actor gets it."""

    def __init__(self, marker: str, start: int) -> None:
        self._marker, self._start = Path(marker), start

    def process(self, chunk: Chunk[int]) -> list[int]:
        if chunk.start == self._start and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * item for item in chunk.items]
