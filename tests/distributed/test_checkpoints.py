"""Runs go on where they were cut, with as many workers as before and with others."""

from pathlib import Path

import pytest

from jobs.dataset import prepare
from tests.distributed.runs import CUT, END, Run, run_rest, run_whole, tiny_job
from tests.distributed.world import run_world

# ZeRO stages, and precision.
KINDS = {
    "zero0": ("train.deepspeed=0",),
    "zero1": ("train.deepspeed=1",),
    "zero2": ("train.deepspeed=2",),
    "zero3": ("train.deepspeed=3",),
    "zero0-bf16": ("train.deepspeed=0", "train.dtype=bfloat16"),
    "zero1-bf16": ("train.deepspeed=1", "train.dtype=bfloat16"),
    "zero3-bf16": ("train.deepspeed=3", "train.dtype=bfloat16"),
}


def test_x(tmp_path: Path) -> None:
    def runs(name: str) -> list[Run]:
        return [Run(tiny_job(tmp_path, *kind), tmp_path / name / key) for key, kind in KINDS.items()]
    prepared, _ = prepare(runs("x")[0].config)
    import time
    t = time.time()
    two = run_world(2, run_whole, runs("two"), prepared)
    print(time.time() - t); t = time.time()
    one_rest = run_world(1, run_rest, runs("two"), prepared)
    print(time.time() - t); t = time.time()
    one = run_world(1, run_whole, runs("one"), prepared)
    print(time.time() - t); t = time.time()
    two_rest = run_world(2, run_rest, runs("one"), prepared)
    print(time.time() - t); t = time.time()
    for i, k in enumerate(KINDS):
        print(k, two[0][i], one_rest[0][i], one[0][i], two_rest[0][i])
