"""The folder of a run that is under way: its checkpoints, and what it takes to read them.

It lies under the job's root, is named after what decides the weights, and is removed when the run
is over. Starting the job again finds it and goes on, with the same MLflow run.
"""

import json
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.config import JobConfig
from jobs.dataset import Prepared, prepare
from pilotfish.data.tokenized import LengthReport

_RUN_NAME = "run.json"
_JOB_NAME = "job.pkl"
_TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a run folder says about its run."""

    config_hash: str
    run_id: str | None = None
    """Of MLflow."""
    tracking_uri: str | None = None


def write_run_info(folder: Path, info: RunInfo, config: JobConfig) -> None:
    """Write what is known of the run, and its resolved config."""
    folder.mkdir(parents=True, exist_ok=True)
    # A pickle: fields that were not set must not come back as if they had been.
    _write_whole(folder / _JOB_NAME, pickle.dumps(config))
    _write_whole(folder / _RUN_NAME, json.dumps(asdict(info), indent=2).encode())


def read_run_info(folder: Path) -> RunInfo | None:
    """Return what is known of the run in this folder; None if it holds none."""
    path = folder / _RUN_NAME
    if not path.is_file():
        return None
    return RunInfo(**json.loads(path.read_text(encoding="utf-8")))


def read_job(folder: Path) -> JobConfig:
    return pickle.loads((folder / _JOB_NAME).read_bytes())


def prepare_in(folder: Path, config: JobConfig) -> tuple[Prepared, LengthReport]:
    """Prepare the rows, and keep the tokenizer, which may have been trained on them.

    Raises `DataError`.
    """
    prepared, report = prepare(config)
    prepared.tokenizer.save_pretrained(folder / _TOKENIZER_FOLDER)
    return prepared, report


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / _TOKENIZER_FOLDER)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    incoming = path.with_name(f".{path.name}.tmp")
    incoming.write_bytes(content)
    os.replace(incoming, path)
