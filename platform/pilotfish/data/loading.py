"""A data source to records: reads, splits off the held-out part, and accounts for every row."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, TypeAlias, TypeVar

from pilotfish.data.formats import (
    Reader,
    Row,
    to_correction,
    to_demonstration,
    to_pair,
    to_prompt,
    to_scored,
)
from pilotfish.data.records import (
    Correction,
    Demonstration,
    PreferencePair,
    PromptText,
    ScoredAnswer,
)
from pilotfish.data.sources import DataSource, load_rows
from pilotfish.errors import DataError

logger = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "heldout"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of the rows of one part of a source."""

    source: str
    part: Part
    num_rows: int
    """Rows in this part, readable or not."""
    skipped: Mapping[str, tuple[int, ...]]
    """Row numbers in the source (from 0) by what is wrong with them."""

    @property
    def num_skipped(self) -> int:
        return sum(len(rows) for rows in self.skipped.values())

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.part}): {self.num_rows} rows, skipped {self.num_skipped}"]
        lines += [
            f"{len(rows)} x {problem} (rows {', '.join(map(str, rows[:5]))}"
            + (", ...)" if len(rows) > 5 else ")")
            for problem, rows in self.skipped.items()
        ]
        return "; ".join(lines)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """Records in the order of the source, and the account of the rows they came from."""

    records: list[T]
    report: SourceReport


def load_pairs(source: DataSource, *, part: Part = "train") -> Loaded[PreferencePair]:
    """Read preference pairs. Raises `DataError`."""
    return load_records(source, to_pair, part=part)


def load_demonstrations(source: DataSource, *, part: Part = "train") -> Loaded[Demonstration]:
    """Read demonstrations; preference rows give their chosen side. Raises `DataError`."""
    return load_records(source, to_demonstration, part=part)


def load_corrections(source: DataSource, *, part: Part = "train") -> Loaded[Correction]:
    """Read answers and their corrections. Raises `DataError`."""
    return load_records(source, to_correction, part=part)


def load_scored(source: DataSource, *, part: Part = "train") -> Loaded[ScoredAnswer]:
    """Read answers and their rewards; labels of true and false are 1 and 0. Raises `DataError`."""
    return load_records(source, to_scored, part=part)


def load_prompts(source: DataSource, *, part: Part = "train") -> Loaded[PromptText]:
    """Read the prompts of any rows. Raises `DataError`."""
    return load_records(source, to_prompt, part=part)


def load_records(source: DataSource, read: Reader[T], *, part: Part = "train") -> Loaded[T]:
    """Read every row of a part by one of the readers of `formats`. Raises `DataError`."""
    if part == "heldout" and source.holdout == 0:
        raise DataError(f"nothing of {source} is held out. Set data.holdout above 0.")
    rows = _stream(source, part) if source.streaming else _select(source, part)
    skipped: dict[str, list[int]] = {}
    records = [record for _, record in _read(rows, source, read, skipped)]
    report = _account(source, part, len(records), skipped)
    if not records:
        raise DataError(
            f"no row can be used: {report}. Give rows of this kind, or change data.holdout."
        )
    logger.log(logging.WARNING if skipped else logging.INFO, "%s", report)
    return Loaded(records, report)


def stream_records(
    source: DataSource, read: Reader[T], *, start: int = 0
) -> Iterator[tuple[int, T]]:
    """Yield the training records of a source with their row numbers, holding one at a time.

    Rows before `start` are passed over unread. Raises `DataError`.
    """
    skipped: dict[str, list[int]] = {}
    num_records = 0
    for numbered in _read(_stream(source, "train", start), source, read, skipped):
        num_records += 1
        yield numbered
    report = _account(source, "train", num_records, skipped)
    logger.info("from row %d on: %s", start, report)


def _read(
    rows: Iterator[tuple[int, Row]],
    source: DataSource,
    read: Reader[T],
    skipped: dict[str, list[int]],
) -> Iterator[tuple[int, T]]:
    """Yield the records of numbered rows; add what cannot be read to `skipped`."""
    for number, row in rows:
        try:
            record = read(row, source.columns, source.objective)
        except DataError as error:
            if source.bad_rows == "error":
                raise DataError(
                    f"row {number} of {source}: {error}. Repair or remove it, or set "
                    "data.bad_rows=skip to leave such rows out and count them."
                ) from error
            skipped.setdefault(str(error), []).append(number)
        else:
            yield number, record


def _account(
    source: DataSource, part: Part, num_records: int, skipped: Mapping[str, list[int]]
) -> SourceReport:
    num_rows = num_records + sum(len(numbers) for numbers in skipped.values())
    account = {problem: tuple(numbers) for problem, numbers in skipped.items()}
    return SourceReport(str(source), part, num_rows=num_rows, skipped=account)


def _select(source: DataSource, part: Part) -> Iterator[tuple[int, Row]]:
    """Return the numbered rows of a part, in order.

    Raw rows are ranked by a seeded hash of their prompt. Unreadable rows are ranked too: whether a
    row is held out must not depend on what the other rows are read as.
    """
    rows = list(load_rows(source))
    keys = [_rank(row, source) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    wanted = source.holdout
    cut = wanted if isinstance(wanted, int) else round(wanted * len(rows))
    while 0 < cut < len(order) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    chosen = order[:cut] if part == "heldout" else order[cut:][: source.limit]
    if not chosen:
        raise DataError(
            f"{source} has {len(rows)} rows and data.holdout={wanted} holds out {cut}, which leaves"
            f" none for part {part!r}. Hold out fewer, or give more rows."
        )
    return ((number, rows[number]) for number in sorted(chosen))


def _stream(source: DataSource, part: Part, start: int = 0) -> Iterator[tuple[int, Row]]:
    """Yield the numbered rows of a part: held out are those whose rank is below the share."""
    for number, row in islice(enumerate(load_rows(source)), start, None):
        place = int.from_bytes(_rank(row, source)[:8]) / 2**64
        if (place < source.holdout) == (part == "heldout"):
            yield number, row


def _rank(row: Row, source: DataSource) -> bytes:
    try:
        key = json.dumps(to_prompt(row, source.columns), sort_keys=True)
    except DataError:
        key = json.dumps(row, sort_keys=True, default=str)
    return hashlib.sha256(f"{source.seed}\0{key}".encode()).digest()
