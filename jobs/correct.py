"""Run an Aligner over a data set of answers on Ray actors, and keep the corrections as rows.

    python -m jobs.correct CONFIG [key=value ...] [--dry-run]

Rows have `prompt`, `answer`, `correction`, `copied` and `finish_reason`, and where a judge is named
`answer_reward` and `correction_reward`. `pairs.jsonl` beside them prefers corrections to answers,
copies left out.

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from jobs.command import run_command
from jobs.corrector import Corrector, aligner_settings
from jobs.pool import Chunk, chunks_of, run_chunks
from jobs.resolve import content_hash, identity
from jobs.rows import PAIRS_NAME, Recipe, Row, make_rows, show, write_rows
from jobs.rows_config import CorrectConfig, KitchenAnswers, resolved_correct, reward_identity
from pilotfish import world
from pilotfish.data.formats import Columns, to_answered
from pilotfish.data.loading import load_records
from pilotfish.data.preferences import preference_rows
from pilotfish.data.records import Demonstration
from pilotfish.evaluation.metrics import estimate, share


def correct(config: CorrectConfig) -> Path:
    """Run the job and return the folder of rows; see `make_rows`.

    Raises `ConfigError`, `CheckpointError` or `DataError`.
    """
    config = resolved_correct(config)
    settings = aligner_settings(config.aligner)  # a wrong one should not cost a cluster's start
    answers = _answers(config)

    def make(
        missing: Sequence[Chunk[Demonstration]],
    ) -> Iterator[tuple[Chunk[Demonstration], list[Row]]]:
        return run_chunks(Corrector, (config,), missing, config.actors, title="correcting")

    recipe = Recipe(
        job="correct",
        digest=content_hash(
            {
                "aligner": identity(config.aligner),
                "settings": settings.model_dump(mode="json"),
                "actors": config.actors.decisive(),
                "reward": reward_identity(config.reward),
                "answers": [(one.prompt, one.completion) for one in answers],
            }
        ),
        chunks=chunks_of(answers, config.actors.chunk_size),
        make=make,
        finish=partial(_finish, len(answers)),
    )
    return make_rows(config, recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="correct",
        about="Run an Aligner over a data set of answers.",
        config_type=CorrectConfig,
        resolved=resolved_correct,
        run=lambda config: show(correct(config)),
    )


def _answers(config: CorrectConfig) -> list[Demonstration]:
    source = config.answers
    if isinstance(source, KitchenAnswers):
        rows = world.corpus(source.num, source.seed)
        return [to_answered(row, Columns()) for row in rows]
    return load_records(source, to_answered, part=source.part).records


def _finish(num_answers: int, folder: Path, rows: list[Row]) -> dict[str, float]:
    pairs, report = preference_rows(rows)
    write_rows(folder / PAIRS_NAME, pairs)
    metrics: dict[str, float] = {
        "corrections/num": len(rows),
        "corrections/left_out": num_answers - len(rows),
        "corrections/copied_share": share([row["copied"] for row in rows]),
        **report.metrics(),
    }
    if "correction_reward" in rows[0]:
        gain = estimate([row["correction_reward"] - row["answer_reward"] for row in rows])
        metrics |= {"corrections/gain": gain.mean, "corrections/gain_error": gain.error}
        for name in ("answer_reward", "correction_reward"):
            metrics[f"corrections/{name}"] = estimate([row[name] for row in rows]).mean
    return metrics


if __name__ == "__main__":
    sys.exit(main())
