"""MLflow: one run per job, created and closed by the driver, its metrics written by one writer."""

import logging
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from jobs.cluster import REPOSITORY

if TYPE_CHECKING:  # Ray Train's controller imports this module, and would spend seconds on torch
    from jobs.config import TrackingConfig

logger = logging.getLogger(__name__)

_MAX_PARAM_LENGTH = 500
_MAX_PARAMS_PER_CALL = 100
_MAX_METRICS_PER_CALL = 1000


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """An open MLflow run, by id: nothing relies on MLflow's per-process active run."""

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log the finite numbers among `metrics`."""
        now = get_current_time_millis()
        entries = [
            Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        for start in range(0, len(entries), _MAX_METRICS_PER_CALL):
            chunk = entries[start : start + _MAX_METRICS_PER_CALL]
            self.client.log_batch(self.run_id, metrics=chunk)

    def log_folder(self, folder: str | Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def log_figure(self, figure: Any, name: str) -> None:
        self.client.log_figure(self.run_id, figure, name)

    def register(
        self, folder: str | Path, *, config: "TrackingConfig", tags: dict[str, str]
    ) -> str:
        """Upload a model folder, make it a version of `config.register_as`, and move the alias.

        Returns the version. The folder comes back from `models:/<name>@<alias>`.
        """
        assert config.register_as is not None, "the caller has a name"
        client = self.client
        self.log_folder(folder, "model")
        try:
            client.create_registered_model(config.register_as)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(self.run_id).info.artifact_uri}/model"
        version = client.create_model_version(
            config.register_as, source=source, run_id=self.run_id, tags=tags
        )
        client.set_registered_model_alias(config.register_as, config.alias, version.version)
        logger.info("registered models:/%s@%s", config.register_as, config.alias)
        return str(version.version)


class MetricsWriter(ray.train.UserCallback):
    """Writes what workers report to MLflow. Runs in Ray Train's controller: one writer per run."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        report = dict(metrics[0])
        self._run.log_metrics(report, step=int(report.pop("step")))


@contextmanager
def tracked_run(
    config: "TrackingConfig",
    *,
    root: str | Path,
    name: str,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    continued: str | None = None,
) -> Iterator[TrackedRun | None]:
    """Open a run with its resolved settings; it ends FINISHED, or FAILED if the block raises.

    Gives None where tracking is off. `continued` is the id of a run that was cut short and now goes
    on, if it is still there.
    """
    if not config.enabled:
        yield None
        return
    uri = tracking_uri(config, root)
    # The first to touch an embedded store makes its tables; two jobs must not do it at once.
    Path(root).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(root) / ".mlflow.lock"):
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, config, root)
    if continued is not None and _reopen(client, continued):
        run = TrackedRun(uri, continued)
    else:
        nested = {} if config.parent is None else {MLFLOW_PARENT_RUN_ID: config.parent}
        all_tags = {**git_state(), **nested, **tags}
        info = client.create_run(experiment_id, run_name=name, tags=all_tags).info
        run = TrackedRun(uri, info.run_id)
        _log_settings(run, settings)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        client.set_terminated(run.run_id, status)


def _reopen(client: MlflowClient, run_id: str) -> bool:
    """Say whether a run was found; it is running again."""
    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def tracking_uri(config: "TrackingConfig", root: str | Path) -> str:
    """Return the tracking server: of the config, the environment, or a file under the root."""
    default = f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def git_state(folder: Path = REPOSITORY) -> dict[str, str]:
    """Return the commit and whether the tree differs from it; `unknown` outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        dirty = str(bool(git("status", "--porcelain"))).lower()
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}


def curves_figure(
    history: Sequence[Mapping[str, float]], quantities: Sequence[str], title: str
) -> Any:
    """Return a figure of the curves of these quantities in a run's reports, where it has them."""
    from matplotlib.figure import Figure

    names = [name for name in quantities if any(f"train/{name}" in r for r in history)]
    figure = Figure(figsize=(6.4 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for part, style in (("train", "-"), ("eval", "o-")):
            points = [(r["step"], r[f"{part}/{name}"]) for r in history if f"{part}/{name}" in r]
            if points:
                label = "held-out" if part == "eval" else "training"
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure


def _experiment(client: MlflowClient, config: "TrackingConfig", root: str | Path) -> str:
    name = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pilotfish"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server knows where artifacts go. The embedded store would use the current folder.
    embedded = tracking_uri(config, root).startswith("sqlite:")
    location = (Path(root).resolve() / "mlartifacts").as_uri() if embedded else None
    return client.create_experiment(name, artifact_location=location)


def _log_settings(run: TrackedRun, settings: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
        run.client.log_artifact(run.run_id, str(path))
    params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in _flat(settings)]
    for start in range(0, len(params), _MAX_PARAMS_PER_CALL):
        chunk = params[start : start + _MAX_PARAMS_PER_CALL]
        run.client.log_batch(run.run_id, params=chunk)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
