"""Whether a folder holds a search already, and whether that one was finished."""

import json
import os
from pathlib import Path

from pilotfish.config import Config
from pilotfish.errors import ConfigError

_STATE_NAME = "search.json"


class State(Config):
    """What a search's folder says about its search."""

    digest: str
    """Hash of what decides the results."""
    run_id: str | None = None
    """Of MLflow."""
    is_done: bool = False


def begin(output: str | Path, digest: str, *, resume: bool) -> State:
    """Return where a search stands: done, cut short, or about to begin.

    Raises `ConfigError` for a folder of anything else, and for a search that was cut short unless
    it is to be resumed.
    """
    folder = Path(output)
    state = read_state(folder)
    if state is None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"output {str(folder)!r} exists and holds no search. Choose another output."
            )
        return State(digest=digest)
    if state.digest != digest:
        raise ConfigError(
            f"output {str(folder)!r} holds a search with other settings, or of models that have "
            "changed since. Choose another output, or remove the folder."
        )
    if not state.is_done and not resume:
        raise ConfigError(
            f"output {str(folder)!r} holds a search that was not finished. Pass --resume to go on "
            "where it stopped; or is it still running?"
        )
    return state


def read_state(folder: Path) -> State | None:
    path = folder / _STATE_NAME
    return State(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_state(output: str | Path, state: State) -> None:
    """Write a search's state, whole or not at all."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / f".{_STATE_NAME}.tmp"
    incoming.write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(incoming, folder / _STATE_NAME)
