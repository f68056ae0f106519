"""Searches on a local Ray cluster, with random models: what is decoded is nonsense on purpose."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs.cluster import REPOSITORY
from pilotfish import config as configs
from pilotfish import world
from pilotfish.errors import CheckpointError
from pilotfish.guides.card import read_card
from tests.folders import save_base, save_proxy
from tune.choice import Trial
from tune.config import DecodingSearchConfig
from tune.report import SearchReport, load_results
from tune.search import main
from tune.trials import Clock, run_trials

pytestmark = pytest.mark.cluster

CONFIG = """
root: {root}
output: ${{root}}/search
base: {root}/base
guides: {{proxy: {root}/proxy}}
setting: {{name: default, guides: {{proxy: 1.0}}}}
space:
  args.proxy.p_t: {{grid_search: [0.01, 0.3, 0.9]}}
  temperature: {{grid_search: [0.5, 1.0]}}
search: {{scheduler: {{kind: asha}}, repeats: 2}}
objectives: [{{metric: length}}]
constraints: [kl <= 1000, forwards_per_token <= 50 * base]
prompts: {{source: kitchen, num: 8, seed: 3}}
rungs: [4]
confirm: {{source: kitchen, num: 4, seed: 4}}
reward: {{kind: kitchen}}
decoding: {{max_tokens: 10, chunk_size: 2, batch_size: 4, num_actors: 2}}
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    tokenizer = world.build_tokenizer()
    save_base(root / "base", tokenizer=tokenizer)
    save_proxy(root / "proxy", tokenizer=tokenizer, top_k=4, p_t=0.05)
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


@pytest.fixture(scope="module")
def report(ray_cluster: str, config_path: Path) -> SearchReport:
    assert main([str(config_path)]) == 0
    return load_results(config_path.parent / "search")


def timeless(report: SearchReport) -> dict[str, Any]:
    """A report less what depends on the clock and on where it lies."""
    content = report.model_dump(mode="json", exclude={"created", "run_id", "config"})
    text = json.dumps(content, sort_keys=True)
    tree = json.loads(text)
    for metrics in (
        tree["base"],
        *(trial["metrics"] for trial in tree["trials"]),
        *tree["confirmation"]["metrics"].values(),
    ):
        del metrics["tokens_per_second"]
    return tree


def children(root: Path, report: SearchReport) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    assert report.run_id is not None
    parent = client.get_run(report.run_id)
    assert parent.info.status == "FINISHED"
    runs = client.search_runs([parent.info.experiment_id])
    assert not [run for run in runs if run.info.status == "RUNNING"]
    return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == report.run_id]


def test_a_search_tries_the_grid_and_confirms_its_winner_elsewhere(
    report: SearchReport, config_path: Path
):
    knobs = [(t.knobs["args.proxy.p_t"], t.knobs["temperature"]) for t in report.trials]
    assert set(knobs) == {(p_t, t) for p_t in (0.01, 0.3, 0.9) for t in (0.5, 1.0)}
    assert len(knobs) == 6
    assert {trial.progress for trial in report.trials if trial.complete} == {8}
    assert report.winner is not None
    complete = [trial.metrics["length"] for trial in report.trials if trial.complete]
    assert report.winner.metrics["length"] == max(complete)
    assert report.confirmation is not None
    assert set(report.confirmation.metrics) == {"winner", "default", "base"}
    folder = config_path.parent / "search"
    assert {path.name for path in folder.iterdir()} == {
        *("search.json", "results.json", "winner.json", "search.html", "heatmap.png"),
        "evaluations",
    }


def test_every_trial_is_a_child_run_with_its_knobs_and_metrics(
    report: SearchReport, config_path: Path
):
    runs = children(config_path.parent, report)
    assert len(runs) == len(report.trials)
    logged = {run.data.params["temperature"]: run for run in runs}
    assert set(logged) == {"0.5", "1.0"}
    lengths = sorted(run.data.metrics["length"] for run in runs)
    assert lengths == pytest.approx(sorted(t.metrics["length"] for t in report.trials))


def test_a_finished_search_is_read_back_and_its_knobs_are_applied(
    report: SearchReport, config_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(config_path), "--apply"]) == 0
    assert "belong to the request" in capsys.readouterr().out
    assert report.winner is not None
    card = read_card(config_path.parent / "proxy")
    assert card.settings["p_t"] == report.winner.knobs["args.proxy.p_t"]


@pytest.mark.slow
def test_a_search_whose_driver_was_killed_goes_on_to_the_same_winner(
    report: SearchReport, config_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = config_path.parent / "killed"
    # The card may have been turned by --apply; what a search starts from must not be.
    argv = [str(config_path), f"output={folder}", "setting.args={proxy: {p_t: 0.05}}"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "tune.search", *argv, "--quiet"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'platform'}"},
    )
    deadline = time.monotonic() + 180
    while len(list(folder.glob("evaluations/*.json"))) < 8:  # the base takes four
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("evaluations/*.json")}
    assert main(argv) == 2
    assert "--resume" in caplog.text
    assert main([*argv, "--resume"]) == 0
    again = load_results(folder)
    assert timeless(again)["trials"] == timeless(report)["trials"]
    assert again.best == report.best
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert len(children(config_path.parent, again)) == len(again.trials)


@pytest.mark.slow
def test_concurrent_trials_on_a_full_cluster_end_and_nothing_feasible_is_said(
    ray_cluster: str, config_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = config_path.parent / "several"
    argv = [
        *(str(config_path), f"output={folder}", "tracking.enabled=false"),
        "space={temperature: {uniform: [0.5, 1.0]}, top_k: {randint: [1, 9]}}",
        "search={algorithm: optuna_nsga2, num_samples: 5, max_concurrent_trials: 3}",
        "objectives=[{metric: length}, {metric: kl, mode: min}]",
        *("constraints=[length <= 0.5]", "decoding.num_actors=3"),
    ]
    assert main(argv) == 1
    assert "none of 5 points keeps all constraints" in caplog.text
    assert "length <= 0.5 by" in caplog.text
    assert len(load_results(folder).trials) == 5


def broken(knobs: dict[str, Any]) -> None:
    raise CheckpointError("no such folder")


def test_what_a_trial_raises_ends_the_search_as_it_was_raised(
    ray_cluster: str, config_path: Path, tmp_path: Path
):
    config = configs.load(DecodingSearchConfig, config_path, [f"output={tmp_path}"])
    ended: list[Trial] = []
    clock = Clock(unit="prompts", first=1, end=2)
    with pytest.raises(CheckpointError, match="no such folder"):
        run_trials(broken, config, clock, on_trial=ended.append)
    assert not ended


def test_prompts_that_would_confirm_nothing_are_refused(
    config_path: Path, caplog: pytest.LogCaptureFixture
):
    argv = [str(config_path), "confirm.seed=3", f"output={config_path.parent / 'overlap'}"]
    assert main(argv) == 2
    assert "would confirm nothing" in caplog.text
