"""What a benchmark says about where and when it ran."""

import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
import transformers

_READ_BYTES = 256 * 2**20


def describe(threads: int) -> dict[str, str]:
    """Return hardware, date and versions."""
    return {
        "hardware": f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def stdout_for_report() -> TextIO:
    """Return stdout; what else is printed from now on, as Ray prints what workers say, is sent to
    stderr."""
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return report


def read_bandwidth(rounds: int = 5) -> float:
    """Return bytes per second of reading memory, the best of some rounds: the floor of decoding
    one row is that every weight is read once per token."""
    values = torch.ones(_READ_BYTES // 4)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        values.sum()
        best = max(best, _READ_BYTES / (time.perf_counter() - start))
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
