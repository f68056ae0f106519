"""A part of a training: it starts where another part ended, and ends behind some step.

So a training can be left, looked at, and taken up again by whoever has its folder, under other
settings of the optimizer or of the loss too. The schedule is that of the whole training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import JobConfig
from jobs.resolve import config_hash, content_hash, identity
from pilotfish.train.export import read_record

CHECKPOINT_FOLDER = "checkpoint"
"""In the folder of a part, beside the model: what the next part starts from."""

CHANGEABLE = frozenset(
    {
        *("train.learning_rate", "train.final_lr_ratio", "train.weight_decay", "train.betas"),
        *("objective.beta_r", "objective.beta", "objective.sft_weight"),
        *(
            f"objective.algorithm.{name}"
            for name in ("clip", "gae_lambda", "gamma", "entropy", "value", "value_clip")
        ),
        *("objective.algorithm.target_kl", "objective.algorithm.beta_kl"),
    }
)
"""The settings that may differ from those of the part before. Any other decides shapes, rows, or
how many steps there are, or is restored with the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which steps of a training are taken."""

    until: int
    """The step that it ends behind."""
    start: Path | None = None
    """The folder of the part before. Its settings may differ in what is `CHANGEABLE`."""

    def run_before(self, config: JobConfig) -> tuple[str, str] | None:
        """Return the id and the store of the MLflow run of the part before, if its settings were
        the same: a run has one value of each."""
        record = None if self.start is None else read_record(self.start)
        if record is None or record["run_id"] is None:
            return None
        if _settings(record["config"]) != _settings(config.model_dump(mode="json")):
            return None
        return record["run_id"], record["tracking_uri"]


def part_hash(config: JobConfig, part: Part) -> str:
    """Return a hash of what decides the weights at the end of a part, for a resolved config."""
    start = None if part.start is None else identity(str(part.start))
    return content_hash({"job": config_hash(config), "until": part.until, "start": start})


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("output", "force")}
