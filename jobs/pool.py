"""A job's items in chunks, worked on by restartable actors, with a progress bar."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray
import torch
from pydantic import NonNegativeFloat, PositiveInt
from ray.exceptions import RayTaskError
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from jobs import cluster
from jobs.progress import are_hidden
from pilotfish.config import Config
from pilotfish.errors import PilotfishError
from pilotfish.models.loading import Dtype

# Where every refresh is a new line (a log file, `ray job submit`), few lines are enough.
_SECONDS_PER_LINE = 15.0

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class ActorsConfig(Config):
    """What decodes: actors, each with models of its own."""

    dtype: Dtype = "auto"
    batch_size: PositiveInt = 64
    """Answers that one actor decodes at a time."""
    chunk_size: PositiveInt = 128
    """Answers handed to an actor at once. Numbers may depend on it in their last digits, as any
    batch size does; never on the number of actors."""
    num_actors: PositiveInt = 1
    threads: PositiveInt = 1
    """CPU threads per actor."""
    gpus_per_actor: NonNegativeFloat = 0

    def decisive(self) -> dict[str, Any]:
        """Return the fields that decide what is decoded, as JSON holds them; not where."""
        where = {"batch_size", "num_actors", "threads", "gpus_per_actor"}
        return self.model_dump(mode="json", exclude=where)

    @property
    def num_cpus(self) -> int:
        return self.num_actors * self.threads

    @property
    def device(self) -> str:
        return "auto" if self.gpus_per_actor else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Generic[T_co]):
    """Neighbouring items."""

    items: Sequence[T_co]
    start: int
    """Place of the first among all items."""
    label: str = ""
    """What is done with them, where a job does several things; shown beside the bar."""


class Worker(Protocol[T_contra, R_co]):
    """What an actor is made of: a plain class, so that it can be used without a cluster.

    A chunk is done alone, so what comes of it depends neither on the number of actors nor on which
    of them takes it; doing it again gives the same.
    """

    def process(self, chunk: Chunk[T_contra], /) -> R_co: ...


def chunks_of(items: Sequence[T], size: int, *, label: str = "") -> list[Chunk[T]]:
    return [
        Chunk(items=items[start : start + size], start=start, label=label)
        for start in range(0, len(items), size)
    ]


def run_chunks(
    worker: Callable[..., Worker[T, R]],
    told: Sequence[Any],
    chunks: Sequence[Chunk[T]],
    actors: ActorsConfig,
    *,
    title: str,
) -> Iterator[tuple[Chunk[T], R]]:
    """Yield each chunk with what `worker(*told)` makes of it, in the order in which they end.

    A `PilotfishError` in an actor is raised here as it was there.
    """
    num_actors = min(actors.num_actors, len(chunks))
    with (
        crew_of(worker, told, actors, num_actors=num_actors) as crew,
        _bar(title, sum(len(chunk.items) for chunk in chunks)) as bar,
    ):
        for chunk, result in spread(crew, chunks):
            bar.set_postfix_str(chunk.label, refresh=False)
            bar.update(len(chunk.items))
            yield chunk, result


@contextmanager
def crew_of(
    worker: Callable[..., Any],
    told: Sequence[Any],
    actors: ActorsConfig,
    *,
    num_actors: int,
) -> Iterator[list[Any]]:
    """Give actors, each a `Worker` that was `told`, to whom chunks can be `spread` from any
    process."""
    cluster.connect(num_cpus=actors.num_cpus, gpus=actors.gpus_per_actor > 0)
    remote: Any = ray.remote(
        num_cpus=actors.threads,
        num_gpus=actors.gpus_per_actor,
        # Doing a chunk again gives the same, so a lost node costs time alone.
        max_restarts=2,
        max_task_retries=2,
    )(worker)
    crew = [remote.remote(*told) for _ in range(num_actors)]
    try:
        yield crew
    finally:
        for actor in crew:
            ray.kill(actor)


def spread(crew: Sequence[Any], chunks: Sequence[Chunk[T]]) -> Iterator[tuple[Chunk[T], Any]]:
    """Yield each chunk with what the crew makes of it, in the order in which they end.

    A `PilotfishError` in an actor is raised here as it was there.
    """
    waiting = iter(chunks)
    busy = {actor.process.remote(chunk): (actor, chunk) for actor, chunk in zip(crew, waiting)}  # noqa: B905 - the rest waits
    try:
        while busy:
            [ended], _ = ray.wait(list(busy))
            actor, chunk = busy.pop(ended)
            if (following := next(waiting, None)) is not None:
                busy[actor.process.remote(following)] = actor, following
            yield chunk, ray.get(ended)
    except RayTaskError as error:
        if isinstance(error.cause, PilotfishError):
            raise error.cause from None
        raise


def settle_in(actors: ActorsConfig) -> None:
    """Prepare an actor's process for the models that it is about to load."""
    torch.set_num_threads(actors.threads)
    transformers_logging.disable_progress_bar()  # one per file, in the driver's terminal


def _bar(title: str, total: int) -> tqdm:
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_PER_LINE
    return tqdm(
        desc=title,
        total=total,
        unit="answer",
        mininterval=interval,
        dynamic_ncols=True,
        disable=are_hidden(),
    )
