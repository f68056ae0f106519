"""Population based training: trials copy better ones and go on from there with other knobs.

Jaderberg et al., "Population Based Training of Neural Networks", 2017. All trials stop at every
interval and wait for the others, so what is copied does not depend on who came first, and a search
that is run again makes the same decisions.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.schedulers import PopulationBasedTraining

from jobs.config import JobConfig
from jobs.stretch import CHANGEABLE
from pilotfish.errors import ConfigError
from pilotfish.train.sac import SACConfig
from tune.choice import score_names
from tune.config import PBT, TrainingSearchConfig
from tune.space import Distribution


def check_population(config: TrainingSearchConfig, job: JobConfig) -> None:
    """Raise `ConfigError` for knobs that cannot change while a job trains, and for a plan that
    copies nothing."""
    plan = config.search.scheduler
    assert isinstance(plan, PBT), "the caller looked"
    for key in config.space:
        if key not in CHANGEABLE:
            raise ConfigError(
                f"{key} cannot change in the middle of a training: it decides shapes, rows or the "
                f"number of steps, or is restored with the optimizer. pbt moves "
                f"{', '.join(sorted(CHANGEABLE))}. Search {key} with another scheduler."
            )
    if isinstance(getattr(job.objective, "algorithm", None), SACConfig):
        raise ConfigError(
            "objective.algorithm is sac, whose optimizers are restored with their settings, so pbt "
            "has nothing to change. Use ppo, or another scheduler."
        )
    if config.search.algorithm != "random" or config.search.repeats > 1:
        raise ConfigError("pbt draws and compares by itself: algorithm: random, and repeats: 1")
    if _size(config) < 2:
        raise ConfigError("a population of one has nobody to copy: search.num_samples of 2 or more")
    if job.train.steps is not None and plan.perturbation_interval >= job.train.steps:
        raise ConfigError(
            f"search.scheduler.perturbation_interval is {plan.perturbation_interval}, so nothing "
            f"is copied in {job.train.steps} steps. Wanted fewer."
        )


def population(config: TrainingSearchConfig) -> PopulationBasedTraining:
    """Return Tune's scheduler."""
    plan = config.search.scheduler
    assert isinstance(plan, PBT), "the caller looked"
    return Population(
        config.seed,
        time_attr="progress",
        metric=score_names(config.objectives)[0],
        mode="max",
        perturbation_interval=plan.perturbation_interval,
        quantile_fraction=plan.quantile_fraction,
        resample_probability=plan.resample_probability,
        # Values in a list move to their neighbours. Tune would multiply a `choice`.
        hyperparam_mutations={
            key: values.to_tune() if values.is_numeric else list(values.arguments)
            for key, values in config.space.items()
        },
        custom_explore_fn=lambda knobs: within(config.space, knobs),
        synch=True,
    )


def _size(config: TrainingSearchConfig) -> int:
    grids = [len(values.grid_search) for values in config.space.values() if values.grid_search]
    return len(config.search.points) + config.search.num_samples * math.prod(grids)


def within(space: Mapping[str, Distribution], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return knobs moved back into the space: Tune multiplies them, whatever the bounds."""
    inside = dict(knobs)
    for key, values in space.items():
        if values.is_numeric:
            low, high = values.corners
            inside[key] = min(max(inside[key], low), high)
        if values.quniform:
            step = values.quniform[2]
            inside[key] = round(inside[key] / step) * step
    return inside


class Population(PopulationBasedTraining):
    """Decides by numbers that depend on the seed and the step alone.

    Tune draws from the process's own random numbers, which anything else may draw from too.
    """

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._seed = seed

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        mixed = random.Random(f"{self._seed} {result['progress']}").getrandbits(32)
        random.seed(mixed)
        np.random.seed(mixed)
        return super().on_trial_result(tune_controller, trial, result)
