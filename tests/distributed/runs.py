"""Runs that are cut in two: what each process of a group does, and with which settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.checkpoint import MODEL_FOLDER, Position, resume, save
from jobs.config import JobConfig
from jobs.dataset import Prepared
from jobs.steps import reduced
from jobs.supervised import SupervisedTraining
from pilotfish import config as configs

CONFIG = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen" / "base.yaml"
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
}
CHANGED = ("train.learning_rate=1e-3", "train.betas=[0.7,0.8]", "train.weight_decay=0.3")
CUT, END = 3, 6
CUT_FOLDER, END_FOLDER = "checkpoint_cut", "checkpoint_end"


def tiny_job(root: Path, *overrides: str) -> JobConfig:
    settings = [
        f"root={root}",
        f"output={root}/out",
        *(f"model.init.{name}={value}" for name, value in SHAPE.items()),
        *("data.num=60", "data.num_heldout=4", f"train.steps={END}", "train.batch_size=4"),
        *("train.learning_rate=4e-3", "train.warmup_steps=2", "scaling.num_workers=1"),
        *overrides,
    ]
    return configs.load(JobConfig, CONFIG, settings)


def run_whole(
    runs: Mapping[str, JobConfig], folder: Path, prepared: Prepared
) -> dict[str, list[float]]:
    """Run each from the beginning to the end; return the losses behind the cut.

    There is a checkpoint at the cut, and one at the end with the model, in a folder of the run.
    """
    return {name: _run_whole(config, folder / name, prepared) for name, config in runs.items()}


def run_rest(
    runs: Mapping[str, JobConfig], folder: Path, prepared: Prepared
) -> dict[str, list[float]]:
    """Resume each at the cut; return the losses behind it."""
    return {name: _run_rest(config, folder / name, prepared) for name, config in runs.items()}


def run_changed(
    runs: Mapping[str, JobConfig], folder: Path, prepared: Prepared
) -> dict[str, tuple[dict[str, Any], list[float]]]:
    """Resume each at the cut; return the settings of its optimizer there, and the losses behind."""
    found = {}
    for name, config in runs.items():
        trainee = SupervisedTraining(config, prepared)
        resume(trainee.engine, folder / name / CUT_FOLDER)
        [group] = trainee.engine.optimizer.param_groups
        settings = {key: group[key] for key in ("lr", "betas", "weight_decay")}
        found[name] = settings, _losses(trainee, CUT, END)
    return found


def _run_whole(config: JobConfig, folder: Path, prepared: Prepared) -> list[float]:
    trainee = SupervisedTraining(config, prepared)
    history = [{"train/loss": loss} for loss in _losses(trainee, 0, CUT)]
    save(trainee.engine, folder / CUT_FOLDER, Position(CUT, history))
    losses = _losses(trainee, CUT, END)
    end = folder / END_FOLDER
    save(trainee.engine, end, Position(END, [{"train/loss": losses[-1]}]))
    trainee.write(end / MODEL_FOLDER)
    return losses


def _run_rest(config: JobConfig, folder: Path, prepared: Prepared) -> list[float]:
    trainee = SupervisedTraining(config, prepared)
    position = resume(trainee.engine, folder / CUT_FOLDER)
    assert position.step == len(position.history) == CUT
    return _losses(trainee, CUT, END)


def _losses(trainee: SupervisedTraining, start: int, stop: int) -> list[float]:
    tallies = (trainee.step(number) for number in range(start, stop))
    return [reduced(trainee.engine, found)["loss"].mean for found in tallies]
