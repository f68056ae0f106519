"""Preference rows out of answers: what an Aligner made of each, or the best and worst of several.

Rows are plain: what was read from a file, or is about to be written to one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pilotfish.data.records import PromptText

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """What became of the corrections. Each is counted once, as the first of these that it is."""

    num_rows: int
    num_pairs: int
    num_empty: int
    """Nothing was written in the answer's place."""
    num_copied: int
    """The correction is the answer, up to white space around it."""
    num_cut: int
    """The correction ends in the middle, where its length ran out: no example of how to end."""
    num_duplicates: int
    """The same answer was corrected in the same way before."""

    def metrics(self) -> dict[str, float]:
        """Return flat numbers for a tracker."""
        return {
            "pairs/num": self.num_pairs,
            "pairs/empty": self.num_empty,
            "pairs/copied": self.num_copied,
            "pairs/cut": self.num_cut,
            "pairs/duplicates": self.num_duplicates,
        }

    def __str__(self) -> str:
        return (
            f"{self.num_pairs} pairs of {self.num_rows} corrections: left out {self.num_copied} "
            f"copies, {self.num_empty} empty ones, {self.num_cut} cut off, and "
            f"{self.num_duplicates} duplicates"
        )


def preference_rows(corrections: Iterable[Row]) -> tuple[list[dict[str, Any]], PairReport]:
    """Return rows of `prompt`, `chosen` and `rejected`: corrections preferred to their answers.

    `corrections` are rows of `prompt`, `answer` and `correction`. These are the preferences of
    one round in Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024:
    D = {(x, A* over A)} with A* = Aligner(x, A). What copies its answer prefers nothing.
    """
    seen: set[str] = set()
    pairs: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for row in corrections:
        prompt = row["prompt"]
        answer, correction = row["answer"], row["correction"]
        key = json.dumps([prompt, answer.strip(), correction.strip()], sort_keys=True)
        if not correction.strip():
            counts["empty"] += 1
        elif is_copy(answer, correction):
            counts["copied"] += 1
        elif row.get("finish_reason") == "length":
            counts["cut"] += 1
        elif key in seen:
            counts["duplicates"] += 1
        else:
            seen.add(key)
            chosen, rejected = as_turn(prompt, correction), as_turn(prompt, answer)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    report = PairReport(
        num_rows=len(pairs) + counts.total(),
        num_pairs=len(pairs),
        num_empty=counts["empty"],
        num_copied=counts["copied"],
        num_cut=counts["cut"],
        num_duplicates=counts["duplicates"],
    )
    return pairs, report


def best_of_each(scored: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield the best answer to each prompt as if it corrected the worst; the first of equals.

    `scored` are rows of `prompt`, `completion` and `reward`. Where all rewards are equal, the two
    are one answer, which is a copy to `preference_rows`.
    """
    answers: dict[str, list[Row]] = {}
    for row in scored:
        answers.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    for rows in answers.values():
        best = max(rows, key=lambda row: row["reward"])
        worst = min(rows, key=lambda row: row["reward"])
        pair = {
            "answer": from_turn(worst["completion"]),
            "correction": from_turn(best["completion"]),
        }
        yield {**best, **pair}


def is_copy(answer: str, correction: str) -> bool:
    """Whether a correction leaves the answer as it was, up to white space around it."""
    return answer.strip() == correction.strip()


def as_turn(prompt: PromptText, text: str) -> Any:
    """Return an answer as TRL's columns hold it: text behind text, a turn behind messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def from_turn(answer: Any) -> str:
    """Return the text of `as_turn`."""
    return answer if isinstance(answer, str) else answer[-1]["content"]
