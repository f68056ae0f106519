"""A data source to records: reads, splits off the held-out part, and accounts for every row."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from pilotfish.data.formats import Columns, Row, to_demonstration, to_pair, to_prompt
from pilotfish.data.records import Demonstration, PreferencePair, PromptText
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
    return _load(source, part, to_pair)


def load_demonstrations(source: DataSource, *, part: Part = "train") -> Loaded[Demonstration]:
    """Read demonstrations; preference rows give their chosen side. Raises `DataError`."""
    return _load(source, part, to_demonstration)


def load_prompts(source: DataSource, *, part: Part = "train") -> Loaded[PromptText]:
    """Read the prompts of any rows. Raises `DataError`."""
    return _load(source, part, to_prompt)


def _load(source: DataSource, part: Part, read: Callable[[Row, Columns], T]) -> Loaded[T]:
    rows = list(load_rows(source))
    wanted = _select(rows, source, part)
    records: list[T] = []
    skipped: dict[str, list[int]] = {}
    for number in wanted:
        try:
            records.append(read(rows[number], source.columns))
        except DataError as error:
            if source.bad_rows == "error":
                raise DataError(
                    f"row {number} of {source}: {error}. Repair or remove it, or set "
                    "data.bad_rows=skip to leave such rows out and count them."
                ) from error
            skipped.setdefault(str(error), []).append(number)
    account = {problem: tuple(numbers) for problem, numbers in skipped.items()}
    report = SourceReport(str(source), part, num_rows=len(wanted), skipped=account)
    if not records:
        raise DataError(f"no row can be used: {report}.")
    logger.log(logging.WARNING if skipped else logging.INFO, "%s", report)
    return Loaded(records, report)


def _select(rows: list[dict[str, Any]], source: DataSource, part: Part) -> list[int]:
    """Return the row numbers of a part, in order.

    Raw rows are ranked by a seeded hash of their prompt. Unreadable rows are ranked too: whether a
    row is held out must not depend on what the other rows are read as.
    """
    keys = [_rank(row, source) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    wanted = source.holdout
    cut = wanted if isinstance(wanted, int) else round(wanted * len(rows))
    while 0 < cut < len(order) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    if part == "heldout" and cut == 0:
        raise DataError(f"nothing of {source} is held out. Set data.holdout above 0.")
    chosen = order[:cut] if part == "heldout" else order[cut:][: source.limit]
    if not chosen:
        raise DataError(
            f"{source} has {len(rows)} rows and data.holdout={wanted} holds out {cut}, which leaves"
            f" none for part {part!r}. Hold out fewer, or give more rows."
        )
    return sorted(chosen)


def _rank(row: Row, source: DataSource) -> bytes:
    try:
        key = json.dumps(to_prompt(row, source.columns), sort_keys=True)
    except DataError:
        key = json.dumps(row, sort_keys=True, default=str)
    return hashlib.sha256(f"{source.seed}\0{key}".encode()).digest()
