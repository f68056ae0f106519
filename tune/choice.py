"""What is good: constraints that a point keeps or breaks, the best point, and the Pareto set."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from pilotfish.config import Config
from tune.config import Constraint, Objective

# Below every score of a point that keeps its constraints.
_INFEASIBLE = -1e6


class Trial(Config):
    """A point of the space, and how it did."""

    number: int
    knobs: dict[str, Any]
    metrics: dict[str, float]
    """As last reported."""
    progress: int
    """Prompts answered, or steps trained, when that was."""
    complete: bool
    """Whether it ran to its end; if not, the scheduler stopped it."""
    violations: dict[str, float] = Field(default_factory=dict)
    """By constraint that is broken: by how much of its bound."""
    folder: str | None = None
    """What it trained, if it trains."""

    @property
    def is_feasible(self) -> bool:
        return not self.violations


def bound_of(constraint: Constraint, base: Mapping[str, float]) -> float:
    """Return the number that a metric is held against; `base` has the metrics of the base."""
    return constraint.bound * base[constraint.metric] if constraint.of_base else constraint.bound


def violations(
    metrics: Mapping[str, float], constraints: Sequence[Constraint], base: Mapping[str, float]
) -> dict[str, float]:
    """Return by how much each constraint is broken, as a share of its bound (of 1, if that is 0);
    those that are kept are left out."""
    broken = {}
    for constraint in constraints:
        bound = bound_of(constraint, base)
        over = metrics[constraint.metric] - bound
        if (over if constraint.at_most else -over) > 0:
            broken[str(constraint)] = abs(over) / (abs(bound) or 1.0)
    return broken


def scores(
    metrics: Mapping[str, float], broken: Mapping[str, float], objectives: Sequence[Objective]
) -> dict[str, float]:
    """Return what search algorithms and schedulers maximise, a number for each objective.

    Any point that keeps the constraints is above any that breaks one, and of these the one that
    breaks them by less is above: Deb, "An efficient constraint handling method for genetic
    algorithms", CMAME 2000.
    """
    if broken:
        return dict.fromkeys(score_names(objectives), _INFEASIBLE - sum(broken.values()))
    numbers = [_signed(metrics, objective) for objective in objectives]
    return dict(zip(score_names(objectives), numbers, strict=True))


def score_names(objectives: Sequence[Objective]) -> list[str]:
    return [f"score_{place}" for place in range(len(objectives))]


def best_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Trial | None:
    """Return the complete, feasible trial that is best by the first objective, if there is one.

    Equals are told apart by the other objectives; among the rest the earliest wins.
    """
    return max(_candidates(trials), key=lambda trial: _point(trial, objectives), default=None)


def pareto_set(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the complete, feasible trials that no other beats in one objective without losing in
    another; the earliest of equals."""
    points = {trial.number: _point(trial, objectives) for trial in _candidates(trials)}
    front: dict[tuple[float, ...], Trial] = {}
    for trial in _candidates(trials):
        point = points[trial.number]
        if not any(_dominates(other, point) for other in points.values()):
            front.setdefault(point, trial)
    return list(front.values())


def nearest_to_feasible(trials: Sequence[Trial]) -> Trial:
    """Return the trial that breaks its constraints by least; complete ones count before others."""
    return min(trials, key=lambda trial: (not trial.complete, sum(trial.violations.values())))


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _candidates(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.complete and trial.is_feasible]


def _point(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...]:
    return tuple(_signed(trial.metrics, objective) for objective in objectives)


def _signed(metrics: Mapping[str, float], objective: Objective) -> float:
    value = metrics[objective.metric]
    return value if objective.mode == "max" else -value
