"""What every training worker runs: one DeepSpeed loop for all objectives.

Shapes: B rows, T positions, V vocabulary.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from jobs.checkpoint import Checkpointer, Position
from jobs.config import JobConfig
from jobs.dataset import Prepared
from jobs.model import build_model
from pilotfish.data.batching import BatchPlan
from pilotfish.data.collate import (
    Example,
    LMBatch,
    PreferenceBatch,
    collate_demonstrations,
    collate_pairs,
)
from pilotfish.train.deepspeed_config import Launch, resolve
from pilotfish.train.metrics import Tally, add, wilson_interval
from pilotfish.train.objectives import OBJECTIVES, LossOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the driver sends to every worker."""

    config: JobConfig
    prepared: Any
    """Object reference of the job's `Prepared` data."""
    progress: Any
    """Actor handle of the progress board."""


def train_loop(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Train to the end, or from the last checkpoint to the end; return all reports."""
    job: WorkerSettings = settings["job"]
    _set_log_levels()
    torch.set_num_threads(job.config.scaling.threads)
    loop = TrainingLoop(job.config, ray.get(job.prepared))
    return loop.run(job.progress)


class TrainingLoop:
    """One worker's share of a training run."""

    def __init__(self, config: JobConfig, prepared: Prepared) -> None:
        self._config = config
        self._prepared = prepared
        self._objective = OBJECTIVES[config.objective.kind]
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self._total_steps = config.train.total_steps(len(prepared.train))
        self._plan = BatchPlan(
            [len(example) for example in prepared.train],
            batch_size=config.train.batch_size,
            seed=config.seed,
            world_size=self._world_size,
            rank=self._rank,
        )
        self._engine = self._start_engine()
        self._checkpointer = Checkpointer(self._engine, prepared.tokenizer)

    def run(self, progress: Any) -> list[dict[str, float]]:
        """Take the steps that are left, reporting, evaluating and saving on the way."""
        position = self._checkpointer.resume() or Position()
        tallies: dict[str, Tally] = {}
        started, since = time.monotonic(), position.step
        for step in range(position.step, self._total_steps):
            tallies = add(tallies, self._step(step))
            done = step + 1
            if self._rank == 0:
                progress.post.remote(done, self._total_steps, _note(tallies))
            if not self._is_due(done):
                continue
            report = self._summarise(done, tallies)
            report["train/seconds_per_step"] = (time.monotonic() - started) / (done - since)
            position.history.append(report)
            position.step = done
            save = self._is_multiple(done, self._config.train.checkpoint_every)
            if done < self._total_steps:
                self._report(report, position, save=save)
            tallies, started, since = {}, time.monotonic(), done
        # Also when nothing was left to do: the driver takes the model from the last report.
        self._report(position.history[-1], position, save=True, export=True)
        return position.history

    def _start_engine(self) -> Any:
        import deepspeed  # here: the driver imports this module and has no use for it

        # Its scheduler warns about its own construction.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        config = self._config
        on_cpu = not config.scaling.use_gpu
        if on_cpu:
            # The shared-memory collective is compiled on first use; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.manual_seed(config.seed)
        model = build_model(config.model, self._prepared.tokenizer, dtype=config.train.dtype)
        launch = Launch(total_steps=self._total_steps, num_workers=self._world_size, on_cpu=on_cpu)
        engine, *_ = deepspeed.initialize(model=model, config=resolve(config.train, launch))
        return engine

    def _step(self, step: int) -> dict[str, Tally]:
        """Take one optimizer step; return this worker's tallies."""
        self._engine.train()
        rows = [self._prepared.train[index] for index in self._plan.batch(step)]
        batches = self._batches(rows, self._engine.train_micro_batch_size_per_gpu())
        units = [self._objective.units(batch.loss_mask_BT) for batch in batches]
        total_units = self._sum(torch.tensor([float(sum(units))]))[0]
        # DeepSpeed averages over workers and passes as if all held the same number of units.
        share = self._world_size * len(batches) / total_units
        tallies: dict[str, Tally] = {}
        for batch, num in zip(batches, units, strict=True):
            output = self._loss(batch)
            self._engine.backward(output.loss * (num * share))
            self._engine.step()
            tallies = add(tallies, output.metrics)
        return tallies

    def _loss(self, batch: LMBatch | PreferenceBatch) -> LossOutput:
        batch = batch.to(self._engine.device)
        logits_BTV: Tensor = self._engine(
            input_ids=batch.token_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).logits
        return self._objective.loss(
            logits_BTV, batch.token_ids_BT, batch.loss_mask_BT, self._config.objective
        )

    def _batches(self, rows: Sequence[Example], size: int) -> list[LMBatch | PreferenceBatch]:
        pad_id = self._prepared.tokenizer.pad_token_id
        pad_id = 0 if pad_id is None else pad_id  # masked everywhere, so any id will do
        collate: Any = collate_demonstrations
        if self._objective.rows == "pairs":
            collate = collate_pairs
        return [collate(rows[at : at + size], pad_id) for at in range(0, len(rows), size)]

    def _is_due(self, done: int) -> bool:
        """Say whether this step is reported. A checkpoint is, so that resuming starts a window."""
        train = self._config.train
        every = (train.log_every, train.eval_every, train.checkpoint_every)
        return done == self._total_steps or any(self._is_multiple(done, n) for n in every)

    @staticmethod
    def _is_multiple(done: int, every: int) -> bool:
        return every > 0 and done % every == 0

    def _summarise(self, done: int, tallies: dict[str, Tally]) -> dict[str, float]:
        report: dict[str, float] = {"step": done}
        report |= {f"train/{name}": t.mean for name, t in self._reduce(tallies).items()}
        report["train/learning_rate"] = float(self._engine.get_lr()[0])
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            report["train/gradient_norm"] = float(norm)
        every = self._config.train.eval_every
        if done == self._total_steps or self._is_multiple(done, every):
            report |= self._evaluate()
        return report

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the metrics over all held-out rows."""
        self._engine.eval()
        rows = sorted(self._prepared.heldout, key=len)
        size = self._engine.train_micro_batch_size_per_gpu()
        chunk = size * self._world_size
        tallies: dict[str, Tally] = {}
        for start in range(0, len(rows), chunk):
            mine = rows[start : start + chunk][self._rank :: self._world_size]
            # ZeRO-3 gathers weights in every forward pass, so all workers must run as many: one
            # without rows runs a row that does not count.
            [batch] = self._batches(mine or rows[:1], size)
            metrics = self._loss(batch).metrics
            tallies = add(tallies, metrics if mine else dict.fromkeys(metrics, Tally(0.0, 0.0)))
        total = self._reduce(tallies)
        report = {f"eval/{name}": t.mean for name, t in total.items()}
        if "accuracy" in total:
            report["eval/accuracy_low"], report["eval/accuracy_high"] = wilson_interval(
                total["accuracy"]
            )
        return report

    def _reduce(self, tallies: dict[str, Tally]) -> dict[str, Tally]:
        """Return the tallies summed over all workers, which hold the same names in one order."""
        pairs = [(tally.total, tally.count) for tally in tallies.values()]
        values = torch.tensor(pairs, dtype=torch.float64)
        summed = self._sum(values).tolist()
        return {name: Tally(*pair) for name, pair in zip(tallies, summed, strict=True)}

    def _sum(self, values: Tensor) -> Tensor:
        values = values.double().to(self._engine.device)
        dist.all_reduce(values)
        return values.cpu()

    def _report(
        self, report: dict[str, float], position: Position, *, save: bool, export: bool = False
    ) -> None:
        if not save:
            ray.train.report(report)
            return
        with self._checkpointer.write(position, export=export) as folder:
            ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _set_log_levels() -> None:
    # Ray Train logs every report at INFO, under a file name instead of a logger's name.
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("jobs", "pilotfish"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()


def _note(tallies: dict[str, Tally]) -> str:
    means = {name: tallies[name].mean for name in ("loss", "accuracy") if name in tallies}
    return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if math.isfinite(mean))
