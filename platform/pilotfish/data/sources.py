"""Where rows come from: local files, folders and globs, or a set on the Hugging Face hub.

Knows files and hub ids, and nothing about what the columns mean.
"""

import glob
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from pilotfish.config import Config
from pilotfish.data.formats import Columns, Objective
from pilotfish.errors import DataError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)(_[a-zA-Z]+(?=[-.]|$))?(?=[-_.]|$)")


class DataSource(Config):
    """A data set, and which of its rows are trained on.

    The held-out rows depend on `seed`, `holdout` and the rows' prompts alone, so training and
    evaluation agree on them when they share this section.
    """

    path: str | tuple[str, ...]
    """A file, a folder, a glob, a list of those, or a hub id such as `Anthropic/hh-rlhf`."""
    split: str = "train"
    """Split of a hub set; in a local folder with files named after splits, the files to read
    (`train` finds those of `train_prefs` too, where that is the only one)."""
    subset: str | None = None
    """Configuration name of a hub set."""
    data_dir: str | None = None
    """Folder inside a hub set (HH-RLHF: `harmless-base`)."""
    revision: str | None = None
    columns: Columns = Columns()
    objective: Objective | None = None
    """For rows labelled by two objectives (PKU-SafeRLHF): what decides which answer is chosen."""
    holdout: NonNegativeInt | float = 0
    """Rows (or, below 1, the share of rows) kept out of training. Rows that share a prompt stay
    together, so there may be a few more."""
    limit: PositiveInt | None = None
    """At most so many training rows, drawn with `seed`; held-out rows do not change with it."""
    seed: int = 0
    bad_rows: Literal["error", "skip"] = "error"
    """`skip` leaves out rows that cannot be read, and counts and logs them."""
    streaming: bool = False
    """Read the rows while training and never hold all of them; every worker reads them. `holdout`
    is then a share, and the held-out rows are those whose hash is below it."""
    shuffle_buffer: PositiveInt | None = None
    """Examples of a stream that are held and shuffled at a time. Default: 4096."""

    @field_validator("holdout")
    @classmethod
    def _check_holdout(cls, holdout: int | float) -> int | float:
        if isinstance(holdout, float) and not 0 <= holdout < 1:
            raise ValueError("wanted a number of rows, or a share in [0, 1)")
        return holdout

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.streaming and isinstance(self.holdout, int) and self.holdout > 0:
            raise ValueError(
                f"holdout is {self.holdout} rows, which cannot be drawn from a stream: its length "
                "is unknown. Give a share, such as 0.01"
            )
        if self.streaming and self.limit is not None:
            raise ValueError("limit cannot be drawn from a stream. Leave it out, or streaming")
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError(
                "shuffle_buffer is for streaming=true; otherwise all rows are shuffled"
            )
        return self

    def __str__(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)


def load_rows(source: DataSource) -> Iterator[dict[str, Any]]:
    """Yield the raw rows in a fixed order. Raises `DataError` for what cannot be read."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    if not paths:
        raise DataError("the data source has an empty list of paths. Name at least one file.")
    for path in paths:
        if _is_hub_id(path):
            yield from _read_hub(path, source)
        else:
            for file in _resolve(path, source.split):
                if source.streaming and file.suffix == ".json":
                    raise DataError(
                        f"{file} holds one list, which cannot be streamed. Write an object per "
                        "line (.jsonl), or set data.streaming=false."
                    )
                yield from _reader(file)(file)


def _is_hub_id(path: str) -> bool:
    known = path.endswith(tuple(_READERS))
    return bool(_HUB_ID.fullmatch(path)) and not known and not Path(path).exists()


def _resolve(path: str, split: str) -> list[Path]:
    location = Path(path).expanduser()
    if location.is_file():
        return [location]
    if location.is_dir():
        return _files_in(location, split)
    matches = sorted(Path(match) for match in glob.glob(str(location), recursive=True))
    if not matches:
        raise DataError(
            f"data path {path!r} is no file or folder, and no file matches it as a glob. Relative "
            f"paths start at {os.getcwd()!r}; a hub set is written owner/name."
        )
    return matches


def _files_in(folder: Path, split: str) -> list[Path]:
    """Return the data files below a folder; where names tell splits apart, only the wanted one."""
    files = sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.name.endswith(tuple(_READERS)) and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise DataError(f"folder {str(folder)!r} holds no data file, wanted {', '.join(_READERS)}.")
    splits = [_split_of(file) for file in files]
    found = sorted({name for name in splits if name})
    if not found:
        return [folder / file for file in files]
    named = [name for name in found if name == split] or [
        name for name in found if name.startswith(f"{split}_")
    ]
    if len(named) != 1:
        raise DataError(
            f"folder {str(folder)!r} has no file of split {split!r}, but of {found}. Set data.split"
            " to one of those, or name the file."
        )
    return [folder / file for file, name in zip(files, splits, strict=True) if name == named[0]]


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _split_of(file: Path) -> str | None:
    """Return the split that a file (`train-00000.parquet`) or one of its folders is named after."""
    matches = (_SPLIT.match(part) for part in reversed(file.parts))
    return next((match[0] for match in matches if match), None)


def _reader(file: Path) -> Callable[[Path], Iterator[dict[str, Any]]]:
    for suffix, reader in _READERS.items():
        if file.name.endswith(suffix):
            return reader
    raise DataError(
        f"data file {str(file)!r} has an unknown extension, wanted one of {', '.join(_READERS)}. "
        "Convert it, or rename it if it is one of those."
    )


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _as_row(_parse(line, f"{file}:{number}"), f"{file}:{number}")


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    rows = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(rows, list):
        raise DataError(
            f"{file} holds a JSON {type(rows).__name__}, wanted a list of objects. One object per "
            "line is .jsonl."
        )
    for number, row in enumerate(rows):
        yield _as_row(row, f"{file}[{number}]")


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"reading {file} needs pyarrow. Install it with `pip install pilotfish[train]`."
        ) from error
    for batch in parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise DataError(f"{where} is not JSON: {error}. Repair or remove it.") from error


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a {type(value).__name__}, wanted an object of columns.")
    return value


def _read_hub(path: str, source: DataSource) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"the hub set {path!r} needs the datasets library. Install it with "
            "`pip install pilotfish[train]`, or give a local file."
        ) from error
    try:
        rows = load_dataset(
            path,
            name=source.subset,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for row in rows:  # a stream opens its files here
            yield dict(row)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"the hub set {path!r} cannot be loaded (subset {source.subset!r}, data_dir "
            f"{source.data_dir!r}, split {source.split!r}, revision {source.revision!r}): {reason}."
            " If a local path was meant, there is no such file or folder. Without a network, give "
            "a local file, or fetch the set beforehand and set HF_HUB_OFFLINE=1."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _read_lines,
    ".jsonl.gz": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
