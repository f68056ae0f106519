"""Where models come from: folders, hub ids and MLflow URIs.

An alias is pinned to a version once, when the application is built, so that every replica of one
deployment loads the same weights however often the alias moves.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pilotfish.errors import CheckpointError

_REGISTRY = "models:/"
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model that is pinned down: loading it twice loads the same weights."""

    uri: str
    """An absolute folder, a hub id, or an MLflow URI without an alias."""
    tracking_uri: str | None = None

    def load(self, version: str) -> str:
        """Return what `fetch` does, if it is this version.

        Raises `CheckpointError` for a folder whose files are others by now.
        """
        folder = self.fetch()
        if (found := self.version(folder)) != version:
            raise CheckpointError(
                f"{self.uri!r} held version {version} and holds {found} now: it was overwritten "
                "while it was served. Reload the guide, or deploy again."
            )
        return folder

    def fetch(self) -> str:
        """Return a local folder (or the hub id), downloading if need be.

        Raises `CheckpointError` if MLflow has no such artifact.
        """
        if not is_mlflow_uri(self.uri):
            return self.uri
        from mlflow import MlflowClient, artifacts
        from mlflow.exceptions import MlflowException

        uri = self.uri
        try:
            if uri.startswith(_REGISTRY):
                # Not left to download_artifacts, which asks the process's default registry.
                name, _, version = uri.removeprefix(_REGISTRY).rpartition("/")
                client = MlflowClient(tracking_uri=self.tracking_uri)
                uri = client.get_model_version_download_uri(name, version)
            return artifacts.download_artifacts(artifact_uri=uri, tracking_uri=self.tracking_uri)
        except (MlflowException, OSError) as error:
            raise CheckpointError(
                f"cannot fetch {self.uri!r} from MLflow at {self.tracking_uri or 'its default'}: "
                f"{error}. Check the URI, and set tracking_uri or MLFLOW_TRACKING_URI."
            ) from error

    def version(self, folder: str) -> str:
        """Name these weights: the registry's version, a hash of the folder, or the hub id."""
        if self.uri.startswith(_REGISTRY):
            return self.uri.rpartition("/")[2]
        return folder_version(folder) if Path(folder).is_dir() else self.uri


def is_mlflow_uri(path: str) -> bool:
    return path.startswith((_REGISTRY, "runs:/"))


def follows_alias(path: str) -> bool:
    """Whether a path may stand for another version tomorrow, without anybody writing to it."""
    return path.startswith(_REGISTRY) and "@" in path


def pin(path: str, tracking_uri: str | None) -> Artifact:
    """Resolve an alias to a version, and a relative folder to an absolute one.

    Raises `CheckpointError` for an alias that the registry does not know.
    """
    if not is_mlflow_uri(path):
        return Artifact(str(Path(path).resolve()) if Path(path).is_dir() else path)
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    name, at, alias = path.removeprefix(_REGISTRY).partition("@")
    if not path.startswith(_REGISTRY) or not at:
        return Artifact(path, uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        version = MlflowClient(tracking_uri=uri).get_model_version_by_alias(name, alias).version
    except MlflowException as error:
        raise CheckpointError(
            f"MLflow at {uri or 'its default'} cannot resolve {path!r}: {error}. Check the alias, "
            "and set tracking_uri or MLFLOW_TRACKING_URI."
        ) from error
    return Artifact(f"{_REGISTRY}{name}/{version}", uri)


def folder_version(folder: str | Path) -> str:
    """Return a short hash of a folder: names, sizes, and both ends of every file.

    Both ends rather than all of it, since hashing 140 GB would take minutes at every start; two
    trainings never agree on the first and last megabyte of their weights.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
