"""Search over training knobs: every trial trains a job, and the winner is what the best made."""

import logging
import shutil
from pathlib import Path
from typing import Any

import ray.tune

from jobs import cluster
from jobs.config import JobConfig
from jobs.output import with_output
from jobs.records import version_tags
from jobs.resolve import config_hash, content_hash
from jobs.stretch import CHECKPOINT_FOLDER
from jobs.tracking import TrackedRun
from pilotfish.errors import ConfigError
from pilotfish.evaluation.metrics import compare, estimate
from pilotfish.train.export import read_record, whole_folder
from tune.choice import Trial, violations
from tune.config import PBT, TrainingSearchConfig
from tune.page import report_files, write_report
from tune.population import population
from tune.report import (
    Confirmation,
    Gain,
    SearchReport,
    load_results,
    nothing_feasible,
    report_of,
    save_report,
)
from tune.state import begin, write_state
from tune.tracked import tracked_search
from tune.trainer import Trainer, check_room, clock_of, job_of, mean_of, with_knobs
from tune.training_trial import training_trial
from tune.trials import run_trials

logger = logging.getLogger(__name__)

WINNER = "winner"
"""Folder in the output of a search: the model or guide of the best trial."""

# Seeds of a confirmation: behind any that repeats have.
_OTHER_SEEDS = 1000


def search_training(config: TrainingSearchConfig, *, resume: bool = False) -> SearchReport:
    """Run the search, write its report and the winner to `output`, and return the report.

    Raises `ConfigError` before anything starts, what a training raises, and `PilotfishError` if no
    point keeps the constraints.
    """
    config = with_output(config)
    job = job_of(config)
    again = None if config.confirm is None else _confirming(config, job)
    state = begin(config.output, _digest(config, job), resume=resume)
    if state.is_done:
        logger.info("%s holds this search already", config.output)
        return _winning(load_results(config.output))
    num_trials = config.search.max_concurrent_trials
    cluster.connect(num_cpus=job.num_cpus * num_trials, gpus=job.scaling.use_gpu)
    check_room(job, num_trials)
    with tracked_search(config, state) as run:
        run_id = None if run is None else run.run_id
        actor: Any = ray.remote(Trainer).options(num_cpus=0, max_concurrency=num_trials)
        trainer = actor.remote(config, job, parent=run_id)
        try:
            report = _search(config, job, trainer).model_copy(update={"run_id": run_id})
            winner = report.winner
            if winner is not None and again is not None:
                found = _confirm(config, winner, job, again, trainer)
                report = report.model_copy(update={"confirmation": found})
            if winner is not None:
                _keep(config, winner, run)
        finally:
            ray.kill(trainer)
        save_report(report, config.output)
        write_report(report, config.output)
        if run is not None:
            run.log_metrics({} if report.winner is None else report.winner.metrics)
            for path in report_files(config.output):
                run.client.log_artifact(run.run_id, str(path), "search")
        write_state(config.output, state.model_copy(update={"is_done": True, "run_id": run_id}))
    return _winning(report)


def _search(config: TrainingSearchConfig, job: JobConfig, trainer: Any) -> SearchReport:
    clock, copies = clock_of(config, job), config.search.scheduler.kind == "pbt"
    trials = run_trials(
        ray.tune.with_parameters(training_trial, trainer=trainer, has_checkpoints=copies),
        config,
        clock,
        on_trial=lambda trial: None,  # its trainings have runs of their own
        scheduler=population(config) if copies else None,
    )
    return report_of(config, trials, unit=clock.unit, end=clock.end, base={})


def _confirming(config: TrainingSearchConfig, job: JobConfig) -> JobConfig:
    """Return the job on the held-out rows of the confirmation. Raises `ConfigError`."""
    assert config.confirm is not None, "the caller looked"
    if isinstance(config.search.scheduler, PBT):
        raise ConfigError(
            "confirm trains the best knobs again, but pbt finds weights, and knobs that changed on "
            "the way. Leave confirm out, and evaluate the winner on other prompts."
        )
    overrides = (*config.overrides, *config.confirm.overrides)
    again = job_of(config.model_copy(update={"overrides": overrides}))
    if again.data == job.data:
        raise ConfigError(
            "confirm.overrides leave the rows as the search has them, so they would confirm "
            "nothing. Give other held-out ones, as by data.heldout_seed."
        )
    return again


def _confirm(
    config: TrainingSearchConfig, winner: Trial, job: JobConfig, again: JobConfig, trainer: Any
) -> Confirmation:
    """Train the winner's knobs and the job's own anew, with other seeds and held-out rows."""
    assert config.confirm is not None, "the caller looked"
    seeds = [job.seed + _OTHER_SEEDS + number for number in range(config.confirm.seeds)]
    jobs = {"winner": with_knobs(again, winner.knobs), "default": again}
    asked = {
        role: [trainer.train_anew.remote(one.model_copy(update={"seed": seed})) for seed in seeds]
        for role, one in jobs.items()
    }
    reports = {role: ray.get(refs) for role, refs in asked.items()}
    gains = {}
    for objective in config.objectives:
        name = objective.metric
        better, before = ([one[name] for one in reports[role]] for role in ("winner", "default"))
        gains[name] = Gain(
            mean=estimate([a - b for a, b in zip(better, before, strict=True)]),
            comparison=compare(better, before, seed=config.seed),
        )
    metrics = {role: mean_of(own) for role, own in reports.items()}
    return Confirmation(
        unit="trainings",
        prompts_from=f"Held-out rows by {' '.join(config.confirm.overrides)}",
        num_prompts=len(seeds),
        repeats=1,
        settings={},
        metrics=metrics,
        gains=gains,
        violations=violations(metrics["winner"], config.constraints, {}),
    )


def _keep(config: TrainingSearchConfig, winner: Trial, run: TrackedRun | None) -> None:
    """Copy what the best trial made, and register it if the config names it."""
    assert winner.folder is not None, "trials of trainings have folders"
    kept = Path(config.output) / WINNER
    with whole_folder(kept) as folder:
        rest = shutil.ignore_patterns(CHECKPOINT_FOLDER)
        shutil.copytree(winner.folder, folder, ignore=rest, dirs_exist_ok=True)
    if run is not None and config.tracking.register_as is not None:
        record = read_record(kept)
        assert record is not None, "a training wrote this folder"
        run.register(kept, config=config.tracking, tags=version_tags(job_of(config), record))


def _digest(config: TrainingSearchConfig, job: JobConfig) -> str:
    content = config.model_dump(
        mode="json", exclude={"root", "output", "title", "tracking", "job", "overrides"}
    )
    return content_hash({**content, "trained": config_hash(job)})


def _winning(report: SearchReport) -> SearchReport:
    if report.winner is None:
        raise nothing_feasible(report)
    return report
