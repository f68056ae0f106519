"""Which rows make up batch number `step`: a pure function, so resuming needs only the number."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from pilotfish.data.collate import Example
from pilotfish.errors import ConfigError, DataError

E_co = TypeVar("E_co", covariant=True)
E = TypeVar("E", bound=Example)


class Batches(Protocol[E_co]):
    """The rows of one worker of a training run, wherever they come from."""

    def examples(self, step: int) -> Sequence[E_co]:
        """Return this worker's examples of a step, counted from 0.

        They depend on the step alone, not on the calls before. Over all workers they are the same
        examples at any number of workers.
        """
        ...

    def state(self) -> Mapping[str, int]:
        """Return the position in the rows, as JSON holds it; all workers have the same."""
        ...

    def resume(self, state: Mapping[str, int]) -> None:
        """Go to a position that `state` returned, in this process or another.

        It saves time alone: `examples` would give the same without it.
        """
        ...


class BatchPlan:
    """An endless, counted schedule of batches of rows of similar length.

    Each epoch shuffles the rows, leaves out the ragged remainder, sorts by length within chunks of
    `chunk_batches` batches (less padding), and shuffles the batches. The global batch of a step
    depends on the lengths, `batch_size`, `chunk_batches` and `seed` alone; ranks share it out, so
    a loss curve is the same at any world size.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        chunk_batches: int = 16,
    ) -> None:
        """`batch_size` is the global one: rows per step over all ranks."""
        if batch_size < 1 or chunk_batches < 1 or seed < 0 or not 0 <= rank < world_size:
            raise ConfigError(
                f"a batch plan got batch_size={batch_size}, chunk_batches={chunk_batches}, "
                f"seed={seed}, rank={rank} of {world_size}; wanted positive sizes, a seed >= 0 and "
                "a rank below the world size."
            )
        if batch_size % world_size:
            raise ConfigError(
                f"the global batch size {batch_size} cannot be shared by {world_size} workers. "
                f"Make it a multiple of {world_size}."
            )
        if len(lengths) < batch_size:
            raise DataError(
                f"there are {len(lengths)} rows, fewer than one batch of {batch_size}. Make the "
                "batch smaller, or give more rows."
            )
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._chunk = chunk_batches * batch_size
        self._seed = seed
        self._world_size = world_size
        self._rank = rank
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    @property
    def batches_per_epoch(self) -> int:
        return len(self._lengths) // self._batch_size

    def global_batch(self, step: int) -> list[int]:
        """Return the row indices of a step (from 0) over all ranks, sorted by length."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[position].tolist()

    def batch(self, step: int) -> list[int]:
        """Return this rank's rows of a step: every `world_size`-th, so that lengths balance."""
        return self.global_batch(step)[self._rank :: self._world_size]

    def _build_epoch(self, epoch: int) -> np.ndarray:
        """Return row indices [batches per epoch, batch size]."""
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        order = order[: self.batches_per_epoch * self._batch_size]
        chunks = [order[start : start + self._chunk] for start in range(0, len(order), self._chunk)]
        # Stable, so that equal lengths keep their shuffled order on every platform.
        ordered = [chunk[np.argsort(self._lengths[chunk], kind="stable")] for chunk in chunks]
        batches = np.concatenate(ordered).reshape(-1, self._batch_size)
        return batches[generator.permutation(len(batches))]


class StoredBatches(Generic[E]):
    """Batches of examples that are all in memory; see `BatchPlan`."""

    def __init__(
        self,
        examples: Sequence[E],
        *,
        batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self._examples = examples
        self._plan = BatchPlan(
            [len(example) for example in examples],
            batch_size=batch_size,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )

    def examples(self, step: int) -> list[E]:
        return [self._examples[index] for index in self._plan.batch(step)]

    def state(self) -> dict[str, int]:
        """Return nothing: all rows are at hand at every step."""
        return {}

    def resume(self, state: Mapping[str, int]) -> None:
        """Do nothing; see `state`."""
