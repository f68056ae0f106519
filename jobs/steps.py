"""The steps of a run: reported, evaluated and saved when they are due, whatever is trained."""

import logging
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from torch import Tensor

from jobs.checkpoint import MODEL_FOLDER, Position, resume, save
from jobs.stretch import CHECKPOINT_FOLDER, Stretch
from pilotfish.train.config import TrainConfig
from pilotfish.train.metrics import Tally, add, wilson_interval

logger = logging.getLogger(__name__)

NUM_TOKENS = "num_tokens"
"""A tally of this name counts the tokens of a step; they are reported per second."""


class Trainee(Protocol):
    """One worker's share of something that is trained. All methods are collectives."""

    engine: Any
    """DeepSpeed's."""
    total_steps: int

    def step(self, number: int) -> dict[str, Tally]:
        """Take an optimizer step; return this worker's tallies."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return what is measured on held-out rows, over all workers."""
        ...

    def write(self, folder: Path) -> None:
        """Write the finished model, from the first worker."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what resuming needs beside the engine's state and the number of the step."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def run_steps(
    trainee: Trainee, train: TrainConfig, progress: Any, *, stretch: Stretch | None = None
) -> list[dict[str, float]]:
    """Take the steps that are left, of the whole training or of a stretch; return all reports.

    `progress` is the board's handle.
    """
    position = _position(trainee, stretch)
    trainee.restore(position.state)
    total, rank = trainee.total_steps, dist.get_rank()
    if stretch is not None:
        total = min(stretch.until, total)
    tallies: dict[str, Tally] = {}
    started, since = time.monotonic(), position.step
    for step in range(position.step, total):
        tallies = add(tallies, trainee.step(step))
        done = step + 1
        if rank == 0:
            seconds = time.monotonic() - started
            progress.post.remote(done, total, _note(tallies, seconds))
        if not _is_due(done, total, train):
            continue
        report = {"step": float(done)} | _summarise(trainee.engine, tallies, started)
        report["train/seconds_per_step"] = (time.monotonic() - started) / (done - since)
        if done == total or _is_multiple(done, train.eval_every):
            report |= trainee.evaluate()
        position.history.append(report)
        position.step = done
        if done < total:
            position.state = trainee.state()
            if _is_multiple(done, train.checkpoint_every):
                _report_checkpoint(trainee, report, position)
            else:
                ray.train.report(report, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        tallies, started, since = {}, time.monotonic(), done
    position.state = trainee.state()
    # Also when nothing was left to do: the driver takes the model from the last report.
    _report_checkpoint(trainee, position.history[-1], position, is_last=True)
    return position.history


def reduced(engine: Any, tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """Return the tallies summed over all workers, which hold the same names in one order."""
    pairs = [(tally.total, tally.count) for tally in tallies.values()]
    summed = summed_over_workers(engine, torch.tensor(pairs, dtype=torch.float64)).tolist()
    return {name: Tally(*pair) for name, pair in zip(tallies, summed, strict=True)}


def summed_over_workers(engine: Any, values: Tensor) -> Tensor:
    """Return the elementwise sum over all workers, in float64 on the CPU."""
    values = values.double().to(engine.device)
    dist.all_reduce(values)
    return values.cpu()


def means(prefix: str, tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Return means by name, and an interval around an accuracy."""
    report = {f"{prefix}/{name}": tally.mean for name, tally in tallies.items()}
    if prefix == "eval" and "accuracy" in tallies:
        low, high = wilson_interval(tallies["accuracy"])
        report |= {"eval/accuracy_low": low, "eval/accuracy_high": high}
    return report


def _summarise(engine: Any, tallies: Mapping[str, Tally], started: float) -> dict[str, float]:
    total = reduced(engine, tallies)
    tokens = total.pop(NUM_TOKENS, None)
    report = means("train", total)
    if tokens is not None:
        report["train/tokens_per_second"] = tokens.total / (time.monotonic() - started)
    report["train/learning_rate"] = float(engine.get_lr()[0])
    norm = engine.get_global_grad_norm()
    if norm is not None:
        report["train/gradient_norm"] = float(norm)
    return report


def _is_due(done: int, total: int, train: TrainConfig) -> bool:
    """Say whether this step is reported. A checkpoint is, so that resuming starts a window."""
    every = (train.log_every, train.eval_every, train.checkpoint_every)
    return done == total or any(_is_multiple(done, n) for n in every)


def _is_multiple(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _position(trainee: Trainee, stretch: Stretch | None) -> Position:
    """Restore the run's last checkpoint, or that of the stretch before; return where to go on."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            return resume(trainee.engine, Path(folder))
    if stretch is not None and stretch.start is not None:
        return resume(trainee.engine, stretch.start / CHECKPOINT_FOLDER)
    return Position()


def _report_checkpoint(
    trainee: Trainee, report: dict[str, float], position: Position, *, is_last: bool = False
) -> None:
    """Save, and go on while the files are uploaded; of the last checkpoint, when they are.

    The last one holds the finished model too. Ray Train merges the workers' folders into one, and
    removes them here when they are uploaded.
    """
    # All reports are uploaded in their order, by a thread. One checkpoint at a time: a slow upload
    # must not fill this machine's disk.
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    folder = Path(tempfile.mkdtemp(prefix="pilotfish-checkpoint-"))
    save(trainee.engine, folder, position)
    if is_last:
        trainee.write(folder / MODEL_FOLDER)
    ray.train.report(
        report,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if is_last else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _note(tallies: Mapping[str, Tally], seconds: float) -> str:
    shown = {name: tallies[name].mean for name in ("loss", "accuracy", "reward") if name in tallies}
    parts = [f"{name} {mean:.3f}" for name, mean in shown.items() if math.isfinite(mean)]
    if NUM_TOKENS in tallies:  # of the first worker alone, which sees its own share
        rate = tallies[NUM_TOKENS].total * dist.get_world_size() / seconds
        parts.append(f"{rate:,.0f} tokens/s")
    return ", ".join(parts)
