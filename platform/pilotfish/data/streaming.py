"""Batches of a data set that is never held whole: read, tokenised and shuffled a buffer at a time.

Knows sources and records, and nothing about what an example is made of.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

from pilotfish.data.batching import BatchPlan
from pilotfish.data.collate import Example
from pilotfish.data.formats import Reader
from pilotfish.data.loading import stream_records
from pilotfish.data.sources import DataSource
from pilotfish.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DEFAULT_BUFFER = 4096
E = TypeVar("E", bound=Example)


@dataclass(frozen=True, slots=True)
class ExampleStream(Generic[E]):
    """The training rows of a streaming source as examples."""

    source: DataSource
    read: Reader[Any]
    """One of the readers of `pilotfish.data.formats`."""
    render: Callable[[Any], E | None]
    """A record to an example, or to None to leave it out; see `Rendering`."""

    def examples(self, start: int = 0) -> Iterator[tuple[int, E]]:
        """Yield the examples of one epoch with their row numbers, from row `start` on.

        The rows before it are read from their files, but neither parsed for meaning nor tokenised.
        Raises `DataError` naming the row.
        """
        num_dropped = 0
        for number, record in stream_records(self.source, self.read, start=start):
            try:
                example = self.render(record)
            except DataError as error:
                raise DataError(f"row {number} of {self.source}: {error}") from error
            if example is None:
                num_dropped += 1
            else:
                yield number, example
        logger.info("%s: dropped %d examples from row %d on", self.source, num_dropped, start)


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a buffer begins: its number, its first step, and the epoch and row to read from."""

    buffer: int
    step: int
    epoch: int
    row: int


_BEGINNING = _Position(buffer=0, step=0, epoch=0, row=0)


class StreamedBatches(Generic[E]):
    """Batches of an endless stream; implements `pilotfish.data.batching.Batches`.

    A buffer of consecutive examples is shuffled, bucketed by length and shared out as `BatchPlan`
    does with an epoch; the last buffer of an epoch leaves out its ragged remainder. Rows that
    are further apart than a buffer never share a batch, so a file sorted by topic should be
    shuffled beforehand.

    Every worker reads and tokenises the whole buffer, since lengths decide who gets which row.
    A position is where a buffer begins: resuming passes over the rows before it and tokenises
    one buffer again. Going back to an earlier step starts over from the first row.
    """

    def __init__(
        self,
        stream: ExampleStream[E],
        *,
        batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        """`batch_size` is the global one: rows per step over all workers."""
        self._stream = stream
        self._plan_of = partial(
            BatchPlan, batch_size=batch_size, seed=seed, world_size=world_size, rank=rank
        )
        self._plan_of([1] * batch_size)  # raises for what cannot be shared out, before any reading
        wanted = stream.source.shuffle_buffer or max(DEFAULT_BUFFER, batch_size)
        if wanted < batch_size:
            raise ConfigError(
                f"data.shuffle_buffer is {wanted}, less than one batch of {batch_size}. Make it "
                "many batches."
            )
        self._batch_size = batch_size
        self._buffer_size = wanted - wanted % batch_size
        self._go_to(_BEGINNING)

    def examples(self, step: int) -> list[E]:
        """Return this worker's examples of a step, reading on as far as needed."""
        if step < self._position.step:
            self._go_to(_BEGINNING)
        while self._plan is None or step >= self._position.step + self._plan.batches_per_epoch:
            self._read_buffer()
        first = self._position.buffer * self._plan.batches_per_epoch
        rows = self._plan.batch(first + step - self._position.step)
        return [self._buffer[row] for row in rows]

    def state(self) -> dict[str, int]:
        return asdict(self._position)

    def resume(self, state: Mapping[str, int]) -> None:
        self._go_to(_Position(**state))

    def _go_to(self, position: _Position) -> None:
        """Stand before a buffer, with nothing of it read yet."""
        self._position = self._next = position
        self._rows = self._stream.examples(position.row)
        self._buffer: list[E] = []
        self._plan: BatchPlan | None = None

    def _read_buffer(self) -> None:
        """Read the next buffer that holds a batch or more."""
        here = self._next
        numbered = list(islice(self._rows, self._buffer_size))
        if len(numbered) == self._buffer_size:
            epoch, row = here.epoch, numbered[-1][0] + 1
        else:
            epoch, row = here.epoch + 1, 0
            self._rows = self._stream.examples()
        if len(numbered) >= self._batch_size:
            self._buffer = [example for _, example in numbered]
            self._plan = self._plan_of([len(example) for example in self._buffer])
            self._position = here
            step = here.step + self._plan.batches_per_epoch
            self._next = _Position(here.buffer + 1, step, epoch, row)
            return
        if here.row == 0:
            raise DataError(
                f"{self._stream.source} gives {len(numbered)} examples, fewer than one batch of "
                f"{self._batch_size}. Make the batch smaller, or give more rows."
            )
        self._next = replace(here, epoch=epoch, row=row)
        self._read_buffer()
