"""Have a base, with guides or without, answer prompts on Ray actors, and keep the answers as rows.

    python -m jobs.answer CONFIG [key=value ...] [--dry-run]

Rows have `prompt`, `completion`, `model`, `seed` and `finish_reason`, and where a judge is named
`reward` and `bad`. With several answers to each prompt and a judge, `pairs.jsonl` beside them holds
the best, preferred to the worst.

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from jobs.command import run_command
from jobs.decoder import Decoder, Part, read_cards
from jobs.pool import Chunk, chunks_of, run_chunks
from jobs.prompts import prompts_of
from jobs.resolve import content_hash, identified, identity
from jobs.rows import PAIRS_NAME, Recipe, Row, make_rows, show, write_rows
from jobs.rows_config import AnswerConfig, resolved_answer, reward_identity
from pilotfish.data.preferences import as_turn, best_of_each, preference_rows
from pilotfish.data.records import PromptText
from pilotfish.evaluation.metrics import estimate, share
from pilotfish.evaluation.rewards import NoRewardConfig
from pilotfish.models.loading import load_tokenizer


def answer(config: AnswerConfig) -> Path:
    """Run the job and return the folder of rows; see `make_rows`.

    Raises `ConfigError`, `CheckpointError`, `VocabMismatchError`, `DataError` or `PromptError`.
    """
    config = resolved_answer(config)
    tokenizer = load_tokenizer(config.base)
    read_cards(config, tokenizer)  # a wrong guide should not cost a cluster's start
    prompts, _ = prompts_of(config.prompts, tokenizer)
    chunks = chunks_of(
        [prompt for prompt in prompts for _ in range(config.num_answers)],
        config.decoding.chunk_size,
        label=config.setting.name,
    )

    def make(missing: Sequence[Chunk[PromptText]]) -> Iterator[tuple[Chunk[PromptText], list[Row]]]:
        told = (config, [config.setting])
        for chunk, part in run_chunks(Decoder, told, missing, config.decoding, title="answering"):
            yield chunk, _rows_of(config, chunk, part)

    recipe = Recipe(
        job="answer",
        digest=_digest(config, prompts),
        chunks=chunks,
        make=make,
        finish=partial(_finish, config),
    )
    return make_rows(config, recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="answer",
        about="Have a base answer prompts, and keep the answers as rows.",
        config_type=AnswerConfig,
        resolved=resolved_answer,
        run=lambda config: show(answer(config)),
    )


def _digest(config: AnswerConfig, prompts: Sequence[PromptText]) -> str:
    return content_hash(
        {
            "base": identity(config.base),
            "guides": identified(config.guides),
            "setting": config.setting.model_dump(mode="json"),
            "decoding": config.decoding.decisive(),
            "seed": config.seed,
            "num_answers": config.num_answers,
            "reward": reward_identity(config.reward),
            "prompts": prompts,
        }
    )


def _rows_of(config: AnswerConfig, chunk: Chunk[PromptText], part: Part) -> list[Row]:
    rows: list[Row] = []
    for number, (prompt, answer) in enumerate(zip(chunk.items, part.answers, strict=True)):
        row: Row = {
            "prompt": prompt,
            "completion": as_turn(prompt, answer.text),
            "model": ":".join([config.base, *config.weights]),
            "seed": config.seed + chunk.start + number,
            "finish_reason": answer.finish_reason,
        }
        if answer.reward is not None:
            row |= {"reward": answer.reward, "bad": answer.bad}
        rows.append(row)
    return rows


def _finish(config: AnswerConfig, folder: Path, rows: list[Row]) -> dict[str, float]:
    metrics: dict[str, float] = {
        "answers/num": len(rows),
        "answers/cut_share": share([row["finish_reason"] == "length" for row in rows]),
    }
    if isinstance(config.reward, NoRewardConfig):
        return metrics
    reward = estimate([row["reward"] for row in rows])
    metrics |= {"answers/reward": reward.mean, "answers/reward_error": reward.error}
    metrics["answers/bad_share"] = share([row["bad"] for row in rows])
    if config.num_answers > 1:
        pairs, report = preference_rows(best_of_each(rows))
        write_rows(folder / PAIRS_NAME, pairs)
        metrics |= report.metrics()
    return metrics


if __name__ == "__main__":
    sys.exit(main())
