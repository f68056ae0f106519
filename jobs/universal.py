"""ZeRO checkpoints for another number of workers: DeepSpeed's universal format."""

import argparse
import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch.distributed as dist

_FOLDER = "universal"


def to_universal(folder: Path, *, tag: str) -> Path:
    """Convert a checkpoint once, inside its folder; return the folder of the converted one.

    A collective: the first worker converts while the others wait. All see the folder.
    """
    converted = folder / _FOLDER
    if dist.get_rank() == 0 and not converted.exists():
        incoming = folder / f"{_FOLDER}.tmp"
        shutil.rmtree(incoming, ignore_errors=True)  # of a conversion that was killed
        _convert(folder / tag, incoming / tag)
        incoming.rename(converted)
    dist.barrier()
    return converted


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # The defaults of its command line, but for two: ZeRO-1 and 2 leave out what the format wants
    # of models in parallel parts, and this process has threads, so it starts no others.
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
