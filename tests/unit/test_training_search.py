"""Searches over training knobs: what is refused, when trials report, and where knobs may go."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.schedulers import ASHAScheduler

from jobs.config import JobConfig
from jobs.stretch import Stretch, stretch_hash
from pilotfish.errors import ConfigError
from pilotfish.train.export import write_record
from tune.config import ASHA, PBT, TrainingSearchConfig
from tune.population import within
from tune.space import Distribution
from tune.trainer import check_room, demand, first_rung, job_of, report_steps, with_knobs

KITCHEN = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen"
RATES: dict[str, Any] = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
PBT_PLAN: dict[str, Any] = {
    "num_samples": 2,
    "scheduler": {"kind": "pbt", "perturbation_interval": 50},
}

EPOCHS = ("train.steps=null", "train.epochs=1")


def search(root: Path, job: str = "genarm", **fields: Any) -> TrainingSearchConfig:
    settings: dict[str, Any] = {"space": RATES, "objectives": [{"metric": "eval/accuracy"}]}
    return TrainingSearchConfig(
        root=str(root),
        output=str(root / "out"),
        job=str(KITCHEN / f"{job}.yaml"),
        **settings | fields,
    )


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    return job_of(search(tmp_path))


def test_knobs_reach_every_section_of_a_job(job: JobConfig) -> None:
    knobs = {"train.learning_rate": 3e-5, "objective.beta_r": 0.7, "model.lora.rank": 2}
    turned = with_knobs(job, knobs)
    assert turned.train.learning_rate == 3e-5
    assert turned.objective.beta_r == 0.7  # type: ignore[union-attr]
    assert turned.started.lora is not None
    assert turned.started.lora.rank == 2
    assert turned.train.batch_size == job.train.batch_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"train.learning_rat": {"uniform": [0, 1]}}}, "did you mean 'learning_rate'"),
        ({"space": {"train.learning_rate": {"uniform": [-1, 1]}}}, "greater than 0"),
        ({"space": {"scaling.num_workers": {"choice": [1, 2]}}}, "compares"),
        ({"space": {"seed": {"choice": [1, 2]}}}, "compares"),
        ({"constraints": ["eval/loss <= 2 * base"]}, "no base"),
        ({"search": {"scheduler": {"kind": "asha"}}, "overrides": EPOCHS}, "train.steps"),
        ({"space": {"train.batch_size": {"choice": [8, 16]}}, "search": PBT_PLAN}, "middle"),
        ({"space": {"data.seed": {"choice": [8, 16]}}, "search": PBT_PLAN}, "middle"),
        ({"search": PBT_PLAN, "overrides": ("train.steps=50",)}, "fewer"),
        ({"search": {**PBT_PLAN, "repeats": 2}}, "repeats: 1"),
        ({"search": {**PBT_PLAN, "num_samples": 1}}, "nobody"),
        ({"job": "proxy_mara", "search": PBT_PLAN}, "sac"),
    ],
)
def test_what_a_search_cannot_honour_is_refused_before_anything_starts(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(search(tmp_path, **fields))


@pytest.mark.parametrize(
    ("factor", "grace", "total"), [(2.0, 25, 200), (3.0, 10, 270), (2.5, 7, 100), (4.0, None, 200)]
)
def test_trials_report_where_asha_decides(factor: float, grace: int | None, total: int) -> None:
    plan = ASHA(kind="asha", reduction_factor=factor, grace_period=grace)
    first = first_rung(plan, total)
    theirs = ASHAScheduler(max_t=total, grace_period=first, reduction_factor=factor)
    milestones = [milestone for milestone, _ in theirs._brackets[0]._rungs]
    steps = report_steps(plan, total)
    assert steps[-1] == total
    for milestone in milestones:
        assert any(0 <= step - milestone < 1 for step in steps)


def test_a_population_reports_at_every_interval_and_at_the_end() -> None:
    assert report_steps(PBT(kind="pbt", perturbation_interval=40), 100) == (40, 80, 100)


def test_a_perturbed_knob_stays_in_its_space() -> None:
    space = {
        "a": Distribution(uniform=(0.1, 1.0)),
        "b": Distribution(quniform=(0.2, 0.8, 0.2)),
        "c": Distribution(choice=(1, 2)),
    }
    moved = within(space, {"a": 1.2, "b": 0.48, "c": 2})
    assert moved == {"a": 1.0, "b": pytest.approx(0.4), "c": 2}
    assert all(value in space[key] for key, value in moved.items())
    assert within(space, {"a": 0.08, "b": 0.1, "c": 1}) == {"a": 0.1, "b": 0.2, "c": 1}


@pytest.mark.parametrize(("cpus", "fits"), [(3, 1), (4, 2)])
def test_trials_that_would_wait_for_each_other_are_refused(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch, cpus: int, fits: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    assert demand(job) == {"CPU": 2.0}
    check_room(job, fits)
    with pytest.raises(ConfigError, match=f"room for {fits}"):
        check_room(job, fits + 1)


def test_a_stretch_is_named_after_all_that_came_before(job: JobConfig, tmp_path: Path) -> None:
    def named(name: str, digest: str) -> Path:
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, {"config_hash": digest})
        return tmp_path / name

    one, other = named("one", "1"), named("other", "2")
    hashes = {
        stretch_hash(job, Stretch(until=10)),
        stretch_hash(job, Stretch(until=20)),
        stretch_hash(job, Stretch(until=20, start=one)),
        stretch_hash(job, Stretch(until=20, start=other)),
        stretch_hash(with_knobs(job, {"train.weight_decay": 0.5}), Stretch(until=20, start=one)),
    }
    assert len(hashes) == 5
    copy = named("copy", "1")
    assert stretch_hash(job, Stretch(until=20, start=copy)) in hashes


def test_a_stretch_continues_a_tracked_run_of_the_same_settings_alone(
    job: JobConfig, tmp_path: Path
) -> None:
    record = {"config": job.model_dump(mode="json"), "run_id": "7", "tracking_uri": "sqlite:///x"}
    write_record(tmp_path, record)
    stretch = Stretch(until=10, start=tmp_path)
    elsewhere = job.model_copy(update={"output": "/elsewhere"})
    assert stretch.run_before(elsewhere) == ("7", "sqlite:///x")
    assert stretch.run_before(with_knobs(job, {"train.learning_rate": 0.5})) is None
    assert Stretch(until=10).run_before(job) is None
