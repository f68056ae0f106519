"""Where a job writes, and whether it has done so already."""

from pathlib import Path
from typing import TypeVar

from jobs.cluster import check_root
from jobs.config import TrackingConfig
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
    root = check_root(config.root)
    output = Path(config.output).expanduser()
    if not output.is_absolute() and not output.resolve().is_relative_to(root):
        raise ConfigError(
            f"output is {config.output!r}, which is outside root {str(root)!r}. Write it as "
            "${root}/name, or give an absolute path."
        )
    return config.model_copy(update={"root": str(root), "output": str(output.resolve())})


def absolute(path: str) -> str:
    """Return the path of what exists as an absolute one; anything else is a hub id."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


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
