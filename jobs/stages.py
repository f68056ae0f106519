"""Commands that need each other's output, run side by side in a few long-lived processes.

A process of its own for every command would spend more time on imports than a small training takes.
"""

import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from tqdm import tqdm

from jobs.cluster import REPOSITORY
from jobs.progress import refresh_seconds


class Failed(Exception):
    """A stage ended with an error."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of this repository: a module whose `main` takes arguments."""

    module: str
    arguments: tuple[str, ...]
    """`{root}` in them is the root."""
    needs: tuple[str, ...] = ()
    """The stages that must have ended before this one begins."""


def with_needs(names: Sequence[str], stages: Mapping[str, Stage]) -> list[str]:
    """Return these stages and all that they need, in the order of `stages`."""
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += stages[name].needs
    return [name for name in stages if name in wanted]


def run_stages(
    stages: Mapping[str, Stage], root: Path, *, logs: Path, num_lanes: int, label: str
) -> dict[str, float]:
    """Run stages on the connected cluster, `num_lanes` at a time; return each one's seconds.

    Each writes to a log of its own in `logs`. What each leaves under `root` is its own affair: a
    stage whose process dies is begun again, once. Raises `Failed`, with the end of the log, for the
    first that fails; those that run are ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(stages)
    lane_class: Any = ray.remote(
        num_cpus=0, max_restarts=-1, max_task_retries=1, scheduling_strategy="SPREAD"
    )(Lane)
    idle = [lane_class.remote() for _ in range(min(num_lanes, len(stages)))]
    running: dict[Any, tuple[str, Any]] = {}
    seconds: dict[str, float] = {}
    interval = refresh_seconds()
    with tqdm(total=len(stages), desc=label, unit="stage", ncols=100, mininterval=interval) as bar:
        try:
            while waiting or running:
                ready = [name for name in waiting if set(stages[name].needs) <= set(seconds)]
                for name in ready[: len(idle)]:
                    waiting.remove(name)
                    lane = idle.pop()
                    running[lane.run.remote(stages[name], root, logs / f"{name}.log")] = name, lane
                bar.set_postfix_str(", ".join(name for name, _ in running.values()), refresh=False)
                bar.update(0)
                for done in ray.wait(list(running), timeout=1.0)[0]:
                    name, lane = running.pop(done)
                    seconds[name] = _seconds_of(done, name, logs / f"{name}.log")
                    idle.append(lane)
                    tqdm.write(f"{name:18} {seconds[name]:6.0f} s")
                    bar.update()
        finally:
            for lane in (*idle, *(lane for _, lane in running.values())):
                ray.kill(lane)
    return seconds


class Lane:
    """An actor that runs commands, one after the other."""

    def run(self, stage: Stage, root: Path, log: Path) -> tuple[int, float]:
        """Run the command with its output in `log`; return its exit code and its seconds."""
        started = time.monotonic()
        os.chdir(REPOSITORY)
        arguments = [argument.format(root=root) for argument in stage.arguments]
        with _output_in(log):
            try:
                code = importlib.import_module(stage.module).main(arguments)
            except SystemExit as end:  # of a command line that cannot be read
                code = end.code
            except Exception:
                traceback.print_exc()
                code = 1
        return int(code or 0), time.monotonic() - started


@contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Write to `log` all that this process and its children print while the block runs."""
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)


def _seconds_of(done: Any, name: str, log: Path) -> float:
    """Return the seconds of a stage that has ended; raises `Failed` if it did not end well."""
    try:
        code, seconds = ray.get(done)
    except RayActorError as error:
        raise Failed(f"stage {name} lost its process twice: {error}\nIts log: {log}") from None
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        end = "\n".join(lines[-8:])
        raise Failed(f"stage {name} ended with exit code {code}; the end of {log}:\n{end}")
    return seconds
