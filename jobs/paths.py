"""Absolute paths: workers and actors run in other folders than the driver."""

from pathlib import Path
from typing import Any, TypeVar

from jobs.cluster import check_root
from pilotfish.config import Config
from pilotfish.data.sources import DataSource
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import ModelRewardConfig, RewardConfig

C = TypeVar("C", bound=Config)


def absolute(value: Any) -> Any:
    """Return the absolute path of what exists; anything else (a hub id, None) as it is."""
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def output_paths(root: str, output: str) -> dict[str, str]:
    """Return both as absolute paths, by name. Raises `ConfigError` for an output that gets lost."""
    whole = check_root(root)
    path = Path(output).expanduser()
    if not path.is_absolute() and not path.resolve().is_relative_to(whole):
        raise ConfigError(
            f"output is {output!r}, which is outside root {str(whole)!r}. Write it as "
            "${root}/name, or give an absolute path."
        )
    return {"root": str(whole), "output": str(path.resolve())}


def located(rows: C) -> C:
    """Return a section about rows with absolute paths, if it has any."""
    if not isinstance(rows, DataSource):
        return rows
    paths = (rows.path,) if isinstance(rows.path, str) else rows.path
    return rows.model_copy(update={"path": tuple(absolute(path) for path in paths)})


def judged_by(judge: RewardConfig) -> RewardConfig:
    """Return a judge with an absolute path, if it has one."""
    if isinstance(judge, ModelRewardConfig):
        return judge.model_copy(update={"path": absolute(judge.path)})
    return judge
