"""The evaluation job on real actors, with random models: what is decoded is nonsense on purpose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from jobs.decoder import Decoder
from jobs.evaluate import evaluate, main
from jobs.evaluation_config import EvaluationConfig, resolved
from jobs.pool import Chunk
from pilotfish import Pilot, SamplingParams, world
from pilotfish import config as configs
from pilotfish.errors import CheckpointError
from pilotfish.evaluation.report import Report, load_report
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from tests.fakes import tiny_llama

pytestmark = pytest.mark.cluster

CONFIG = """
root: {root}
output: ${{root}}/evaluation
base: {base}
guides: {{tilt: {guide}}}
prompts: {{source: kitchen, num: 10, seed: 3}}
reward: {{kind: kitchen}}
settings:
  - name: tilt w=1
    guides: {{tilt: 1.0}}
decoding: {{max_tokens: 12, chunk_size: 4, batch_size: 3}}
"""

Run = Callable[..., Report]


def save_model(folder: Path, seed: int) -> str:
    model = tiny_llama(seed, vocab_size=len(world.VOCABULARY), dtype=torch.float32)
    model.save_pretrained(folder)
    world.build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    base, guide = save_model(root / "base", 1), save_model(root / "guide", 2)
    vocab = fingerprint(world.build_tokenizer())
    write_card(guide, GuideCard(kind="genarm", base=base, vocab=vocab))
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root, base=base, guide=guide))
    return path


@pytest.fixture(scope="module")
def run(ray_cluster: str, config_path: Path) -> Run:
    def run(*overrides: str) -> Report:
        return evaluate(configs.load(EvaluationConfig, config_path, overrides))

    return run


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return run()


def timeless(folder: Path) -> dict[str, Any]:
    """The JSON of a report, less what depends on the clock and on how it was run."""
    numbers = json.loads((folder / "report.json").read_text())
    for name in ("created", "run_id", "config"):
        del numbers[name]
    for result in numbers["results"]:
        del result["metrics"]["tokens_per_second"]
    return numbers


def test_controls_are_decoded_although_nobody_listed_them(report: Report):
    names = [result.setting.name for result in report.results]
    assert names == ["base", "base T=0.5", "base greedy", "tilt w=1"]
    assert {len(result.answers) for result in report.results} == {10}


def test_one_and_two_actors_give_the_same_numbers_and_answers(
    run: Run, report: Report, config_path: Path
):
    again = config_path.parent / "two"
    run("decoding.num_actors=2", f"output={again}", "tracking.enabled=false")
    first = config_path.parent / "evaluation"
    assert timeless(first) == timeless(again)
    assert (first / "answers.jsonl").read_text() == (again / "answers.jsonl").read_text()


def test_answers_are_those_of_the_decoder_with_a_seed_per_prompt(report: Report, config_path: Path):
    root = config_path.parent
    pilot = Pilot(root / "base", guides={"tilt": root / "guide"}, device="cpu")
    params = [SamplingParams(max_tokens=12, seed=1 + number) for number in range(10)]
    prompts = [scene.messages for scene in world.scenes(10, 3)]
    completions = pilot.generate(prompts, params, guides={"tilt": 1.0})
    answers = report.result("tilt w=1").answers
    assert [answer.text for answer in answers] == [completion.text for completion in completions]
    assert [answer.kl for answer in answers] == pytest.approx(
        [sum(completion.kl) for completion in completions], abs=1e-4
    )


def test_a_guide_that_learned_nothing_is_its_sharpened_control(config_path: Path):
    base = config_path.parent / "base"
    untrained = shutil.copytree(base, config_path.parent / "untrained")
    vocab = fingerprint(world.build_tokenizer())
    write_card(untrained, GuideCard(kind="genarm", base=str(base), vocab=vocab))
    config = resolved(configs.load(EvaluationConfig, config_path, [f"guides.tilt={untrained}"]))
    decoder = Decoder(config, config.settings)
    prompts = [tuple(scene.messages) for scene in world.scenes(4, 3)]
    texts = {
        setting.name: [answer.text for answer in decoder.process(chunk).answers]
        for setting in config.settings
        for chunk in [Chunk(items=prompts, start=0, label=setting.name)]
    }
    assert texts["tilt w=1"] == texts["base T=0.5"]
    assert texts["tilt w=1"] != texts["base"]


def test_a_guide_costs_one_forward_more_per_token(report: Report):
    assert report.result("base").metrics.forwards_per_token == 1.0
    assert report.result("tilt w=1").metrics.forwards_per_token == 2.0


def test_the_folder_holds_the_report_that_was_returned(report: Report, config_path: Path):
    folder = config_path.parent / "evaluation"
    assert load_report(folder) == report
    assert (folder / "report.html").read_text().count("data:image/png") == 4


def test_mlflow_holds_the_same_numbers_and_the_files(report: Report, config_path: Path):
    assert report.run_id is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{config_path.parent / 'mlflow.db'}")
    logged = client.get_run(report.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == report.metrics()
    files = {Path(entry.path).name for entry in client.list_artifacts(report.run_id, "report")}
    assert {"report.html", "report.json", "answers.jsonl", "rewards.png"} <= files


def test_a_missing_guide_stops_before_anything_is_decoded(run: Run, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere"):
        run(f"guides.tilt={tmp_path / 'nowhere'}")


def test_what_fails_inside_an_actor_is_reported_as_it_was_raised(run: Run, tmp_path: Path):
    missing = tmp_path / "judge"
    with pytest.raises(CheckpointError, match=str(missing)):
        run("reward.kind=model", f"reward.path={missing}", "tracking.enabled=false")


def test_a_dry_run_prints_the_settings_with_their_controls(
    config_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(config_path), "seed=9", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "base greedy" in printed
    assert "seed: 9" in printed


def test_an_unknown_guide_is_refused_by_name(config_path: Path, caplog: pytest.LogCaptureFixture):
    assert main([str(config_path), "settings=[{name: x, guides: {tlit: 1}}]"]) == 2
    assert "tlit" in caplog.text
