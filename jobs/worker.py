"""What every training worker runs."""

import logging
from dataclasses import dataclass
from typing import Any

import ray
import torch
import transformers

from jobs.config import JobConfig
from jobs.dataset import Prepared
from jobs.reward_training import reward_training
from jobs.steps import Trainee, run_steps
from jobs.stretch import Stretch
from jobs.supervised import SupervisedTraining
from jobs.system_metrics import system_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the driver sends to every worker."""

    config: JobConfig
    prepared: Any
    """Object reference of the job's `Prepared` data."""
    progress: Any
    """Actor handle of the progress board."""
    run_id: str | None = None
    """Of MLflow, if the job is tracked."""
    tracking_uri: str | None = None
    stretch: Stretch | None = None
    """None: the whole training."""


def train_loop(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Train to the end, or from the last checkpoint to the end; return all reports.

    `settings["job"]` is an object reference of the `WorkerSettings`.
    """
    job: WorkerSettings = ray.get(settings["job"])
    _set_log_levels()
    torch.set_num_threads(job.config.scaling.threads)
    every = job.config.tracking.system_metrics_every
    with system_metrics(job.run_id, job.tracking_uri, every=every):
        prepared: Prepared = ray.get(job.prepared)
        if job.config.learns_from_reward:
            trainee: Trainee = reward_training(job.config, prepared)
        else:
            trainee = SupervisedTraining(job.config, prepared)
        return run_steps(trainee, job.config.train, job.progress, stretch=job.stretch)


def _set_log_levels() -> None:
    # Ray Train logs every report at INFO, under a file name instead of a logger's name.
    logging.getLogger().setLevel(logging.WARNING)
    for name, level in (("jobs", logging.INFO), ("pilotfish", logging.INFO), ("mlflow", "WARNING")):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a new head is no news
