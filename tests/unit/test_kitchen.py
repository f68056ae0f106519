"""The kitchen's stages and table, without training anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.config import JobConfig
from jobs.kitchen_stages import STAGES
from jobs.kitchen_table import (
    METHODS,
    Check,
    Row,
    draw_table,
    own_metric,
    training_seconds,
    write_table,
)
from jobs.resolve import resolved
from jobs.stages import with_needs
from pilotfish import config as configs

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen"


def folders_named_in(config: JobConfig) -> set[str]:
    """The other stages' folders that a job reads."""
    text = json.dumps(config.model_dump(mode="json", exclude={"output"}))
    return {name for name in STAGES if f'/kitchen/{name}"' in text}


@pytest.mark.parametrize("name", [name for name in STAGES if STAGES[name].module == "jobs.train"])
def test_a_stage_needs_what_its_config_reads_and_writes_its_own_folder(
    name: str, tmp_path: Path
) -> None:
    config = configs.load(JobConfig, CONFIGS / f"{name}.yaml", [f"root={tmp_path}"])
    assert folders_named_in(resolved(config)) <= set(STAGES[name].needs)
    assert Path(config.output) == tmp_path / "kitchen" / name


def test_stages_come_after_what_they_need_and_every_method_has_its_stages() -> None:
    order = list(STAGES)
    for name, stage in STAGES.items():
        assert all(order.index(need) < order.index(name) for need in stage.needs)
    for method in METHODS:
        assert {method.base, *method.guides} <= set(STAGES)
    assert with_needs(["morl"], STAGES) == [*("base", "reward_helpful", "reward_harmless", "morl")]


def row(name: str, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        **{"own_metric": "pair accuracy 0.840", "reward": 1.25, "error": 0.1, "helpful": 1.0},
        **{"harmless": 0.25, "bad_share": 0.02, "length": 40.0, "tokens_per_second": 900.0},
        **{"forwards_per_token": 2.0, "num_trained": 3158, "seconds": 61.0},
    }
    return Row(name=name, **{**fields, **changes})


def test_the_table_is_written_as_markdown_as_numbers_and_as_a_picture(tmp_path: Path) -> None:
    rows = [row("base", num_trained=None, seconds=None), row("GenARM")]
    write_table(rows, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "1.25 ± 0.10" in lines[-1]
    assert "3,158" in lines[-1]
    assert json.loads((tmp_path / "table.json").read_text())[1]["reward"] == 1.25
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert draw_table(rows).splitlines()[0] == lines[0]


def test_training_seconds_are_those_of_the_steps() -> None:
    windows = [(10, 0.5), (15, 2.0)]
    history = [{"step": step, "train/seconds_per_step": each} for step, each in windows]
    assert training_seconds({"history": history}) == 10 * 0.5 + 5 * 2.0


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"eval/accuracy": 0.84, "eval/loss": 1.0}, "pair accuracy 0.840"),
        ({"eval/loss": 0.4321}, "nll per token 0.432"),
        (
            {"eval/final_squared_error": 1.0, "eval/squared_reward": 5.0, "eval/reward": 1.0},
            "R2 of whole answers 0.75",
        ),
        ({"eval/true_reward": 1, "eval/reward": 2.5, "eval/kl": 13.9}, "RM score 2.50, KL 13.9"),
    ],
)
def test_a_training_speaks_of_its_own_held_out_metric(metrics: Any, said: str) -> None:
    assert own_metric(metrics) == said


def test_a_check_says_what_was_found_and_wanted() -> None:
    assert Check("share", 0.009, 0.01, at_most=True).holds
    assert not Check("gain", 0.9, 1.0).holds
    assert str(Check("gain", 0.9, 1.0)) == "FAIL  gain: 0.900 (wanted >= 1.0)"
