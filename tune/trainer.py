"""The trainings behind trials: a job with its knobs turned, each trained once, whoever asks."""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from jobs.config import JobConfig, TrainTracking
from jobs.progress import hide_bars
from jobs.resolve import config_hash, resolved
from jobs.stretch import Stretch, stretch_hash
from jobs.train import train
from pilotfish import config as configs
from pilotfish.errors import ConfigError
from pilotfish.train.export import read_record
from tune.config import ASHA, PBT, TrainingSearchConfig, check_metrics
from tune.population import check_population
from tune.trials import Clock, Reporter

TRAININGS = "trainings"
"""Folder in the output of a search: what its trials trained, by a hash of what decides it."""

_NO_KNOBS = ("root", "output", "seed", "force", "scaling", "tracking")


def job_of(config: TrainingSearchConfig) -> JobConfig:
    """Return the job as its config and the overrides have it, resolved.

    Raises `ConfigError` for a space, a scheduler or constraints that this job cannot honour.
    """
    root = f"root={config.root}"
    job = resolved(configs.load(JobConfig, config.job, [*config.overrides, root]))
    for key, values in config.space.items():
        if key.split(".")[0] in _NO_KNOBS:
            raise ConfigError(f"{key} decides nothing that a search compares. Set it in overrides.")
        for value in values.corners:
            with_knobs(job, {key: value})
    for constraint in config.constraints:
        if constraint.of_base:
            raise ConfigError(f"constraint {constraint}: a training has no base. Write a number.")
    scheduler = config.search.scheduler
    if scheduler.kind != "none" and (job.train.steps is None or "train.steps" in config.space):
        raise ConfigError(
            f"{scheduler.kind} compares trainings at the same step, so all must have as many: set "
            "train.steps in overrides, and leave it and train.epochs out of the space."
        )
    if isinstance(scheduler, PBT):
        check_population(config, job)
    return job


def with_knobs(job: JobConfig, knobs: Mapping[str, Any]) -> JobConfig:
    """Return the job with other values of dotted keys. Raises `ConfigError`."""
    tree = job.model_dump(mode="json")
    for key, value in knobs.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    return configs.parse(JobConfig, tree, source=f"the job with {dict(knobs)}")


def report_steps(scheduler: ASHA | PBT, total: int) -> tuple[int, ...]:
    """Return the steps behind which trials report and may be stopped or copied, in order.

    `total` is the last one.
    """
    if isinstance(scheduler, PBT):
        interval = scheduler.perturbation_interval
        return (*range(interval, total, interval), total)
    assert isinstance(scheduler, ASHA), "other trials run to their end"
    steps, at = [], float(first_rung(scheduler, total))
    while at < total:
        steps.append(math.ceil(at))
        at *= scheduler.reduction_factor
    return (*steps, total)


def first_rung(scheduler: ASHA, total: int) -> int:
    """Return the step before which no training is stopped."""
    return scheduler.grace_period or math.ceil(total / scheduler.reduction_factor)


def clock_of(config: TrainingSearchConfig, job: JobConfig) -> Clock:
    """Return how progress counts: in steps, or where trials only report their end, in trainings."""
    scheduler = config.search.scheduler
    if scheduler.kind == "none":
        return Clock(unit="trainings", first=1, end=1)
    assert job.train.steps is not None, "the job was checked"
    steps = report_steps(scheduler, job.train.steps)
    return Clock(unit="steps", first=steps[0], end=steps[-1])


def check_room(job: JobConfig, num_trials: int) -> None:
    """Raise `ConfigError` unless the connected cluster has room for so many trainings at once.

    Those without room would hold what others wait for.
    """
    needs, has = demand(job), ray.cluster_resources()
    fits = min(int(has.get(name, 0) / amount + 1e-9) for name, amount in needs.items() if amount)
    if fits < num_trials:
        raise ConfigError(
            f"search.max_concurrent_trials is {num_trials}, but a trial takes {needs}, and the "
            f"cluster has { ({name: has.get(name, 0) for name in needs}) }, room for {fits}. Lower "
            "it, or the job's scaling and rollout."
        )


def demand(job: JobConfig) -> dict[str, float]:
    """Return the resources that one training holds, at its fewest workers."""
    scaling, num_workers = job.scaling, job.scaling.sizes[0]
    each = scaling.resources_per_worker or {"GPU" if scaling.use_gpu else "CPU": 1.0}
    needs = {name: amount * num_workers for name, amount in each.items()}
    if job.rollout is not None:
        actors = job.rollout.actors_per_worker(num_workers) * num_workers
        needs["CPU"] = needs.get("CPU", 0.0) + actors * job.rollout.threads
        needs["GPU"] = needs.get("GPU", 0.0) + actors * job.rollout.gpus_per_actor
    return needs


class Trainer:
    """Trains what trials ask for; as an actor, as many at a time as it has threads.

    Every stretch of a training lies in a folder that is named after what decides its weights.
    Whoever asks for it again gets it from there, after the search was killed and begun again too.
    """

    def __init__(
        self, config: TrainingSearchConfig, job: JobConfig, *, parent: str | None = None
    ) -> None:
        """`parent` is the MLflow run that those of the trainings are shown under."""
        self._config = config
        self._job = job.model_copy(update={"tracking": _tracking(config, job, parent)})
        self._reporter = Reporter(objectives=config.objectives, constraints=config.constraints)
        self._locks: dict[str, threading.Lock] = {}
        hide_bars()
        logging.getLogger("jobs").setLevel(logging.WARNING)

    def advance(
        self, knobs: Mapping[str, Any], folders: Sequence[str]
    ) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        """Train the stretch behind those that lie in `folders` (none: the first), for each repeat.

        Returns the folders of the new ones and what a trial reports, of their means; None where
        nothing is left to train. Raises `ConfigError` for a metric that the job does not report.
        """
        job = with_knobs(self._job, knobs)
        ends = self._ends(job, folders)
        if not ends:
            return None
        starts = folders or [None] * self._config.search.repeats
        done = tuple(
            self._train(job.model_copy(update={"seed": job.seed + repeat}), ends[0], start)
            for repeat, start in enumerate(starts)
        )
        metrics = mean_of([last_report(folder) for folder in done])
        check_metrics(self._config, metrics)
        progress = 1 if ends[0] is None else ends[0]
        # Of several seeds the first stands for the point: the best one would flatter it.
        return done, self._reporter.told(metrics, progress, {}) | {"folder": done[0]}

    def train_anew(self, job: JobConfig) -> dict[str, float]:
        """Train a whole job, and return its last report."""
        own = job.model_copy(update={"tracking": self._job.tracking})
        return last_report(self._train(own, None, None))

    def _ends(self, job: JobConfig, folders: Sequence[str]) -> Sequence[int | None]:
        """Return the steps at which stretches still end; None is the end of a whole training."""
        if self._config.search.scheduler.kind == "none":
            return () if folders else (None,)
        assert job.train.steps is not None, "the job was checked"
        step = last_report(folders[0])["step"] if folders else 0
        steps = report_steps(self._config.search.scheduler, job.train.steps)
        return [end for end in steps if end > step]

    def _train(self, job: JobConfig, until: int | None, start: str | None) -> str:
        stretch = None
        if until is not None:
            stretch = Stretch(until=until, start=None if start is None else Path(start))
        digest = config_hash(job) if stretch is None else stretch_hash(job, stretch)
        output = Path(self._config.output) / TRAININGS / digest
        # Two trials may have come to the same knobs.
        with self._locks.setdefault(digest, threading.Lock()):
            return str(train(job.model_copy(update={"output": str(output)}), stretch=stretch))


def last_report(folder: str) -> dict[str, float]:
    """Return what a training reported last."""
    record = read_record(folder)
    assert record is not None, "a training wrote this folder"
    return record["metrics"]


def mean_of(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in reports) / len(reports) for name in reports[0]}


def _tracking(config: TrainingSearchConfig, job: JobConfig, parent: str | None) -> TrainTracking:
    """The search's own, under its run; of what it trains, the winner alone is registered."""
    shared = config.tracking.model_dump() | {"parent": parent, "register_as": None}
    return TrainTracking(**shared, system_metrics_every=job.tracking.system_metrics_every)
