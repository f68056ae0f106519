"""Whole data sets to examples, with an account of the lengths and of what was cut or dropped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from pilotfish.data.collate import (
    LengthLimits,
    PairExample,
    TokenExample,
    tokenize_demonstration,
    tokenize_pair,
)
from pilotfish.data.records import Demonstration, PreferencePair
from pilotfish.errors import DataError

R = TypeVar("R")
E = TypeVar("E")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """Lengths after cutting, and how many records were cut or dropped. Log it: people ask."""

    num_records: int
    num_dropped: int
    """Too long under `too_long=drop`, or pairs whose two answers became the same ids."""
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


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    limits: LengthLimits,
    end_ids: frozenset[int] | None = None,
) -> tuple[list[PairExample], LengthReport]:
    """Tokenise pairs in order. Raises `DataError` naming the record."""

    def tokenize(pair: PreferencePair) -> PairExample:
        return tokenize_pair(tokenizer, pair, max_length=limits.max_length, end_ids=end_ids)

    examples = _numbered(pairs, tokenize)
    kept = [
        example
        for example in examples
        if example.chosen.token_ids != example.rejected.token_ids
        and not _is_dropped((example.chosen, example.rejected), limits)
    ]
    sides = {
        "chosen": [example.chosen for example in kept],
        "rejected": [example.rejected for example in kept],
    }
    return kept, _report(sides, num_records=len(pairs))


def tokenize_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    limits: LengthLimits,
    end_ids: frozenset[int] | None = None,
) -> tuple[list[TokenExample], LengthReport]:
    """Tokenise demonstrations in order. Raises `DataError` naming the record."""

    def tokenize(demonstration: Demonstration) -> TokenExample:
        return tokenize_demonstration(
            tokenizer, demonstration, max_length=limits.max_length, end_ids=end_ids
        )

    examples = _numbered(demonstrations, tokenize)
    kept = [example for example in examples if not _is_dropped((example,), limits)]
    return kept, _report({"completion": kept}, num_records=len(demonstrations))


def _numbered(records: Sequence[R], tokenize: Callable[[R], E]) -> list[E]:
    examples: list[E] = []
    for number, record in enumerate(records):
        try:
            examples.append(tokenize(record))
        except DataError as error:
            raise DataError(f"record {number}: {error}") from error
    return examples


def _is_dropped(sides: Sequence[TokenExample], limits: LengthLimits) -> bool:
    return limits.too_long == "drop" and any(
        side.num_cut_prompt_tokens or side.num_cut_answer_tokens for side in sides
    )


def _report(sides: Mapping[str, Sequence[TokenExample]], *, num_records: int) -> LengthReport:
    columns = list(sides.values())
    records = list(zip(*columns, strict=True))
    if not records:
        raise DataError(
            f"none of {num_records} records is left after tokenising: all are too long, or their "
            "answers do not differ. Raise data.limits.max_length, or set too_long=cut."
        )
    lengths = [len(example) for column in columns for example in column]
    return LengthReport(
        num_records=num_records,
        num_dropped=num_records - len(records),
        num_cut_prompts=sum(any(e.num_cut_prompt_tokens for e in record) for record in records),
        num_cut_answers=sum(any(e.num_cut_answer_tokens for e in record) for record in records),
        max_tokens=max(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        mean_answer_tokens={
            side: sum(example.num_answer_tokens for example in column) / len(column)
            for side, column in sides.items()
        },
    )
