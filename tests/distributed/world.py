"""Processes that form one gloo group on this machine, as the workers of a job do."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from torch.multiprocessing.spawn import start_processes

_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_TIMEOUT = timedelta(seconds=120)  # of a collective: who waits in vain fails, and so does the test


def run_world(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(*args)` in `size` processes of one node; return what they return, by rank."""
    # Imports are most of the work: they are done once, and the processes forked from there.
    multiprocessing.set_forkserver_preload([work.__module__, "deepspeed"])
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, _ON_CPU):
        start_processes(
            _enter, args=(size, folder, work, args), nprocs=size, start_method="forkserver"
        )
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(size)]


def _enter(
    rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # What Ray Train sets.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    torch.save(work(*args), _result(folder, rank))
    dist.barrier()  # nobody leaves while others still talk to it
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
