"""The folder of a run that is under way: its checkpoints, and what it takes to read them.

It lies under the job's root, is named after what decides the weights, and is removed when the run
is over. Starting the job again finds it and goes on, with the same MLflow run.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.config import JobConfig
from jobs.dataset import Prepared, prepare
from pilotfish import config as configs
from pilotfish.data.tokenized import LengthReport

_RUN_NAME = "run.json"
_TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a run folder says about its run."""

    config: dict[str, Any]
    """The resolved `JobConfig`."""
    config_hash: str
    run_id: str | None = None
    """Of MLflow."""
    tracking_uri: str | None = None

    @property
    def job(self) -> JobConfig:
        return configs.parse(JobConfig, self.config, source=_RUN_NAME)


def write_run_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / f".{_RUN_NAME}.tmp"
    incoming.write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(incoming, folder / _RUN_NAME)


def read_run_info(folder: Path) -> RunInfo | None:
    """Return what is known of the run in this folder; None if it holds none."""
    path = folder / _RUN_NAME
    if not path.is_file():
        return None
    return RunInfo(**json.loads(path.read_text(encoding="utf-8")))


def prepare_in(folder: Path, config: JobConfig) -> tuple[Prepared, LengthReport]:
    """Prepare the rows, and keep the tokenizer, which may have been trained on them.

    Raises `DataError`.
    """
    prepared, report = prepare(config)
    prepared.tokenizer.save_pretrained(folder / _TOKENIZER_FOLDER)
    return prepared, report


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / _TOKENIZER_FOLDER)
