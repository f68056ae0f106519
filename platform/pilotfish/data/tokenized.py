"""Whole data sets to examples, with an account of the lengths and of what was cut or dropped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pilotfish.correction import CorrectionTemplate
from pilotfish.data.collate import (
    CorrectionExample,
    Example,
    LengthLimits,
    PairExample,
    PromptExample,
    ScoredExample,
    TokenExample,
    tokenize_correction,
    tokenize_demonstration,
    tokenize_pair,
    tokenize_prompt,
    tokenize_scored,
)
from pilotfish.data.records import (
    Correction,
    Demonstration,
    PreferencePair,
    Record,
    ScoredAnswer,
)
from pilotfish.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """Lengths after cutting, and how many records were cut or dropped. Log it: people ask."""

    num_records: int
    num_dropped: int
    """Too long where that drops them (see `LengthLimits`), or pairs whose two answers became the
    same ids."""
    num_cut_prompts: int
    num_cut_answers: int
    max_tokens: int
    mean_tokens: float
    mean_answer_tokens: Mapping[str, float]
    """By side. Preference losses that sum log-probs favour the shorter side for free, so a gap
    between chosen and rejected is worth knowing."""

    def metrics(self) -> dict[str, float]:
        """Return flat numbers for a tracker."""
        sides = {f"data/mean_{side}_tokens": mean for side, mean in self.mean_answer_tokens.items()}
        return {
            "data/records": self.num_records,
            "data/dropped": self.num_dropped,
            "data/cut_prompts": self.num_cut_prompts,
            "data/cut_answers": self.num_cut_answers,
            "data/max_tokens": self.max_tokens,
            "data/mean_tokens": self.mean_tokens,
            **sides,
        }

    def __str__(self) -> str:
        sides = ", ".join(f"{side} {mean:.1f}" for side, mean in self.mean_answer_tokens.items())
        return (
            f"{self.num_records} records: {self.num_cut_prompts} prompts cut, "
            f"{self.num_cut_answers} answers cut, {self.num_dropped} dropped; longest "
            f"{self.max_tokens} tokens, mean {self.mean_tokens:.1f}; mean answer: {sides}"
        )


@dataclass(frozen=True, slots=True)
class Rendering:
    """How the records of a job become token ids."""

    tokenizer: PreTrainedTokenizerBase
    limits: LengthLimits
    template: CorrectionTemplate | None = None
    """What corrections are rendered in; only they need one."""

    def __call__(self, record: Record) -> Example | None:
        """Tokenise one record; None says that it is dropped. Raises `DataError`."""
        example = self._tokenize(record)
        return None if self._is_dropped(example) else example

    def _tokenize(self, record: Record) -> Example:
        max_length = self.limits.max_length
        match record:
            case Demonstration():
                return tokenize_demonstration(self.tokenizer, record, max_length=max_length)
            case PreferencePair():
                return tokenize_pair(self.tokenizer, record, max_length=max_length)
            case Correction():
                assert self.template is not None, "corrections come with a template"
                return tokenize_correction(
                    self.tokenizer, record, template=self.template, max_length=max_length
                )
            case ScoredAnswer():
                return tokenize_scored(self.tokenizer, record, max_length=max_length)
            case _:
                return tokenize_prompt(self.tokenizer, record)

    def _is_dropped(self, example: Example) -> bool:
        match example:
            case PromptExample():
                return len(example) > self.limits.max_length
            case PairExample() if example.chosen.token_ids == example.rejected.token_ids:
                return True
        drops = self.limits.too_long == "drop" or isinstance(example, CorrectionExample)
        return drops and any(side.is_cut for side in _sides(example).values())


def tokenize_all(
    records: Iterable[Record], render: Rendering
) -> tuple[list[Example], LengthReport]:
    """Tokenise records in order. Raises `DataError` naming the record."""
    examples: list[Example | None] = []
    for number, record in enumerate(records):
        try:
            examples.append(render(record))
        except DataError as error:
            raise DataError(f"record {number}: {error}") from error
    kept = [example for example in examples if example is not None]
    return kept, _report(kept, num_records=len(examples))


def _sides(example: Example) -> dict[str, TokenExample]:
    """Return what a model learns to write, by name."""
    match example:
        case PairExample():
            return {"chosen": example.chosen, "rejected": example.rejected}
        case CorrectionExample():
            return {"correction": example.corrected, "original": example.copied}
        case ScoredExample():
            return {"completion": example.example}
        case PromptExample():
            return {"prompt": TokenExample(example.token_ids, num_prompt_tokens=0)}
        case TokenExample():
            return {"completion": example}


def _report(examples: Sequence[Example], *, num_records: int) -> LengthReport:
    if not examples:
        raise DataError(
            f"none of {num_records} records is left after tokenising: all are too long, or their "
            "answers do not differ. Raise data.limits.max_length, or set too_long=cut."
        )
    rows = [_sides(example) for example in examples]
    lengths = [len(side) for row in rows for side in row.values()]
    return LengthReport(
        num_records=num_records,
        num_dropped=num_records - len(rows),
        num_cut_prompts=sum(any(s.num_cut_prompt_tokens for s in row.values()) for row in rows),
        num_cut_answers=sum(any(s.num_cut_answer_tokens for s in row.values()) for row in rows),
        max_tokens=max(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        mean_answer_tokens={
            name: sum(row[name].num_answer_tokens for row in rows) / len(rows) for name in rows[0]
        },
    )
