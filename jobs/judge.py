"""Have an LLM compare answers of evaluations in pairs, through any OpenAI-compatible endpoint.

    python -m jobs.judge CONFIG [key=value ...] [--dry-run]

Each pair of answers is shown in both orders. `output` then holds

judge.json       win, tie and loss of each pair, what the order did, and the tokens that were paid
verdicts.jsonl   one line per pair and prompt: both answers, both replies, and the scores in them
replies.jsonl    every reply as it came. Run the job again after it was killed, or with further
                 pairs or prompts, and nothing in there is asked or paid for again

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import tracking
from jobs.command import run_command
from jobs.judge_config import JudgeConfig, resolved
from jobs.judge_endpoint import Reply, ask_all
from jobs.resolve import content_hash
from jobs.rows import write_rows
from pilotfish.config import Config
from pilotfish.correction import question_of
from pilotfish.errors import ConfigError, DataError
from pilotfish.evaluation.judge import Shown, Verdict, cut, find_template, read_scores, weigh
from pilotfish.evaluation.report import load_report
from pilotfish.evaluation.settings import tracker_name
from pilotfish.evaluation.text import aligned

logger = logging.getLogger(__name__)

RESULT_NAME = "judge.json"
VERDICTS_NAME = "verdicts.jsonl"
REPLIES_NAME = "replies.jsonl"

Pair = tuple[str, str]


class Judged(Config):
    """All that a judge found."""

    title: str
    model: str
    num_prompts: int
    verdicts: dict[str, Verdict]
    """By `first vs second`."""
    num_replies: int
    prompt_tokens: int
    """Of all requests that these verdicts rest on, whenever they were paid."""
    completion_tokens: int
    config: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return every number as `pair/metric`."""
        numbers: dict[str, float] = {
            f"judge/{name}": getattr(self, name)
            for name in ("num_replies", "prompt_tokens", "completion_tokens")
        }
        for pair, verdict in self.verdicts.items():
            found = verdict.model_dump()
            for name, value in {**found.pop("comparison"), **found}.items():
                numbers[f"{tracker_name(pair)}/{name}"] = value
        return numbers


class Question(NamedTuple):
    """A prompt's two answers in one order."""

    key: str
    text: str


def judge(config: JudgeConfig) -> Judged:
    """Ask what was not asked before, write the verdicts to `output`, and return them.

    Raises `ConfigError`, `DataError` or `EndpointError`.
    """
    config = resolved(config)
    prompts, answers = _contest(config)
    questions = {pair: _questions(config, pair, prompts, answers) for pair in config.pairs}
    every = {one.key: one.text for asked in questions.values() for both in asked for one in both}
    output = Path(config.output)
    with tracking.tracked_run(
        config.tracking,
        root=config.root,
        name=output.name,
        settings=config.model_dump(mode="json"),
        tags={"job": "judge", "judge": config.endpoint.model},
    ) as run:
        replies = ask_all(every, config.endpoint, output / REPLIES_NAME)
        found = {
            pair: [Shown(*(read_scores(replies[one.key].text) for one in both)) for both in asked]
            for pair, asked in questions.items()
        }
        judged = Judged(
            title=config.title,
            model=config.endpoint.model,
            num_prompts=len(prompts),
            verdicts={
                " vs ".join(pair): weigh(shown, seed=config.seed) for pair, shown in found.items()
            },
            num_replies=len(every),
            prompt_tokens=sum(reply.prompt_tokens for reply in replies.values()),
            completion_tokens=sum(reply.completion_tokens for reply in replies.values()),
            config=config.model_dump(mode="json"),
        )
        _write(output, judged, _rows(prompts, answers, questions, replies, found))
        if run is not None:
            run.log_metrics(judged.metrics())
            run.log_folder(output, "judge")
    return judged


def _contest(config: JudgeConfig) -> tuple[list[str], dict[str, list[str]]]:
    """Return the prompts as text, and each contestant's answers to them."""
    reports = {one.report: load_report(one.report) for one in config.contestants.values()}
    (first, report), *others = reports.items()
    for folder, other in others:
        if other.prompts[: config.num] != report.prompts[: config.num]:
            raise DataError(
                f"{folder!r} answers other prompts than {first!r}, so the two cannot be compared. "
                "Evaluate them with the same section `prompts`."
            )
    answers: dict[str, list[str]] = {}
    for name, one in config.contestants.items():
        settings = [result.setting.name for result in reports[one.report].results]
        if one.setting not in settings:
            raise ConfigError(
                f"contestants.{name}.setting is {one.setting!r}, but {one.report!r} has "
                f"{', '.join(map(repr, settings))}."
            )
        found = reports[one.report].result(one.setting).answers[: config.num]
        answers[name] = [cut(answer.text, config.cut_at) for answer in found]
    prompts: Sequence[Any] = report.prompts[: config.num]
    return [question_of(prompt) for prompt in prompts], answers


def _questions(
    config: JudgeConfig,
    pair: Pair,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
) -> list[tuple[Question, Question]]:
    """Return what is asked about each prompt: with ours first, and with ours second."""
    template = find_template(config.template)
    told = config.endpoint.model_dump(include={"model", "base_url", "request"})

    def question(prompt: str, first: str, second: str) -> Question:
        text = template.render(prompt, first, second)
        return Question(key=content_hash({**told, "text": text}), text=text)

    return [
        (question(prompt, ours, theirs), question(prompt, theirs, ours))
        for prompt, ours, theirs in zip(prompts, *(answers[side] for side in pair), strict=True)
    ]


def _rows(
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    questions: Mapping[Pair, Sequence[tuple[Question, Question]]],
    replies: Mapping[str, Reply],
    found: Mapping[Pair, Sequence[Shown]],
) -> list[dict[str, Any]]:
    """Return a row per pair and prompt; `replies` and `scores` are in the order asked: ours first,
    then ours second."""
    return [
        {
            "pair": pair,
            "prompt": prompt,
            "answers": {side: answers[side][number] for side in pair},
            "replies": [replies[one.key].text for one in questions[pair][number]],
            "scores": found[pair][number],
        }
        for pair in questions
        for number, prompt in enumerate(prompts)
    ]


def _write(folder: Path, judged: Judged, rows: Sequence[dict[str, Any]]) -> None:
    write_rows(folder / VERDICTS_NAME, rows)
    text = json.dumps(judged.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / RESULT_NAME).write_text(text + "\n", encoding="utf-8")


_HEAD = ("pair", "win", "tie", "loss", "win + ½ tie", "scores", "errors", "first", "agree")


def as_table(judged: Judged) -> str:
    """Return one line per pair, and what it cost."""
    rows = [_HEAD, *(_cells(pair, verdict) for pair, verdict in judged.verdicts.items())]
    return (
        f"{aligned(rows)}\n\n{judged.num_replies} replies of {judged.model}: "
        f"{judged.prompt_tokens:,} tokens read, {judged.completion_tokens:,} written"
    )


def _cells(pair: str, verdict: Verdict) -> tuple[str, ...]:
    found = verdict.comparison
    return (
        pair,
        *(str(number) for number in (found.wins, found.ties, found.losses)),
        f"{found.win_rate:.1%} [{found.win_rate_low:.1%}, {found.win_rate_high:.1%}]",
        f"{verdict.score:.2f} : {verdict.other_score:.2f}",
        str(verdict.num_errors),
        f"{verdict.first_rate:.0%}",
        f"{verdict.agreement:.0%}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="judge",
        about="Have an LLM compare answers in pairs.",
        config_type=JudgeConfig,
        resolved=resolved,
        run=lambda config: as_table(judge(config)),
    )


if __name__ == "__main__":
    sys.exit(main())
