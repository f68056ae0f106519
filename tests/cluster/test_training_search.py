"""Searches whose trials train: tiny models, few steps, on a real local cluster."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.util import placement_group_table

from jobs.stretch import CHECKPOINT_FOLDER
from pilotfish.train.export import WEIGHTS_NAME, read_record
from tests.cluster.test_train_jobs import CONFIGS, SHORT, TINY
from tune.config import TrainingSearchConfig
from tune.report import SearchReport
from tune.state import read_state, write_state
from tune.trainer import TRAININGS
from tune.training import WINNER, search_training

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HALF, STEPS = 3, 6
SLOW = 1e-6
OVERRIDES = (
    *TINY,
    *SHORT,
    f"train.steps={STEPS}",
    "train.eval_every=0",
    "train.checkpoint_every=0",
)


def search_config(root: Path, name: str, **plan: Any) -> TrainingSearchConfig:
    return TrainingSearchConfig(
        root=str(root),
        output=str(root / name),
        job=str(CONFIGS / "base.yaml"),
        overrides=OVERRIDES,
        space={"train.learning_rate": {"uniform": [SLOW, 4e-3]}},  # type: ignore[dict-item]
        objectives=[{"metric": "eval/loss", "mode": "min"}],  # type: ignore[arg-type]
        search=plan,  # type: ignore[arg-type]
    )


def record_of(folder: str | Path) -> dict[str, Any]:
    record = read_record(folder)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def root(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def halving(root: Path) -> tuple[TrainingSearchConfig, SearchReport]:
    config = search_config(
        root,
        "halving",
        points=[{"train.learning_rate": 4e-3}],
        scheduler={"kind": "asha", "grace_period": HALF},
    )
    return config, search_training(config)


@pytest.fixture(scope="module")
def copying(root: Path) -> SearchReport:
    config = search_config(
        root,
        "copying",
        points=[{"train.learning_rate": SLOW}],
        scheduler={
            **{"kind": "pbt", "perturbation_interval": HALF, "quantile_fraction": 0.5},
            "resample_probability": 0,
        },
        max_concurrent_trials=2,
    )
    return search_training(config)


def test_a_trial_that_is_behind_is_stopped_and_leaves_nothing_running(
    root: Path, halving: tuple[TrainingSearchConfig, SearchReport]
) -> None:
    _, report = halving
    best, behind = report.trials
    assert report.winner == best
    assert (best.progress, behind.progress) == (STEPS, HALF)
    assert not behind.complete
    groups = placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    assert report.run_id is not None
    parent = client.get_run(report.run_id)
    runs = client.search_runs([parent.info.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == report.run_id]
    assert len(children) == 2, "a trial that goes on does so in its own run"


def test_the_winner_is_a_model_with_its_record_and_without_checkpoints(
    root: Path, halving: tuple[TrainingSearchConfig, SearchReport]
) -> None:
    _, report = halving
    winner = root / "halving" / WINNER
    assert record_of(winner)["metrics"] == report.trials[0].metrics
    assert (winner / WEIGHTS_NAME).is_file()
    assert not (winner / CHECKPOINT_FOLDER).exists()


def test_a_search_that_is_resumed_walks_the_same_path_and_trains_nothing_twice(
    root: Path, halving: tuple[TrainingSearchConfig, SearchReport]
) -> None:
    config, before = halving
    output = Path(config.output)
    state = read_state(output)
    assert state is not None
    write_state(output, state.model_copy(update={"is_done": False}))
    trained = {path: path.stat().st_mtime_ns for path in (output / TRAININGS).iterdir()}
    after = search_training(config, resume=True)
    assert after.trials == before.trials
    assert after.run_id == before.run_id
    assert {path: path.stat().st_mtime_ns for path in (output / TRAININGS).iterdir()} == trained


def test_a_copied_trial_goes_on_from_its_donors_step_weights_and_optimizer_at_its_own_rate(
    root: Path, copying: SearchReport
) -> None:
    copy, donor = copying.trials
    assert (copy.progress, donor.progress) == (STEPS, STEPS)
    assert copy.folder is not None
    assert donor.folder is not None
    mine, its = (record_of(folder)["history"] for folder in (copy.folder, donor.folder))
    assert mine[:HALF] == its[:HALF]
    assert [report["step"] for report in mine] == list(range(1, STEPS + 1))
    # The same weights and rows give the loss of the next step, whatever is learned from it.
    assert mine[HALF]["train/loss"] == its[HALF]["train/loss"]
    assert mine[HALF + 1]["train/loss"] != its[HALF + 1]["train/loss"]
    rate, other = (one.knobs["train.learning_rate"] for one in (copy, donor))
    assert rate == pytest.approx(min(1.2 * other, 4e-3)) or rate == pytest.approx(0.8 * other)
    # One schedule, at two rates.
    for report, theirs in zip(mine[HALF:], its[HALF:], strict=True):
        ratio = report["train/learning_rate"] / theirs["train/learning_rate"]
        assert ratio == pytest.approx(rate / other)
