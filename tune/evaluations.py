"""What decoding a point gave, on shared actors, kept in files so that nothing is decoded twice."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.decoder import Decoder, Part
from jobs.decoding_config import DecodingJobConfig
from jobs.pool import Chunk, chunks_of, spread
from jobs.resolve import content_hash, identity
from jobs.rows_config import reward_identity
from pilotfish.config import Config
from pilotfish.data.records import PromptText
from pilotfish.evaluation.metrics import distinct, estimate, share, tidy
from pilotfish.evaluation.report import Answer
from pilotfish.evaluation.settings import Setting
from pilotfish.guides import vary_card
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import beside


class Evaluation(Config):
    """The answers of one setting to neighbouring prompts, with one seed each, and their cost."""

    setting: Setting
    start: int
    """Place of the first prompt among all."""
    repeat: int
    answers: tuple[Answer, ...]
    seconds: float
    num_forwards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion(Chunk[PromptText]):
    """Neighbouring prompts, and how to answer them."""

    setting: Setting


class SharedDecoder:
    """Decodes for whichever trial asks; see `jobs.pool.Worker`."""

    def __init__(self, job: DecodingJobConfig) -> None:
        self._decoder = Decoder(job, ())

    def process(self, portion: Portion) -> Part:
        return self._decoder.answer(portion, portion.setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Measures settings on a list of prompts; the same seeds for all settings."""

    job: DecodingJobConfig
    cards: Mapping[str, GuideCard]
    prompts: Sequence[PromptText]
    repeats: int
    rungs: Sequence[int]
    """Numbers of prompts, growing; a rung is decoded once, and counts in all that follow."""
    folder: Path
    crew: Sequence[Any]
    """Actors made of `SharedDecoder`."""

    def measure(self, setting: Setting, num_prompts: int) -> dict[str, float]:
        """Return the metrics of a setting on the first prompts, up to one of the rungs."""
        return measure(self.evaluate(setting, num_prompts))

    def evaluate(self, setting: Setting, num_prompts: int) -> list[list[Evaluation]]:
        """Return the evaluations of a setting up to a rung, for each repeat, in order."""
        runs: list[list[Evaluation]] = [[] for _ in range(self.repeats)]
        start = 0
        for end in self.rungs[: self.rungs.index(num_prompts) + 1]:
            for run, evaluation in zip(runs, self._rung(setting, start, end), strict=True):
                run.append(evaluation)
            start = end
        return runs

    def _rung(self, setting: Setting, start: int, end: int) -> list[Evaluation]:
        """Return the evaluations of a rung, one for each repeat, out of the store or decoded."""
        paths = [self._path(setting, start, end, repeat) for repeat in range(self.repeats)]
        missing = [repeat for repeat, path in enumerate(paths) if not path.is_file()]
        parts: dict[int, list[tuple[int, Part]]] = {repeat: [] for repeat in missing}
        portions = [
            portion for repeat in missing for portion in self._portions(setting, start, end, repeat)
        ]
        for portion, part in spread(self.crew, portions):
            parts[int(portion.label)].append((portion.start, part))
        for repeat in missing:
            ordered = [part for _, part in sorted(parts[repeat], key=lambda pair: pair[0])]
            evaluation = Evaluation(
                setting=setting,
                start=start,
                repeat=repeat,
                answers=tuple(answer for part in ordered for answer in part.answers),
                seconds=sum(part.seconds for part in ordered),
                num_forwards=sum(part.num_forwards for part in ordered),
            )
            _write_whole(paths[repeat], evaluation.model_dump_json())
        return [Evaluation.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]

    def _portions(self, setting: Setting, start: int, end: int, repeat: int) -> list[Portion]:
        """A prompt's seed is its place behind the job's, and every repeat has seeds of its own."""
        first = repeat * len(self.prompts) + start
        return [
            Portion(
                items=chunk.items, start=first + chunk.start, label=str(repeat), setting=setting
            )
            for chunk in chunks_of(self.prompts[start:end], self.job.decoding.chunk_size)
        ]

    def _path(self, setting: Setting, start: int, end: int, repeat: int) -> Path:
        content = {
            "base": identity(self.job.base),
            "guides": [self._guide(name, setting) for name in setting.guides],
            "weights": list(setting.guides.values()),
            "sampling": setting.model_dump(include={"temperature", "top_p", "top_k"}),
            "decoding": self.job.decoding.decisive(),
            "reward": reward_identity(self.job.reward),
            "prompts": self.prompts[start:end],
            "seeds": [self.job.seed, start, len(self.prompts), repeat],
        }
        return self.folder / f"{content_hash(content)}.json"

    def _guide(self, name: str, setting: Setting) -> dict[str, Any]:
        """What decides how a guide acts: its weights, and its settings, wherever they are from."""
        source = self.job.guides[name]
        folder = source if isinstance(source, str) else "."
        card = vary_card(self.cards[name], setting.args.get(name, {}))
        settings = {
            key: identity(beside(folder, value)) if isinstance(value, str) else value
            for key, value in card.settings.items()
        }
        weights = identity(source) if isinstance(source, str) else None
        return {"kind": card.kind, "weights": weights, "gate": card.gate, "settings": settings}


def measure(runs: Sequence[Sequence[Evaluation]]) -> dict[str, float]:
    """Return the metrics of one setting; `tune.config` names them.

    A prompt counts once, by the mean over its repeats, so `NAME_error`, the standard error of the
    mean NAME, is about prompts.
    """
    numbers: dict[str, float] = {}
    for name, values in by_prompt(runs).items():
        found = estimate(values)
        numbers |= {name: found.mean, f"{name}_error": found.error}
    every = [evaluation for run in runs for evaluation in run]
    answers = [answer for evaluation in every for answer in evaluation.answers]
    texts = [answer.text for answer in answers]
    count_of = Counter(texts)
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        **numbers,
        "kl_per_token": tidy(sum(answer.kl for answer in answers) / num_tokens),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "unique": share([count_of[text] == 1 for text in texts]),
        "tokens_per_second": tidy(num_tokens / sum(one.seconds for one in every)),
        "forwards_per_token": tidy(sum(one.num_forwards for one in every) / num_tokens),
    }


def by_prompt(runs: Sequence[Sequence[Evaluation]]) -> dict[str, list[float]]:
    """Return the metrics that every answer has by itself: a number per prompt, over its repeats."""
    each = [[_of_one(answer) for one in run for answer in one.answers] for run in runs]
    return {
        name: [sum(row[name] for row in rows) / len(rows) for rows in zip(*each, strict=True)]
        for name in each[0][0]
    }


def _of_one(answer: Answer) -> dict[str, float]:
    judged = {} if answer.reward is None else {"reward": answer.reward, **answer.parts}
    return {
        **judged,
        "kl": answer.kl,
        "length": float(answer.num_tokens),
        "bad_share": float(answer.bad),
    }


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    incoming.write_text(text, encoding="utf-8")
    os.replace(incoming, path)
