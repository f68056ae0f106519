"""A search in MLflow: a run, and a child of it for every trial."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from jobs import tracking
from jobs.resolve import content_hash
from jobs.tracking import TrackedRun
from tune.choice import Trial
from tune.config import SearchConfig
from tune.space import show
from tune.state import State, write_state

_KNOBS_TAG = "knobs"


@contextmanager
def tracked_search(config: SearchConfig, state: State) -> Iterator[TrackedRun | None]:
    """Open the run of a search, or that of one which was cut short, and note it in the folder."""
    with tracking.tracked_run(
        config.tracking,
        root=config.root,
        name=Path(config.output).name,
        settings=config.model_dump(mode="json"),
        tags={"job": "search"},
        continued=state.run_id,
    ) as run:
        write_state(
            config.output, state.model_copy(update={"run_id": None if run is None else run.run_id})
        )
        yield run


class TrialRuns:
    """Writes a child run for each trial that ends; those of a search cut short stay as they are,
    but for one that was being written, which is finished."""

    def __init__(self, config: SearchConfig, run: TrackedRun | None) -> None:
        self._config, self._run = config, run
        children = {} if run is None else _children(run)
        self._known = {tag for tag, (_, status) in children.items() if status == "FINISHED"}
        self._begun = {tag: run_id for tag, (run_id, _) in children.items()}

    def add(self, trial: Trial) -> None:
        """Open a run with a trial's knobs and metrics, and close it."""
        if self._run is None or (tag := content_hash(trial.knobs)) in self._known:
            return
        self._known.add(tag)
        with tracking.tracked_run(
            self._config.tracking.model_copy(update={"parent": self._run.run_id}),
            root=self._config.root,
            name=show(trial.knobs),
            settings=trial.knobs,
            tags={
                "job": "trial",
                _KNOBS_TAG: tag,
                "complete": str(trial.complete).lower(),
                "feasible": str(trial.is_feasible).lower(),
            },
            continued=self._begun.get(tag),
        ) as run:
            assert run is not None, "children are tracked where their parent is"
            run.log_metrics(trial.metrics, step=trial.progress)


def _children(run: TrackedRun) -> dict[str, tuple[str, str]]:
    """Return the id and the status of the run of each trial."""
    experiment = run.client.get_run(run.run_id).info.experiment_id
    found = run.client.search_runs(
        [experiment], filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.run_id}'"
    )
    return {
        child.data.tags.get(_KNOBS_TAG, ""): (child.info.run_id, child.info.status)
        for child in found
    }
