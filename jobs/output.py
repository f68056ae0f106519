"""Where a job writes, and whether it has done so already."""

from pathlib import Path
from typing import TypeVar

from jobs.config import TrackingConfig
from jobs.paths import output_paths
from pilotfish.config import Config
from pilotfish.errors import ConfigError


class OutputConfig(Config):
    """Where a job writes, and where it is recorded."""

    root: str = "runs"
    """Folder of everything jobs write; on a cluster, one that every node sees."""
    output: str
    """The folder to write."""
    tracking: TrackingConfig = TrackingConfig()


C = TypeVar("C", bound=OutputConfig)


def with_output(config: C) -> C:
    """Return the config with absolute paths of root and output. Raises `ConfigError`."""
    return config.model_copy(update=output_paths(config.root, config.output))


def is_current(output: Path, made_from: str | None, wanted: str) -> bool:
    """Say whether an output is there, and was made from settings of the hash that is wanted.

    `made_from` is the hash in its record, None without a record. Raises `ConfigError` for an output
    of anything else.
    """
    if not output.exists():
        return False
    if made_from == wanted:
        return True
    how = "by this command" if made_from is None else "from these settings"
    raise ConfigError(
        f"output {str(output)!r} exists and was not made {how}. Choose another output, or pass "
        "force=true to replace it."
    )
