"""The study on real models: what ships is resolved, stage by stage, and nothing is downloaded."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import evaluation_config, judge_config, resolve, rows_config
from jobs.config import JobConfig
from jobs.dry_run import memory_plan
from jobs.evaluation_config import EvaluationConfig
from jobs.guide import GuideConfig
from jobs.guide import resolved as resolved_guide
from jobs.judge_config import JudgeConfig
from jobs.reproduce_hh import STAGES
from jobs.rows_config import AnswerConfig
from jobs.stages import with_needs
from pilotfish import config as configs
from tune.config import DecodingSearchConfig, resolved_decoding

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "jobs" / "configs" / "reproduce"
SHAPE = REPOSITORY / "jobs" / "configs" / "70b" / "shapes" / "llama-2-7b"

JOBS: dict[str, tuple[type[configs.Config], Callable[[Any], Any]]] = {
    "jobs.train": (JobConfig, resolve.resolved),
    "jobs.answer": (AnswerConfig, rows_config.resolved_answer),
    "jobs.evaluate": (EvaluationConfig, evaluation_config.resolved),
    "jobs.guide": (GuideConfig, resolved_guide),
    "jobs.judge": (JudgeConfig, judge_config.resolved),
    "tune.search": (DecodingSearchConfig, resolved_decoding),
}
EXPORTS = [name for name, stage in STAGES.items() if stage.module == "jobs.export"]
CONFIGURED = [name for name in STAGES if name not in EXPORTS]


def load(name: str, root: str) -> Any:
    """Return the resolved config of a stage."""
    stage = STAGES[name]
    path, *overrides = (argument.format(root=root) for argument in stage.arguments)
    config_type, resolved = JOBS[stage.module]
    return resolved(configs.load(config_type, REPOSITORY / path, overrides))


def output_of(name: str, root: str) -> str:
    if name in EXPORTS:
        return STAGES[name].arguments[-1].format(root=root)
    return load(name, root).output


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    for value in tree if isinstance(tree, list) else [tree]:
        if isinstance(value, dict | list):
            yield from strings(value)
        elif isinstance(value, str):
            yield value


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("PRETRAINED", "HH", "CORRECTIONS", "SAFE", "SAFE_BASE", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_stage_reads_what_stages_that_it_needs_have_written(name: str, tmp_path: Path):
    root = str(tmp_path)
    config = load(name, root)
    written = [output_of(need, root) for need in with_needs([name], STAGES) if need != name]
    tree = config.model_dump(mode="json", exclude={"root", "output"})
    read = [text for text in strings(tree) if text.startswith(root)]
    for path in read:
        assert any(Path(path).is_relative_to(folder) for folder in written), path


@pytest.mark.parametrize("name", EXPORTS)
def test_a_soup_is_made_of_what_its_needs_have_written(name: str):
    sources = [one.partition("=")[0] for one in STAGES[name].arguments if "=" in one]
    assert sources == [output_of(need, "{root}") for need in STAGES[name].needs]


def test_no_two_stages_write_the_same_folder(tmp_path: Path):
    outputs = [output_of(name, str(tmp_path)) for name in STAGES]
    assert len(set(outputs)) == len(outputs)


def test_every_config_of_the_study_is_a_stage():
    used = {Path(STAGES[name].arguments[0]).name for name in CONFIGURED}
    assert used == {path.name for path in FOLDER.glob("*.yaml")}


def test_needs_come_before_those_that_need_them():
    places = {name: place for place, name in enumerate(STAGES)}
    assert all(places[need] < places[name] for name in STAGES for need in STAGES[name].needs)


@pytest.mark.parametrize("prefix", ["evaluate_safe", "evaluate_"])
def test_all_methods_are_evaluated_on_the_same_prompts_alike(prefix: str, tmp_path: Path):
    names = [name for name in CONFIGURED if name.startswith(prefix)]
    if prefix == "evaluate_":
        names = [name for name in names if not name.startswith("evaluate_safe")]
    seen: list[Any] = []
    for name in names:
        config = load(name, str(tmp_path))
        decoding = config.decoding.model_dump(exclude={"batch_size"})  # what fits a GPU
        seen.append((config.prompts, config.reward.model_copy(update={"path": ""}), decoding))
    assert len(names) > 9
    assert all(one == seen[0] for one in seen)


def test_the_judge_compares_settings_that_the_evaluations_have(tmp_path: Path):
    evaluations = {
        output_of(name, str(tmp_path)): load(name, str(tmp_path)) for name in STAGES["judge"].needs
    }
    judge = load("judge", str(tmp_path))
    for one in judge.contestants.values():
        settings = [setting.name for setting in evaluations[one.report].settings]
        assert one.setting in settings
    assert {name for pair in judge.pairs for name in pair} == set(judge.contestants)


def test_searches_confirm_on_the_prompts_of_the_evaluations_and_search_on_others(tmp_path: Path):
    evaluation = load("evaluate_genarm", str(tmp_path))
    for name in ("search_proxy", "search_genarm"):
        search = load(name, str(tmp_path))
        assert search.confirm == evaluation.prompts
        assert search.prompts.split != search.confirm.split


@pytest.mark.parametrize("name", ["dpo", "proxy", "ppo"])
def test_what_learns_beside_a_frozen_7b_fits_80_gb(name: str, tmp_path: Path):
    for need in ("base", "reward_model"):
        shutil.copytree(SHAPE, tmp_path / "reproduce" / need)
    plan = memory_plan(load(name, str(tmp_path)), gpu_memory_gib=80)
    assert plan is not None
    assert plan.verdict.startswith("Fits"), plan.table()


def test_a_proxy_has_less_than_a_hundredth_of_what_ppo_trains(tmp_path: Path):
    for need in ("base", "reward_model"):
        shutil.copytree(SHAPE, tmp_path / "reproduce" / need)
    proxy = memory_plan(load("proxy", str(tmp_path)), gpu_memory_gib=80)
    assert proxy is not None
    assert proxy.gpu["guide weights"] < 0.01 * proxy.gpu["base weights"]
