"""Training jobs on a real local cluster: few runs, each checked from several sides."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from ray.job_submission import JobSubmissionClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.config import JobConfig, TrackingConfig
from jobs.dataset import prepare
from jobs.tracking import tracked_run
from jobs.train import main, train
from pilotfish import config as configs
from pilotfish.data.collate import collate_demonstrations
from pilotfish.guides.card import read_card
from pilotfish.losses import sft_loss
from pilotfish.models.vocab import fingerprint
from pilotfish.train.export import read_record
from tests.cluster.conftest import extra_node
from tests.cluster.killing import (
    CUT_STEP,
    KILLED,
    STARTS,
    STUCK,
    loop_killed_once,
    loop_stuck_alone,
)

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "jobs" / "configs" / "kitchen"
STEPS = 10
TINY = (
    "model.init.hidden_size=16",
    "model.init.num_hidden_layers=1",
    "model.init.num_attention_heads=2",
    "model.init.num_key_value_heads=2",
    "model.init.intermediate_size=32",
)
SHORT = (
    "data.num=200",
    "data.num_heldout=20",
    f"train.steps={STEPS}",
    "train.learning_rate=4e-3",
    "scaling.num_workers=1",
    "train.batch_size=8",
    "train.warmup_steps=2",
    "train.log_every=1",
    "train.eval_every=5",
    "train.checkpoint_every=4",
    "tracking.system_metrics_every=0",
)
TWO_SHARDED_WORKERS = ("scaling.num_workers=2", "train.deepspeed=3", "train.micro_batch_size=2")


@dataclass(frozen=True)
class Run:
    config: JobConfig
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        record = read_record(self.folder)
        assert record is not None
        return record

    def curve(self, name: str = "train/loss") -> list[float]:
        return [report[name] for report in self.record["history"] if name in report]


@pytest.fixture(scope="module")
def root(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run_base(root: Path, output: str, *overrides: str, loop: Any = None) -> Run:
    settings = [f"root={root}", f"output={root / output}", *TINY, *SHORT, *overrides]
    config = configs.load(JobConfig, CONFIGS / "base.yaml", settings)
    folder = train(config) if loop is None else train(config, loop=loop)
    return Run(config, folder)


@pytest.fixture(scope="module")
def one_worker(root: Path) -> Run:
    metrics = "tracking.system_metrics_every=1"
    return run_base(root, "one", "tracking.register_as=tiny-base", metrics)


@pytest.fixture(scope="module")
def two_workers(root: Path) -> Run:
    return run_base(root, "two", "tracking.enabled=false", *TWO_SHARDED_WORKERS)


@pytest.fixture
def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def test_the_folder_loads_in_plain_transformers_with_the_loss_of_the_last_evaluation(
    one_worker: Run,
) -> None:
    prepared, _ = prepare(one_worker.config)
    batch = collate_demonstrations(prepared.heldout, pad_id=0)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(one_worker.folder)
    with torch.no_grad():
        logits_BTV = model(batch.token_ids_BT).logits
    loss = sft_loss(logits_BTV, batch.token_ids_BT, batch.loss_mask_BT)
    assert loss.item() == pytest.approx(one_worker.record["metrics"]["eval/loss"], rel=1e-5)


def test_training_lowers_the_loss(one_worker: Run) -> None:
    curve = one_worker.curve()
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.1


def test_the_learning_rate_warms_up_and_falls_to_its_share(one_worker: Run) -> None:
    rates = one_worker.curve("train/learning_rate")
    peak = max(rates)
    # DeepSpeed's cosine starts one step in, so the peak itself is not reached.
    assert peak == pytest.approx(4e-3, rel=0.05)
    assert rates[0] < rates[1] < peak
    assert rates[-1] == pytest.approx(0.05 * 4e-3, rel=0.05)


def test_two_sharded_workers_with_accumulation_learn_what_one_worker_learns(
    one_worker: Run, two_workers: Run
) -> None:
    assert two_workers.curve() == pytest.approx(one_worker.curve(), rel=1e-4)
    assert two_workers.curve("eval/loss") == pytest.approx(one_worker.curve("eval/loss"), rel=1e-4)


def test_weights_trained_in_shards_are_written_whole(one_worker: Run, two_workers: Run) -> None:
    want = AutoModelForCausalLM.from_pretrained(one_worker.folder).state_dict()
    got = AutoModelForCausalLM.from_pretrained(two_workers.folder).state_dict()
    for name, tensor in want.items():
        assert tensor.numel() > 0
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_killed_worker_changes_nothing_in_the_loss_curve(root: Path, two_workers: Run) -> None:
    own = root / "killed-worker"
    overrides = ("tracking.enabled=false", "scaling.max_failures=1", *TWO_SHARDED_WORKERS)
    killed = run_base(own, "run", *overrides, loop=loop_killed_once)
    assert (own / KILLED).exists(), f"no worker was killed at step {CUT_STEP}"
    assert (own / STARTS).read_text() == "2 workers, new\n2 workers, resumed\n"
    for name in ("step", "train/loss", "train/learning_rate", "eval/loss"):
        assert killed.curve(name) == two_workers.curve(name)


def test_a_killed_driver_goes_on_with_other_workers_in_the_same_tracked_run(
    root: Path, one_worker: Run
) -> None:
    own = root / "killed-driver"
    settings = (*TINY, *SHORT, "train.deepspeed=1", "scaling.num_workers=2")
    script = "import sys; from tests.cluster.killing import train_stuck; train_stuck(sys.argv[1:])"
    command = [sys.executable, "-c", script, str(CONFIGS / "base.yaml")]
    uri = f"sqlite:///{root}/mlflow.db"
    command += [f"root={own}", f"output={own / 'run'}", f"tracking.uri={uri}", *settings]
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'platform'}"}
    own.mkdir()
    with (own / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
    wait_for(own / STUCK, driver)
    driver.kill()
    driver.wait()
    [run_folder] = (own / "train").iterdir()
    run_id = json.loads((run_folder / "run.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "RUNNING"

    resumed = run_base(own, "run", "train.deepspeed=1", f"tracking.uri={uri}")
    assert resumed.curve() == pytest.approx(one_worker.curve(), rel=1e-5)
    assert resumed.curve("eval/loss") == pytest.approx(one_worker.curve("eval/loss"), rel=1e-5)
    assert resumed.record["run_id"] == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    logged = {point.step for point in client.get_metric_history(run_id, "train/loss")}
    assert logged == set(range(1, STEPS + 1))
    same = f"tags.config_hash = '{resumed.record['config_hash']}'"
    assert len(client.search_runs([run.info.experiment_id], same)) == 1


def test_workers_that_join_take_their_share_of_a_run(root: Path, one_worker: Run) -> None:
    own = root / "elastic"
    settings = (
        *("scaling.num_workers=[1,2]", "scaling.resources_per_worker={CPU: 1, seat: 1}"),
        *("scaling.resize_every=1", "train.deepspeed=1", "tracking.enabled=false"),
    )
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_base, own, "run", *settings, loop=loop_stuck_alone)
        wait_for(own / STUCK, run)
        with extra_node():
            curve = run.result(timeout=150).curve()
    assert (own / STARTS).read_text() == "1 workers, new\n2 workers, resumed\n"
    assert curve == pytest.approx(one_worker.curve(), rel=1e-5)


def wait_for(path: Path, work: "subprocess.Popen[bytes] | Future[Run]") -> None:
    """Wait until the work has made a file."""
    deadline = time.monotonic() + 150
    while not path.exists():
        has_ended = work.done() if isinstance(work, Future) else work.poll() is not None
        assert not has_ended, f"the run ended without {path.name}"
        assert time.monotonic() < deadline, f"there is no {path.name} after 150 s"
        time.sleep(0.1)


def test_checkpoints_are_removed_when_the_model_is_written(root: Path, one_worker: Run) -> None:
    assert not list((root / "train").glob("one-*"))


def test_the_run_is_tracked_from_config_to_curves(one_worker: Run, client: MlflowClient) -> None:
    run = client.get_run(one_worker.record["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.004"
    assert run.data.tags["git_dirty"] in ("true", "false", "unknown")
    assert run.data.metrics["data/records"] == 200
    logged = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in logged] == pytest.approx(one_worker.curve())
    assert [point.step for point in logged] == list(range(1, STEPS + 1))
    assert 0 <= run.data.metrics["system/node_0/cpu_utilization_percentage"] <= 100
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", "loss.png", "model"}


def test_a_run_goes_on_if_it_is_still_there(
    root: Path, one_worker: Run, client: MlflowClient
) -> None:
    def run_id(continued: str) -> str:
        settings = {"root": root, "name": "again", "settings": {}, "tags": {}}
        with tracked_run(TrackingConfig(), continued=continued, **settings) as run:
            assert run is not None
            assert client.get_run(run.run_id).info.status == "RUNNING"
            return run.run_id

    first = run_id("0" * 32)
    assert first != "0" * 32
    assert run_id(first) == first
    assert client.get_run(first).info.status == "FINISHED"


def test_the_registered_model_comes_back_by_its_alias(
    one_worker: Run, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_worker.record["tracking_uri"])
    version = client.get_model_version_by_alias("tiny-base", "champion")
    assert version.tags["config_hash"] == one_worker.record["config_hash"]
    folder = download_artifacts(
        "models:/tiny-base@champion",
        dst_path=str(tmp_path),
        tracking_uri=one_worker.record["tracking_uri"],
    )
    weights = (Path(folder) / "model.safetensors").read_bytes()
    assert weights == (one_worker.folder / "model.safetensors").read_bytes()


def test_the_same_command_again_trains_nothing(one_worker: Run) -> None:
    changed = (one_worker.folder / "model.safetensors").stat().st_mtime_ns
    assert train(one_worker.config) == one_worker.folder
    assert (one_worker.folder / "model.safetensors").stat().st_mtime_ns == changed


def test_a_job_that_fails_exits_with_1_and_marks_its_run_failed(
    root: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    rows = root / "rows.jsonl"
    good = {"prompt": "hello ", "completion": "there"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [good, good, {"prompt": "x"}]))
    config = root / "failing.yaml"
    tree = {
        "root": str(root),
        "output": str(root / "failing"),
        "model": {"init": {"model_type": "llama"}, "tokenizer": "kitchen"},
        "objective": {"kind": "sft"},
        "data": {"path": str(rows), "holdout": 1},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
        "tracking": {"experiment": "failing"},
    }
    config.write_text(json.dumps(tree))
    assert main([str(config)]) == 1
    assert "row 2" in caplog.text
    experiment = client.get_experiment_by_name("failing")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert not (root / "failing").exists()


@pytest.fixture(scope="module")
def submitted(ray_cluster: str, root: Path, one_worker: Run) -> Callable[[], Path]:
    output = root / "guide"
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit"),
        *("--address", ray_cluster, "--working-dir", ".", "--runtime-env"),
        *("infra/runtime_env.yaml", "--", sys.executable, "-m", "jobs.train"),
        *("jobs/configs/kitchen/genarm.yaml", f"root={root}", f"output={output}"),
        *(f"model.init={one_worker.folder}", "tracking.register_as=tiny-guide", *SHORT),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # The command itself may stop looking at the log before its last lines are there.
    [job] = set(re.findall(r"raysubmit_\w+", done.stdout))
    assert f"{STEPS}/{STEPS}" in JobSubmissionClient(ray_cluster).get_job_logs(job)
    return lambda: output


def test_a_submitted_job_writes_a_guide_that_names_its_base_and_vocabulary(
    submitted: Callable[[], Path], one_worker: Run
) -> None:
    card = read_card(submitted())
    assert card.kind == "genarm"
    assert card.base == str(one_worker.folder)
    assert card.vocab == fingerprint(AutoTokenizer.from_pretrained(one_worker.folder))
    assert card.beta_r == 0.3
    assert card.training["metrics"]["step"] == STEPS


def test_a_guide_reports_its_pair_accuracy_with_an_interval(
    submitted: Callable[[], Path],
) -> None:
    record = read_record(submitted())
    assert record is not None
    metrics = record["metrics"]
    assert 0 <= metrics["eval/accuracy_low"] <= metrics["eval/accuracy"]
    assert metrics["eval/accuracy"] <= metrics["eval/accuracy_high"] <= 1


def test_a_submitted_job_uses_the_uploaded_copy_and_the_clusters_tracking(
    submitted: Callable[[], Path], client: MlflowClient
) -> None:
    record = read_record(submitted())
    assert record is not None
    assert record["git_commit"] == "unknown"  # .git is not uploaded
    assert client.get_run(record["run_id"]).info.status == "FINISHED"
    assert client.get_model_version_by_alias("tiny-guide", "champion").tags["kind"] == "genarm"
