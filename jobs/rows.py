"""Folders of rows that actors make chunk by chunk; what is finished outlives the driver.

rows.jsonl     one row per line, in the order of what they were made from
pairs.jsonl    where the rows prefer one answer to another: `prompt`, `chosen`, `rejected`
record.yaml    the settings with their hash, and numbers about the rows
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml

from jobs import tracking
from jobs.output import is_current
from jobs.pool import Chunk
from jobs.rows_config import RowsConfig
from pilotfish.data.sources import DataSource, load_rows
from pilotfish.errors import DataError
from pilotfish.train.export import whole_folder

logger = logging.getLogger(__name__)

ROWS_NAME = "rows.jsonl"
PAIRS_NAME = "pairs.jsonl"
RECORD_NAME = "record.yaml"

Row: TypeAlias = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How rows are made."""

    job: str
    digest: str
    """Hash of all that decides what the rows are."""
    chunks: Sequence[Chunk[Any]]
    make: Callable[[Sequence[Chunk[Any]]], Iterator[tuple[Chunk[Any], list[Row]]]]
    """Chunks to chunks with their rows, in any order, on actors."""
    finish: Callable[[Path, list[Row]], dict[str, float]]
    """(folder, all rows) -> numbers about them; may write further files into the folder."""


def make_rows(config: RowsConfig, recipe: Recipe) -> Path:
    """Make the folder that a resolved config names, and return it.

    Returns at once when it was made from the same settings before, and goes on with the finished
    chunks of a driver that died. Raises `ConfigError` for a folder of other settings, unless
    `force` is set, and what the actors raise.
    """
    output = Path(config.output)
    parts = output.with_name(f".{output.name}-{recipe.digest}.parts")
    if config.force:
        shutil.rmtree(parts, ignore_errors=True)
    elif is_current(output, _hash_of(output), recipe.digest):
        logger.info("%s is made already from these settings; reusing it", output)
        return output
    settings = config.model_dump(mode="json")
    with tracking.tracked_run(
        config.tracking,
        root=config.root,
        name=output.name,
        settings=settings,
        tags={"job": recipe.job, "config_hash": recipe.digest},
    ) as run:
        rows = _all_rows(recipe, parts)
        with whole_folder(output) as folder:
            write_rows(folder / ROWS_NAME, rows)
            metrics = recipe.finish(folder, rows)
            record = {"config_hash": recipe.digest, "metrics": metrics, "config": settings}
            text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
            (folder / RECORD_NAME).write_text(text, encoding="utf-8")
        if run is not None:
            run.log_metrics(metrics)
    shutil.rmtree(parts)
    logger.info("wrote %s", output)
    return output


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the numbers about the rows of a folder."""
    return _record(folder)["metrics"]


def show(folder: Path) -> str:
    """Return what a job says when it has made a folder."""
    numbers = [f"{name:24} {value:.6g}" for name, value in metrics_of(folder).items()]
    return "\n".join([*numbers, f"rows: {folder / ROWS_NAME}"])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of rows, whole or not at all."""
    incoming = path.with_name(f".{path.name}.tmp")
    with incoming.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(incoming, path)


def _all_rows(recipe: Recipe, parts: Path) -> list[Row]:
    """Make what is missing of the chunks, and return the rows of all."""
    parts.mkdir(parents=True, exist_ok=True)
    files = {chunk.start: parts / f"{chunk.start:010d}.jsonl" for chunk in recipe.chunks}
    missing = [chunk for chunk in recipe.chunks if not files[chunk.start].exists()]
    if len(missing) < len(recipe.chunks):
        num_done = len(recipe.chunks) - len(missing)
        logger.info("%d of %d chunks are finished already", num_done, len(recipe.chunks))
    for chunk, rows in recipe.make(missing):
        write_rows(files[chunk.start], rows)
    rows = [row for file in files.values() for row in load_rows(DataSource(path=str(file)))]
    if len(rows) < 2:  # as many as a standard error needs
        num_items = sum(len(chunk.items) for chunk in recipe.chunks)
        raise DataError(
            f"{num_items} items gave {len(rows)} rows, wanted at least two. Give more, or look in "
            "the log for why they were left out."
        )
    return rows


def _hash_of(folder: Path) -> str | None:
    return _record(folder)["config_hash"] if (folder / RECORD_NAME).is_file() else None


def _record(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / RECORD_NAME).read_text(encoding="utf-8"))
