"""Model and guide folders: written whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.errors import CheckpointError

RECORD_NAME = "training.json"
WEIGHTS_NAME = "model.safetensors"
_ONE_FILE = "10TB"


def save_model(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    state: Mapping[str, Tensor],
) -> None:
    """Write a folder that plain `from_pretrained` loads, its weights in one safetensors file.

    `state` holds whole tensors. Raises `CheckpointError` for a tensor without elements, which is
    what a ZeRO-3 shard looks like when it was not gathered.
    """
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensors have no elements ({', '.join(empty[:3])}): the weights are "
            "ZeRO-3 shards. Gather them before saving."
        )
    model.save_pretrained(folder, state_dict=dict(state), max_shard_size=_ONE_FILE)
    tokenizer.save_pretrained(folder)
    if not (Path(folder) / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"saving to {str(folder)!r} did not give one {WEIGHTS_NAME}.")


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends without an error it becomes `output`.

    A reader, or a job killed at any moment, sees the old folder, the new one, or none: never half.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    incoming = output.with_name(f".{output.name}.{token}.tmp")
    outgoing = output.with_name(f".{output.name}.{token}.old")
    incoming.mkdir()
    try:
        yield incoming
        if output.exists():
            os.rename(output, outgoing)
        os.rename(incoming, output)
    finally:
        if outgoing.exists() and not output.exists():
            os.rename(outgoing, output)
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.rmtree(outgoing, ignore_errors=True)


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write `training.json`: the resolved config and what came of it."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (Path(folder) / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Return the training record of a folder; None if it has none."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Train again.") from error
