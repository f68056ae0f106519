"""Search over decode-time knobs: one base with its guides serves all trials."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune

from jobs.decoder import check_setting, read_cards
from jobs.decoding_config import KitchenPrompts, RowPrompts
from jobs.pool import crew_of
from jobs.prompts import prompts_of
from jobs.resolve import content_hash, identified, identity
from jobs.rows_config import reward_identity
from jobs.tracking import TrackedRun
from pilotfish.data.records import PromptText
from pilotfish.errors import ConfigError
from pilotfish.evaluation.metrics import compare, estimate
from pilotfish.evaluation.settings import Sampling, Setting
from pilotfish.models.loading import load_tokenizer
from tune import knobs as knobs_of
from tune.choice import Trial, violations
from tune.config import DecodingSearchConfig, resolved_decoding
from tune.evaluations import Evaluator, SharedDecoder, by_prompt, measure
from tune.page import report_files, write_report
from tune.report import (
    Confirmation,
    Gain,
    SearchReport,
    load_results,
    nothing_feasible,
    report_of,
    save_report,
)
from tune.state import State, begin, write_state
from tune.tracked import TrialRuns, tracked_search
from tune.trials import Clock, Reporter, run_trials

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What every trial is told."""

    evaluator: Evaluator
    reporter: Reporter
    setting: Setting
    base: Mapping[int, Mapping[str, float]]
    """Metrics of the base by rung."""


def search_decoding(config: DecodingSearchConfig, *, resume: bool = False) -> SearchReport:
    """Run the search, write its report to `output`, and return it.

    Raises `ConfigError`, `CheckpointError`, `VocabMismatchError`, `DataError` or `PromptError`, and
    `PilotfishError` if no point keeps the constraints.
    """
    config = resolved_decoding(config)
    tokenizer = load_tokenizer(config.base)
    cards = read_cards(config, tokenizer)
    check_setting(config.setting, cards)
    knobs_of.check_space(config, cards)
    prompts, _ = prompts_of(config.prompts, tokenizer)
    others, others_from = prompts_of(config.confirm, tokenizer)
    _check_apart(prompts, others, config)
    rungs = _rungs(config, len(prompts))
    state = begin(config.output, _digest(config), resume=resume)
    if state.is_done:
        logger.info("%s holds this search already", config.output)
        return _winning(load_results(config.output))
    with tracked_search(config, state) as run:
        num_actors = config.decoding.num_actors
        with crew_of(SharedDecoder, (config,), config.decoding, num_actors=num_actors) as crew:
            evaluator = partial(
                Evaluator,
                job=config,
                cards=cards,
                repeats=config.search.repeats,
                folder=Path(config.output) / "evaluations",
                crew=crew,
            )
            searched = evaluator(prompts=prompts, rungs=rungs)
            report = _search(config, searched, TrialRuns(config, run))
            if report.winner is not None:
                held_out = evaluator(prompts=others, rungs=[len(others)])
                found = _confirm(config, report.winner, held_out, others_from)
                report = report.model_copy(update={"confirmation": found})
        report = report.model_copy(update={"run_id": None if run is None else run.run_id})
        _write(report, config.output, run)
        state = State(digest=state.digest, run_id=report.run_id, is_done=True)
        write_state(config.output, state)
    return _winning(report)


def _write(report: SearchReport, output: str, run: TrackedRun | None) -> None:
    save_report(report, output)
    write_report(report, output)
    if run is not None:
        run.log_metrics(_summary(report))
        for path in report_files(output):
            run.client.log_artifact(run.run_id, str(path), "search")


def _search(config: DecodingSearchConfig, evaluator: Evaluator, runs: TrialRuns) -> SearchReport:
    plain = _base_of(config.setting)
    base = {rung: evaluator.measure(plain, rung) for rung in evaluator.rungs}
    clock = Clock(unit="prompts", first=evaluator.rungs[0], end=evaluator.rungs[-1])
    told = _Told(
        evaluator=evaluator,
        reporter=Reporter(objectives=config.objectives, constraints=config.constraints),
        setting=config.setting,
        base=base,
    )
    trials = run_trials(
        ray.tune.with_parameters(_trial, told=told), config, clock, on_trial=runs.add
    )
    return report_of(config, trials, unit="prompts", end=clock.end, base=dict(base[clock.end]))


def _trial(knobs: dict[str, Any], *, told: _Told) -> None:
    """Measure a point rung by rung."""
    setting = knobs_of.setting_of(told.setting, knobs, name="trial")
    for rung, base in told.base.items():
        told.reporter.report(told.evaluator.measure(setting, rung), rung, base)


def _confirm(
    config: DecodingSearchConfig, winner: Trial, evaluator: Evaluator, prompts_from: str
) -> Confirmation:
    """Hold the winner against the setting as it stands, on prompts that the search never saw."""
    settings = {
        "winner": knobs_of.setting_of(config.setting, winner.knobs, name="winner"),
        "default": config.setting,
        "base": _base_of(config.setting),
    }
    [num_prompts] = evaluator.rungs
    runs = {role: evaluator.evaluate(setting, num_prompts) for role, setting in settings.items()}
    metrics = {role: measure(own) for role, own in runs.items()}
    better, before = by_prompt(runs["winner"]), by_prompt(runs["default"])
    gains = {
        name: Gain(
            mean=estimate([a - b for a, b in zip(values, before[name], strict=True)]),
            comparison=compare(values, before[name], seed=config.seed),
        )
        for name, values in better.items()
    }
    return Confirmation(
        prompts_from=prompts_from,
        num_prompts=num_prompts,
        repeats=evaluator.repeats,
        settings=settings,
        metrics=metrics,
        gains=gains,
        violations=violations(metrics["winner"], config.constraints, metrics["base"]),
    )


def _base_of(setting: Setting) -> Setting:
    """Return the base alone, drawn from as the setting does."""
    sampling = {name: getattr(setting, name) for name in Sampling.model_fields}
    return Setting(name="base", **sampling)


def _rungs(config: DecodingSearchConfig, num_prompts: int) -> list[int]:
    if config.rungs and config.rungs[-1] > num_prompts:
        raise ConfigError(
            f"the last rung is {config.rungs[-1]}, but there are {num_prompts} prompts. Give more "
            "prompts, or smaller rungs."
        )
    return sorted({*config.rungs, num_prompts})


def _check_apart(
    prompts: Sequence[PromptText], others: Sequence[PromptText], config: DecodingSearchConfig
) -> None:
    known = {str(prompt) for prompt in prompts}
    shared = [prompt for prompt in others if str(prompt) in known]
    if shared:
        raise ConfigError(
            f"{len(shared)} of {len(others)} prompts of confirm are among those of the search, so "
            f"they would confirm nothing: {str(shared[0])[:80]}. Give other ones, by "
            f"{_apart(config.confirm)}."
        )


def _apart(prompts: KitchenPrompts | RowPrompts) -> str:
    return "another confirm.seed" if isinstance(prompts, KitchenPrompts) else "confirm.skip"


def _digest(config: DecodingSearchConfig) -> str:
    content = config.model_dump(mode="json", exclude={"root", "output", "title", "tracking"})
    return content_hash(
        {
            **content,
            "base": identity(config.base),
            "guides": identified(config.guides),
            "reward": reward_identity(config.reward),
            "decoding": config.decoding.decisive(),
        }
    )


def _summary(report: SearchReport) -> dict[str, float]:
    if report.winner is None or report.confirmation is None:
        return {}
    found = report.confirmation
    numbers = {f"winner/{name}": value for name, value in found.metrics["winner"].items()}
    numbers |= {f"gain/{name}": gain.mean.mean for name, gain in found.gains.items()}
    return numbers | {f"gain/{name}_error": gain.mean.error for name, gain in found.gains.items()}


def _winning(report: SearchReport) -> SearchReport:
    if report.winner is None:
        raise nothing_feasible(report)
    return report
