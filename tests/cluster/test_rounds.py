"""Answers, corrections and rounds of them on real actors, some of which die; models are random."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs import rounds
from jobs.config import JobConfig
from jobs.correct import correct
from jobs.pool import ActorsConfig, chunks_of, run_chunks
from jobs.rounds_config import RoundsConfig
from jobs.rows import PAIRS_NAME, ROWS_NAME, metrics_of
from jobs.rows_config import CorrectConfig
from jobs.train import train
from pilotfish import config as configs
from pilotfish import world
from pilotfish.train.export import read_record
from tests.cluster.killing import Dying
from tests.folders import save_aligner, save_base

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = "<user> {question} <bot> {answer} <fix>"
CORRECT = """
root: {root}
output: ${{root}}/corrections
aligner: {root}/slow
answers: {{source: kitchen, num: 60}}
reward: {{kind: kitchen}}
actors: {{num_actors: 2, chunk_size: 3, batch_size: 3}}
"""
ROUNDS = """
root: {root}
output: ${{root}}/aligned
base: ${{root}}/base
num_rounds: 2
prompts: {{source: kitchen, num: 12, seed: 5}}
pairs: {{kind: aligner, aligners: ["${{root}}/aligner"]}}
decoding: {{max_tokens: 6}}
training:
  objective: {{kind: dpo}}
  data: {{holdout: 2}}
  train: {{steps: 2, batch_size: 2, learning_rate: 1.0e-3, log_every: 1}}
monitor:
  prompts: {{source: kitchen, num: 4, seed: 6}}
  reward: {{kind: kitchen}}
  patience: 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rounds")
    tokenizer = world.build_tokenizer()
    save_base(root / "base", tokenizer=tokenizer)
    save_aligner(
        root / "slow", tokenizer=tokenizer, settings={"template_text": TEMPLATE, "max_tokens": 90}
    )
    save_aligner(root / "aligner", tokenizer=tokenizer, settings={"template_text": TEMPLATE})
    # An untrained model would never end: let every fourth word end it.
    ends = root / "aligner" / "generation_config.json"
    settings = {**json.loads(ends.read_text()), "eos_token_id": list(range(2, 120, 4))}
    ends.write_text(json.dumps(settings))
    return root


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_actor_that_is_killed_costs_time_alone(tmp_path: Path) -> None:
    chunks = chunks_of(range(20), 4)
    actors = ActorsConfig(num_actors=2)
    told = (str(tmp_path / "killed"), 8)
    found = {
        chunk.start: doubled
        for chunk, doubled in run_chunks(Dying, told, chunks, actors, title="doubling")
    }
    assert (tmp_path / "killed").exists()
    assert found == {start: [2 * n for n in range(start, start + 4)] for start in range(0, 20, 4)}


def test_corrections_go_on_behind_a_killed_driver(root: Path) -> None:
    path = root / "correct.yaml"
    path.write_text(CORRECT.format(root=root))
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.correct", path],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "platform:."},
        stderr=subprocess.DEVNULL,
    )
    try:
        finished = _wait_for(lambda: list(root.glob(".corrections-*.parts/0*.jsonl")), driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (root / "corrections").exists()
    kept = finished[0]
    kept.write_text("".join(json.dumps({**row, "kept": True}) + "\n" for row in rows_in(kept)))

    config = configs.load(CorrectConfig, path)
    folder = correct(config)
    rows = rows_in(folder / ROWS_NAME)
    corpus = world.corpus(60, 1001)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in corpus]
    assert [row["answer"] for row in rows] == [row["completion"][0]["content"] for row in corpus]
    start = int(kept.stem)
    marked = [place for place, row in enumerate(rows) if "kept" in row]
    assert marked == list(range(start, start + 3)), "what was finished is not done again"
    assert metrics_of(folder)["corrections/num"] == 60
    assert not list(root.glob(".corrections-*"))
    [run] = [run for run in _runs(root, "correct") if run.info.status == "FINISHED"]
    assert run.data.metrics == pytest.approx(metrics_of(folder))


def test_rounds_go_on_where_they_failed_and_end_in_a_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "rounds.yaml"
    path.write_text(ROUNDS.format(root=root))
    config = configs.load(RoundsConfig, path)
    trained: list[str] = []

    def train_once_and_fail(job: JobConfig) -> Path:
        trained.append(job.output)
        if len(trained) == 2:
            raise RuntimeError("the second round's training fails")
        return train(job)

    monkeypatch.setattr(rounds, "train", train_once_and_fail)
    with pytest.raises(RuntimeError, match="second round"):
        rounds.align(config)
    assert not (root / "aligned").exists()
    [work] = (root / "rounds").iterdir()
    weights = work / "round_1" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns

    start, first, second = rounds.align(config)
    assert weights.stat().st_mtime_ns == written, "the first round is not trained again"
    assert start.model == str(root / "base")
    _check_round(work / "round_1", first.metrics)
    _check_round(work / "round_2", second.metrics)
    _check_output(root, [start, first, second])
    _check_runs(root, [start, first, second])


def _check_round(folder: Path, metrics: dict[str, float]) -> None:
    answers, pairs = (
        rows_in(folder / name) for name in (f"answers/{ROWS_NAME}", f"corrections/{PAIRS_NAME}")
    )
    number = int(folder.name.removeprefix("round_"))
    asked = [scene.messages for scene in world.scenes(24, 5)][12 * (number - 1) : 12 * number]
    assert [row["prompt"] for row in answers] == asked
    assert len(pairs) == metrics["pairs/num"] > 2
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    said = {json.dumps([row["prompt"], row["completion"]]) for row in answers}
    assert {json.dumps([row["prompt"], row["rejected"]]) for row in pairs} <= said
    record = read_record(folder / "model")
    assert record is not None
    assert record["history"][0]["train/loss"] == pytest.approx(0.6931, abs=1e-4), (
        "the reference is the model that the round starts from"
    )


def _check_output(root: Path, found: list[rounds.Round]) -> None:
    record = read_record(root / "aligned")
    assert record is not None
    best = max(found[1:], key=lambda one: one.reward.mean)
    assert record["best_round"] == best.number
    assert len(record["rounds"]) == 3
    weights = (root / "aligned" / "model.safetensors").read_bytes()
    assert weights == (Path(best.model) / "model.safetensors").read_bytes()


def _check_runs(root: Path, found: list[rounds.Round]) -> None:
    """One run for the whole, one below it for each round, and its training below that."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    [failed] = [run for run in _runs(root, "rounds") if run.info.status == "FAILED"]
    [whole] = [run for run in _runs(root, "rounds") if run.info.status == "FINISHED"]
    points = client.get_metric_history(whole.info.run_id, "monitor/reward")
    assert [(point.step, point.value) for point in points] == [
        (one.number, one.reward.mean) for one in found
    ]
    below = {
        run.info.run_id: run
        for run in _runs(root, "round")
        if run.data.tags["mlflow.parentRunId"] == whole.info.run_id
    }
    assert {run.info.run_name for run in below.values()} == {"aligned round_1", "aligned round_2"}
    one_run, other_run = _runs(root, "train")
    parents = {run.data.tags["mlflow.parentRunId"] for run in (one_run, other_run)}
    assert len(parents & set(below)) == 1, "the second round's; the first was trained before"
    assert failed.info.run_id not in parents


def _runs(root: Path, job: str) -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("pilotfish")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.job = '{job}'"))


def _wait_for(found: Callable[[], list[Path]], driver: "subprocess.Popen[bytes]") -> list[Path]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        if paths := found():
            return paths
        time.sleep(0.02)
    raise AssertionError("no chunk was finished in time")
