"""What a search found: typed, saved as files, and read back as it was.

results.json    every trial with its knobs and metrics, the best, the Pareto set, the confirmation
winner.json     the knobs of the best point, and what they were worth on held-out prompts
search.html     the same for people; see `tune.page`
*.png           the plots in it
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pilotfish.config import Config
from pilotfish.errors import DataError, PilotfishError
from pilotfish.evaluation.metrics import Comparison, Estimate
from pilotfish.evaluation.settings import Setting
from tune.choice import Trial, best_of, bound_of, nearest_to_feasible, pareto_set
from tune.config import Constraint, Objective, SearchConfig
from tune.space import show

RESULTS_NAME, WINNER_NAME = "results.json", "winner.json"


class Gain(Config):
    """The winner over the setting as it stood, prompt by prompt."""

    mean: Estimate
    """Of the differences."""
    comparison: Comparison


class Confirmation(Config):
    """The winner, the setting as it stood and the base on prompts that the search never saw."""

    unit: str = "prompts"
    """What there is a difference for: each prompt, or of `trainings` each seed."""
    prompts_from: str
    num_prompts: int
    """Or trainings."""
    repeats: int
    settings: dict[str, Setting]
    """By role: `winner`, `default`, `base`; empty for trainings."""
    metrics: dict[str, dict[str, float]]
    """By role."""
    gains: dict[str, Gain]
    """By metric that every answer has by itself."""
    violations: dict[str, float]
    """Constraints that the winner breaks here; see `Trial.violations`."""


class SearchReport(Config):
    """Everything a search found."""

    title: str
    created: str
    unit: str
    """What progress is counted in: `prompts` or `steps`."""
    end: int
    """Progress of a trial that ran to its end."""
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    base: dict[str, float]
    """Metrics of the base alone on the same prompts; empty where no base is compared with."""
    trials: tuple[Trial, ...]
    best: int | None
    """Number of the best trial; None if none is feasible."""
    pareto: tuple[int, ...]
    """Numbers of the trials that no other beats in all objectives."""
    confirmation: Confirmation | None = None
    config: dict[str, Any]
    run_id: str | None = None

    @property
    def winner(self) -> Trial | None:
        return None if self.best is None else self.trials[self.best]


def report_of(
    config: SearchConfig,
    trials: Sequence[Trial],
    *,
    unit: str,
    end: int,
    base: dict[str, float],
) -> SearchReport:
    """Return the report of a search whose winner has not been confirmed."""
    best = best_of(trials, config.objectives)
    return SearchReport(
        title=config.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        unit=unit,
        end=end,
        objectives=config.objectives,
        constraints=config.constraints,
        base=base,
        trials=tuple(trials),
        best=None if best is None else best.number,
        pareto=tuple(trial.number for trial in pareto_set(trials, config.objectives)),
        config=config.model_dump(mode="json"),
    )


def nothing_feasible(report: SearchReport) -> PilotfishError:
    """Return the error that says which constraints the nearest point breaks, and by how much."""
    nearest = nearest_to_feasible(report.trials)
    lines = []
    for constraint in report.constraints:
        if str(constraint) in nearest.violations:
            found = nearest.metrics[constraint.metric]
            bound = bound_of(constraint, report.base)
            lines.append(f"{constraint} by {abs(found - bound):.4g} (it has {found:.4g})")
    return PilotfishError(
        f"none of {len(report.trials)} points keeps all constraints. Nearest is "
        f"{show(nearest.knobs)}, which breaks {'; '.join(lines)}. Widen the space, or "
        "loosen the constraints."
    )


def save_report(report: SearchReport, folder: str | Path) -> None:
    """Write `results.json`, and `winner.json` if there is a winner."""
    folder = Path(folder)
    _write(folder / RESULTS_NAME, report.model_dump(mode="json"))
    if report.winner is not None:
        winner = report.winner.model_dump(mode="json", include={"number", "knobs", "metrics"})
        confirmation = report.confirmation
        confirmed = None if confirmation is None else confirmation.model_dump(mode="json")
        _write(folder / WINNER_NAME, {**winner, "confirmation": confirmed})


def load_results(folder: str | Path) -> SearchReport:
    """Read a search's folder back. Raises `DataError` if it holds no finished search."""
    path = Path(folder) / RESULTS_NAME
    try:
        return SearchReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f"{str(folder)!r} holds no results of a search: {error}. Make them with "
            "python -m tune.search."
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
