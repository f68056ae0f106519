"""Runs that are cut in two: what each process of a group does, and with which settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.checkpoint import MODEL_FOLDER, Position, resume, save
from jobs.config import JobConfig
from jobs.dataset import Prepared
from jobs.steps import reduced
from jobs.supervised import SupervisedTraining
from pilotfish import config as configs

CONFIG = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen" / "base.yaml"
CUT, END = 3, 6


@dataclass(frozen=True, slots=True)
class Run:
    """A run with a checkpoint at the cut and one at the end, in a folder each."""

    config: JobConfig
    folder: Path

    @property
    def cut(self) -> Path:
        return self.folder / "cut"

    @property
    def end(self) -> Path:
        return self.folder / "end"


def tiny_job(root: Path, *overrides: str) -> JobConfig:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 36,
    }
    settings = [
        f"root={root}",
        f"output={root}/out",
        *(f"model.init.{name}={value}" for name, value in shape.items()),
        *("data.num=60", "data.num_heldout=4", f"train.steps={END}", "train.batch_size=4"),
        *("train.learning_rate=4e-3", "train.warmup_steps=2", "scaling.num_workers=1"),
        *overrides,
    ]
    return configs.load(JobConfig, CONFIG, settings)


def run_whole(runs: Sequence[Run], prepared: Prepared) -> list[list[float]]:
    """Run each from the beginning to the end; return the losses behind the cut."""
    return [_run_whole(run, prepared) for run in runs]


def run_rest(runs: Sequence[Run], prepared: Prepared) -> list[list[float]]:
    """Resume each at the cut; return the losses behind it."""
    return [_run_rest(run, prepared) for run in runs]


def _run_whole(run: Run, prepared: Prepared) -> list[float]:
    trainee = SupervisedTraining(run.config, prepared)
    history = [{"train/loss": loss} for loss in _losses(trainee, 0, CUT)]
    save(trainee.engine, run.cut, Position(CUT, history))
    losses = _losses(trainee, CUT, END)
    save(trainee.engine, run.end, Position(END, [{"train/loss": losses[-1]}]))
    trainee.write(run.end / MODEL_FOLDER)
    return losses


def _run_rest(run: Run, prepared: Prepared) -> list[float]:
    trainee = SupervisedTraining(run.config, prepared)
    position = resume(trainee.engine, run.cut)
    assert position.step == len(position.history) == CUT
    return _losses(trainee, CUT, END)


def _losses(trainee: SupervisedTraining, start: int, stop: int) -> list[float]:
    tallies = (trainee.step(number) for number in range(start, stop))
    return [reduced(trainee.engine, found)["loss"].mean for found in tallies]
