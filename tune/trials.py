"""Trials on Ray Tune: which points are tried, which are stopped early, and what they reported."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from pilotfish.errors import PilotfishError
from tune.choice import Trial, score_names, scores, violations
from tune.config import ASHA, Constraint, Objective, SearchConfig
from tune.space import show

logger = logging.getLogger(__name__)

# Trials only wait for those who work, so they take no CPU; but Tune refuses trials that take
# nothing at all, so they take one byte of memory.
RESOURCES: dict[str, float] = {"cpu": 0, "memory": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What the progress of a trial is counted in."""

    unit: str
    """`prompts`, `steps`, or `trainings` that report at their end alone."""
    first: int
    """Progress at the first report."""
    end: int
    """Progress of a trial that ran to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporter:
    """Reports the metrics of a trial to Tune, with the scores that it goes by."""

    objectives: Sequence[Objective]
    constraints: Sequence[Constraint]

    def report(
        self, metrics: Mapping[str, float], progress: int, base: Mapping[str, float]
    ) -> None:
        """Report what is `told`. The scheduler may end the trial here."""
        ray.tune.report(self.told(metrics, progress, base))

    def told(
        self, metrics: Mapping[str, float], progress: int, base: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return what Tune is told of a trial; `base` has the metrics of the base, where
        constraints speak of it."""
        broken = violations(metrics, self.constraints, base)
        told = {"metrics": dict(metrics), "violations": broken, "progress": progress}
        return {**told, **scores(metrics, broken, self.objectives)}


def run_trials(
    trainable: Callable[[dict[str, Any]], None],
    config: SearchConfig,
    clock: Clock,
    *,
    on_trial: Callable[[Trial], None],
    scheduler: TrialScheduler | None = None,
) -> list[Trial]:
    """Run the search, and return its trials in the order in which they were begun.

    `trainable` takes knobs and reports through a `Reporter`. `on_trial` is called as trials end,
    and `scheduler` is in place of the one that the config names. What a trial raises ends the
    search, and a `PilotfishError` is raised here as it was there.
    """
    _silence_tune()
    shown = [one.metric for one in (*config.objectives, *config.constraints)]
    log = _Log(clock=clock, shown=list(dict.fromkeys(shown)), on_trial=on_trial)
    folder = Path(config.output) / "tune"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
    plan = config.search
    # A random search has its limit itself.
    limit = None if plan.algorithm == "random" else plan.max_concurrent_trials
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, RESOURCES),
        param_space={key: values.to_tune() for key, values in config.space.items()},
        tune_config=ray.tune.TuneConfig(
            search_alg=_searcher(config),
            scheduler=scheduler or _scheduler(config, clock),
            num_samples=len(plan.points) + plan.num_samples,
            max_concurrent_trials=limit,
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(
            name="trials",
            storage_path=str(folder),
            stop={"progress": clock.end},  # or a population would copy once more at its end
            verbose=0,
            callbacks=[log],
            failure_config=ray.tune.FailureConfig(fail_fast=True),
        ),
    )
    results = tuner.fit()
    for error in results.errors:
        raise _cause(error)
    if len(log.trials) < len(results):  # by a signal, which Tune takes for an end
        raise PilotfishError("the search was interrupted. Pass --resume to go on where it stopped.")
    shutil.rmtree(folder)
    return sorted(log.trials, key=lambda trial: trial.number)


def _silence_tune() -> None:
    """What Tune says of itself names files that are about to go; the log and results.json say the
    rest."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune.tune").setLevel(logging.WARNING)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


@dataclass
class _Log(ray.tune.Callback):
    """Keeps what came of each trial."""

    clock: Clock
    shown: Sequence[str]
    """Metrics."""
    on_trial: Callable[[Trial], None]
    trials: list[Trial] = field(default_factory=list)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        ended = Trial(
            number=trials.index(trial),
            knobs=trial.config,
            metrics=last["metrics"],
            progress=last["progress"],
            complete=last["progress"] >= self.clock.end,
            violations=last["violations"],
            folder=last.get("folder"),
        )
        self.trials.append(ended)
        found = ", ".join(f"{name} {ended.metrics[name]:.3f}" for name in self.shown)
        note = "" if ended.complete else f", stopped after {ended.progress} {self.clock.unit}"
        note += f", breaks {', '.join(ended.violations)}" if ended.violations else ""
        logger.info("point %d: %s: %s%s", ended.number + 1, show(ended.knobs), found, note)
        self.on_trial(ended)


def _searcher(config: SearchConfig) -> Any:
    plan, names = config.search, score_names(config.objectives)
    points = [dict(point) for point in plan.points]
    if plan.algorithm == "random":
        return BasicVariantGenerator(
            points_to_evaluate=points,
            # A population is compared, so all of it is begun; its trainings wait for each other.
            max_concurrent=0 if plan.scheduler.kind == "pbt" else plan.max_concurrent_trials,
            random_state=config.seed,
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if plan.algorithm == "optuna_nsga2":
        # Generations are what makes it more than a random search.
        population = max(4, plan.num_samples // 5)
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=config.seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=config.seed)
    several = len(names) > 1
    return OptunaSearch(
        metric=names if several else names[0],
        mode=["max"] * len(names) if several else "max",
        points_to_evaluate=points,
        sampler=sampler,
    )


def _scheduler(config: SearchConfig, clock: Clock) -> TrialScheduler:
    plan = config.search.scheduler
    if not isinstance(plan, ASHA):
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="progress",
        metric=score_names(config.objectives)[0],
        mode="max",
        max_t=clock.end,
        grace_period=min(plan.grace_period or clock.first, clock.end),
        reduction_factor=plan.reduction_factor,
    )


def _cause(error: Exception) -> Exception:
    """Return what a trial raised."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, PilotfishError):
        return error.cause
    return error
