"""What Tune runs for a trial that trains. It imports next to nothing: trials come and go, and each
has a process of its own.
"""

from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError


def training_trial(knobs: dict[str, Any], trainer: Any, has_checkpoints: bool) -> None:
    """Train stretch by stretch, and report behind each; see `tune.trainer.Trainer.advance`.

    Between them nothing of a trial runs, so one that is stopped or paused leaves nothing behind.
    A trial that copies another finds the other's checkpoint here, and new knobs.
    """
    checkpoint = tune.get_checkpoint()
    folders = () if checkpoint is None else (checkpoint.path,)
    while True:
        try:
            done = ray.get(trainer.advance.remote(knobs, folders))
        except RayTaskError as error:
            raise error.cause from error
        if done is None:
            return
        folders, report = done
        kept = tune.Checkpoint.from_directory(folders[0]) if has_checkpoints else None
        tune.report(report, checkpoint=kept)
