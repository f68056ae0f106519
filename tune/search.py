"""Search for the best knobs of decoding, or of a training, on Ray Tune.

    python -m tune.search CONFIG [key=value ...] [--resume] [--apply] [--dry-run]

A config that names a `job` searches over knobs of that training, any other over decode-time knobs.
A search whose driver died goes on with --resume: what was evaluated is read back, so it walks the
same path and ends with the same winner.

Exit codes: 0 done, 1 the search failed or no point keeps the constraints, 2 the config cannot be
honoured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from jobs.command import run_command
from jobs.output import with_output
from pilotfish.errors import ConfigError
from tune.config import DecodingSearchConfig, SearchConfig, TrainingSearchConfig, resolved_decoding
from tune.decoding import search_decoding
from tune.knobs import apply_to_cards, check_applicable
from tune.page import PAGE_NAME
from tune.report import SearchReport
from tune.space import show
from tune.trainer import job_of
from tune.training import WINNER, search_training

_FLAGS = {
    "resume": "go on with a search that was not finished",
    "apply": "write the winning knobs into the cards of their guides, as defaults",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        package="tune",
        job="search",
        example="tune/configs/kitchen/proxy.yaml",
        about="Search for the best knobs.",
        config_type=SearchConfig,
        kind_of=_kind,
        resolved=_resolved,
        run=_search_and_show,
        flags=_FLAGS,
    )


def _kind(path: str, overrides: Sequence[str]) -> type[SearchConfig]:
    """Return the type of a config: only that of a training names a job."""
    tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
    keys = {*(tree if isinstance(tree, dict) else ()), *(one.split("=")[0] for one in overrides)}
    return TrainingSearchConfig if "job" in keys else DecodingSearchConfig


def _resolved(config: SearchConfig) -> SearchConfig:
    if isinstance(config, TrainingSearchConfig):
        config = with_output(config)
        job_of(config)  # says what cannot be honoured
        return config
    assert isinstance(config, DecodingSearchConfig)
    return resolved_decoding(config)


def _search_and_show(config: SearchConfig, *, resume: bool, apply: bool) -> str:
    if isinstance(config, TrainingSearchConfig):
        return _train_and_show(config, resume=resume, apply=apply)
    assert isinstance(config, DecodingSearchConfig)
    config = resolved_decoding(config)
    if apply:
        check_applicable(config)
    report = search_decoding(config, resume=resume)
    lines = [summary(report), f"report: {Path(config.output) / PAGE_NAME}"]
    if apply:
        lines.append(_applied(config, report))
    return "\n".join(lines)


def _train_and_show(config: TrainingSearchConfig, *, resume: bool, apply: bool) -> str:
    if apply:
        raise ConfigError(
            "--apply writes decode-time knobs into guides' cards; a search over training knobs "
            "writes its best model. Leave it out."
        )
    report = search_training(config, resume=resume)
    output = Path(with_output(config).output)
    return f"{summary(report)}\nwinner: {output / WINNER}\nreport: {output / PAGE_NAME}"


def summary(report: SearchReport) -> str:
    """Return what was found, in a few lines."""
    winner, found = report.winner, report.confirmation
    assert winner is not None, "a search without a winner raises"
    lines = [f"best of {len(report.trials)} points: {show(winner.knobs)}"]
    metric = report.objectives[0].metric
    if found is not None and metric in found.gains:
        gain = found.gains[metric].mean
        lines.append(
            f"{metric} on {found.num_prompts} other {found.unit}: "
            f"{found.metrics['winner'][metric]:.3f} against {found.metrics['default'][metric]:.3f} "
            f"with the knobs as they stood, a difference of {gain.mean:+.3f} ± {gain.error:.3f}"
        )
    if found is not None and found.violations:
        lines.append(f"there it breaks {', '.join(found.violations)}")
    if len(report.objectives) > 1:
        lines.append(f"{len(report.pareto)} points are in the Pareto set")
    return "\n".join(lines)


def _applied(config: DecodingSearchConfig, report: SearchReport) -> str:
    assert report.winner is not None, "a search without a winner raises"
    left = apply_to_cards(config, report.winner.knobs)
    note = f"; {show(left)} belong to the request: send them with it" if left else ""
    return f"wrote the knobs into the cards of {', '.join(config.setting.guides)}{note}"


if __name__ == "__main__":
    sys.exit(main())
