"""A progress bar in the driver's terminal, fed by the workers.

Ray's own distributed bars pass through the log stream, where Ray Train adds blank lines to them.
"""

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
# Where every refresh is a new line (a log file, `ray job submit`), few lines are enough.
_SECONDS_PER_LINE = 15.0

_shown = True


def hide_bars() -> None:
    """Show no bars in this process."""
    global _shown
    _shown = False


def are_hidden() -> bool:
    return not _shown


class ProgressBoard:
    """The latest step of a run, kept by one small actor."""

    def __init__(self) -> None:
        self._step = 0
        self._total = 0
        self._note = ""

    def post(self, step: int, total: int, note: str) -> None:
        self._step, self._total, self._note = step, total, note

    def read(self) -> tuple[int, int, str]:
        return self._step, self._total, self._note


def refresh_seconds() -> float:
    """Return how long a bar waits between refreshes where it writes to."""
    return _POLL_SECONDS if sys.stderr.isatty() else _SECONDS_PER_LINE


class Progress:
    """What a bar shows."""

    def __init__(self) -> None:
        self.board: Any = ray.remote(num_cpus=0)(ProgressBoard).remote()
        """The handle of the actor that workers `post` to."""
        self.finished: int | None = None
        """The last step there was, once the driver knows it: the board may not answer in time."""


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Show a bar while the block runs."""
    progress = Progress()
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(progress, label, stop), daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        stop.set()
        thread.join()
        ray.kill(progress.board)


def _show(progress: Progress, label: str, stop: threading.Event) -> None:
    # Not `dynamic_ncols`: a pseudo-terminal of unknown width would be a bar of no width.
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    with tqdm(
        desc=label, unit="step", mininterval=refresh_seconds(), ncols=width, disable=are_hidden()
    ) as bar:
        bar.set_postfix_str("starting workers")
        while not stop.wait(_POLL_SECONDS):
            _refresh(bar, progress.board)
        _refresh(bar, progress.board)
        if (last := progress.finished) is not None:
            bar.total = last
            bar.update(last - bar.n)


def _refresh(bar: Any, board: Any) -> None:
    try:
        step, total, note = ray.get(board.read.remote(), timeout=_ANSWER_SECONDS)
    except RayError:
        return  # the bar is a comfort: a busy cluster must not stop the run
    if total:
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(step - bar.n)
