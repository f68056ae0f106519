"""A stretch of a training: some of its steps, from where another stretch ended.

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
"""In the folder of a stretch, beside the model: what the next one starts from."""

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
"""The settings that may differ from those of the stretch before. Any other decides shapes, rows, or
how many steps there are, or is restored with the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Which steps of a training are taken."""

    until: int
    """The step that it ends behind."""
    start: Path | None = None
    """The folder of the stretch before. Its settings may differ in what is `CHANGEABLE`."""

    def run_before(self, config: JobConfig) -> tuple[str, str] | None:
        """Return the id and the store of the MLflow run of the stretch before, if its settings were
        the same: a run has one value of each."""
        record = None if self.start is None else read_record(self.start)
        if record is None or record["run_id"] is None:
            return None
        if _settings(record["config"]) != _settings(config.model_dump(mode="json")):
            return None
        return record["run_id"], record["tracking_uri"]


def stretch_hash(config: JobConfig, stretch: Stretch) -> str:
    """Return a hash of what decides the weights at the end of a stretch, for a resolved config."""
    start = None if stretch.start is None else identity(str(stretch.start))
    return content_hash({"job": config_hash(config), "until": stretch.until, "start": start})


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("output", "force")}
