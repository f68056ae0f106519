"""Compare a base with itself under guides, and with the controls, on Ray actors.

    python -m jobs.evaluate CONFIG [key=value ...] [--dry-run]

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import tracking
from jobs.command import run_command
from jobs.decoder import check_setting, decode_all, read_cards
from jobs.evaluation_config import EvaluationConfig, resolved
from jobs.prompts import prompts_of
from pilotfish.evaluation.page import PAGE_NAME, write_page
from pilotfish.evaluation.plots import draw_plots
from pilotfish.evaluation.report import Report, save_report
from pilotfish.evaluation.rewards import describe
from pilotfish.evaluation.summary import About, summarise
from pilotfish.evaluation.text import as_table
from pilotfish.models.loading import load_tokenizer

logger = logging.getLogger(__name__)


def evaluate(config: EvaluationConfig) -> Report:
    """Run the evaluation, write its report to `output`, and return it with every answer.

    Raises `ConfigError`, `CheckpointError`, `VocabMismatchError`, `DataError` or `PromptError`.
    """
    config = resolved(config)
    tokenizer = load_tokenizer(config.base)
    cards = read_cards(config, tokenizer)
    for setting in config.settings:
        check_setting(setting, cards)
    prompts, prompts_from = prompts_of(config.prompts, tokenizer)
    with tracking.tracked_run(
        config.tracking,
        root=config.root,
        name=Path(config.output).name,
        settings=config.model_dump(mode="json"),
        tags={"job": "evaluate", "base": config.base},
    ) as run:
        about = About(
            title=config.title,
            base=config.base,
            guides={name: str(source) for name, source in config.guides.items()},
            prompts_from=prompts_from,
            reward=describe(config.reward),
            config=config.model_dump(mode="json"),
            run_id=None if run is None else run.run_id,
        )
        report = summarise(decode_all(config, prompts), prompts, about=about, seed=config.seed)
        _write(report, Path(config.output))
        if run is not None:
            run.log_metrics(report.metrics())
            run.log_folder(config.output, "report")
    logger.info("wrote %s", Path(config.output) / PAGE_NAME)
    return report


def _write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_report(report, folder)
    write_page(report, folder, draw_plots(report, folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="evaluate",
        about="Compare a base with itself under guides.",
        config_type=EvaluationConfig,
        resolved=resolved,
        run=_evaluate_and_show,
    )


def _evaluate_and_show(config: EvaluationConfig) -> str:
    page = Path(resolved(config).output) / PAGE_NAME
    return f"{as_table(evaluate(config))}\n\nreport: {page}"


if __name__ == "__main__":
    sys.exit(main())
