"""What is written beside a trained model: its training record, and for a guide its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jobs import tracking
from jobs.config import JobConfig
from jobs.run_folder import RunInfo
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from pilotfish.train.export import write_record


def training_record(
    config: JobConfig, info: RunInfo, history: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Return what came of a run so far."""
    return {
        "config_hash": info.config_hash,
        "config": config.model_dump(mode="json"),
        "run_id": info.run_id,
        "tracking_uri": info.tracking_uri,
        "metrics": history[-1],
        "history": list(history),
        **tracking.git_state(),
    }


def version_tags(config: JobConfig, record: Mapping[str, Any]) -> dict[str, str]:
    """Return what the model registry says of a version."""
    return {
        "kind": config.guide_kind or "base",
        "base": config.base_name[:200],
        "config_hash": record["config_hash"],
        "git_commit": record["git_commit"],
    }


def describe(folder: Path, config: JobConfig, record: dict[str, Any]) -> None:
    """Write the training record, and for a guide its card."""
    write_record(folder, record)
    kind = config.guide_kind
    if kind is None:
        return
    keys = ("config_hash", "run_id", "git_commit", "metrics")
    card = GuideCard(
        kind=kind,
        base=config.base_name,
        vocab=fingerprint(AutoTokenizer.from_pretrained(folder)),
        dtype=config.train.dtype,
        training={key: record[key] for key in keys},
        **config.card_fields(record["metrics"]),
    )
    write_card(folder, card)
