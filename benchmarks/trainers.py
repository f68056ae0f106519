"""Two loops that learn from the same pairs: ours, as a Ray Train worker runs it, and TRL's.

Both start from one model folder and take the same batches in the same order.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.distributed as dist

from jobs.config import JobConfig, KitchenData, ModelConfig
from jobs.dataset import ROW_KINDS, Prepared
from jobs.model import build_model
from jobs.steps import NUM_TOKENS
from jobs.supervised import SupervisedTraining
from pilotfish import world
from pilotfish.data.batching import BatchPlan
from pilotfish.data.formats import Row
from pilotfish.train.config import TrainConfig
from pilotfish.train.metrics import Tally, add
from pilotfish.train.objectives import DPOConfig, GenARMConfig

ROOT = Path(__file__).resolve().parents[1]
BETA, LEARNING_RATE = 0.1, 1e-4
_GROUP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Size:
    """A model, and how much of its training is one round."""

    architecture: dict[str, Any]
    pairs: int
    """Per optimizer step."""
    steps: int
    """Per round."""


@dataclass(frozen=True)
class Taken:
    """What one round took."""

    seconds: float
    cpu_seconds: float
    """Of all threads. What else runs on the machine counts less here."""
    num_tokens: int
    """Padding does not count."""
    loss: float


class Loop(Protocol):
    def take(self) -> Taken:
        """Train for one round."""
        ...


@contextmanager
def only_worker() -> Iterator[None]:
    """Be the only worker of a group, set up as Ray Train does it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {**_GROUP, "DS_ACCELERATOR": "cpu"}),
    ):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def save_random_model(size: Size, folder: Path) -> int:
    """Write a random model with the kitchen's tokenizer; return its number of parameters."""
    torch.manual_seed(0)
    tokenizer = world.build_tokenizer()
    model = build_model(size.architecture, tokenizer, head="lm", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def job(
    objective: GenARMConfig | DPOConfig, size: Size, *, model: Path, total_steps: int
) -> JobConfig:
    """Return a job that learns once from each of its pairs."""
    return JobConfig(
        output="nothing is written",
        model=ModelConfig(init=str(model)),
        objective=objective,
        data=KitchenData(source="kitchen", num=total_steps * size.pairs, num_heldout=1),
        train=TrainConfig(
            epochs=1, batch_size=size.pairs, learning_rate=LEARNING_RATE, final_lr_ratio=1.0
        ),
    )


class OurLoop:
    """See `Loop`."""

    def __init__(self, config: JobConfig, prepared: Prepared, *, steps: int) -> None:
        self._trainee = SupervisedTraining(config, prepared)
        self._steps, self._done = steps, 0

    def take(self) -> Taken:
        started, cpu_started = time.perf_counter(), time.process_time()
        tallies: dict[str, Tally] = {}
        for number in range(self._done, self._done + self._steps):
            tallies = add(tallies, self._trainee.step(number))
        self._done += self._steps
        return Taken(
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            num_tokens=int(tallies[NUM_TOKENS].total),
            loss=tallies["loss"].mean,
        )


class TRLLoop:
    """TRL's DPO trainer in a process of its own, which waits between rounds. See `Loop`."""

    def __init__(
        self,
        python: str,
        config: JobConfig,
        prepared: Prepared,
        *,
        folder: Path,
        steps: int,
        threads: int,
        precompute: bool,
    ) -> None:
        """`precompute`: the reference's log-probs are computed before the first round."""
        assert config.model is not None
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _GROUP},
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "run_trl.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        settings = {
            "output": str(folder / "trl"),
            "model": config.model.init,
            "rows": _rows_in_order(config, prepared),
            "pairs": config.train.batch_size,
            "steps": steps,
            "total_steps": config.train.total_steps(len(prepared.train)),
            "threads": threads,
            "learning_rate": LEARNING_RATE,
            "beta": BETA,
            "precompute": precompute,
        }
        self.version: str = self._ask(json.dumps(settings))["trl"]

    def take(self) -> Taken:
        return Taken(**self._ask(""))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the process with TRL has ended; what it wrote is above")
        return json.loads(answer)


def _rows_in_order(config: JobConfig, prepared: Prepared) -> Sequence[Row]:
    """Return the pairs as text, in the order in which our loop learns from them."""
    assert isinstance(config.data, KitchenData)
    rows = ROW_KINDS["pairs"].draw(config.data)
    lengths = [len(example) for example in prepared.train]
    plan = BatchPlan(lengths, batch_size=config.train.batch_size, seed=config.seed)
    return [rows[place] for step in range(plan.batches_per_epoch) for place in plan.batch(step)]
