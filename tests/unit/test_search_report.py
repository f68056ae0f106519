"""A search's report from synthetic trials: the files, the page and the pictures."""

import re
from pathlib import Path
from typing import Any

import pytest

from pilotfish.config import parse
from pilotfish.errors import DataError
from pilotfish.evaluation.metrics import compare, estimate
from pilotfish.evaluation.settings import Setting
from tune.choice import Trial
from tune.config import DecodingSearchConfig
from tune.page import write_report
from tune.plots import numeric_knobs
from tune.report import (
    Confirmation,
    Gain,
    SearchReport,
    load_results,
    nothing_feasible,
    report_of,
    save_report,
)
from tune.space import show

BASE = {"reward": 0.0, "kl": 0.0, "bad_share": 0.1, "tokens_per_second": 100.0, "length": 20.0}


def config_of(space: dict[str, Any], **changes: Any) -> DecodingSearchConfig:
    tree = {
        "output": "runs/search",
        "base": "base",
        "guides": {"g": "guide"},
        "setting": {"name": "default", "guides": {"g": 1.0}},
        "space": space,
        "objectives": [{"metric": "reward"}],
        "constraints": ["bad_share <= 0.2", "tokens_per_second >= 0.5 * base"],
        "prompts": {"source": "kitchen"},
        "confirm": {"source": "kitchen", "seed": 5},
        "reward": {"kind": "kitchen"},
        **changes,
    }
    return parse(DecodingSearchConfig, tree, source="config")


def trial_of(number: int, knobs: dict[str, Any], **changes: Any) -> Trial:
    level = sum(value for value in knobs.values() if isinstance(value, float))
    metrics = {**BASE, "reward": 3 - (level - 1) ** 2, "reward_error": 0.1, "kl": level}
    fields = {"metrics": metrics, "progress": 8, "complete": True, **changes}
    return Trial(number=number, knobs=knobs, **fields)


def report(space: dict[str, Any], points: list[dict[str, Any]], **changes: Any) -> SearchReport:
    config = config_of(space, **changes)
    trials = [trial_of(number, knobs) for number, knobs in enumerate(points)]
    if len(trials) > 2:
        stopped = trials[1].model_copy(update={"complete": False, "progress": 4})
        broken = {"bad_share <= 0.2": 0.5}
        trials[1:3] = [stopped, trials[2].model_copy(update={"violations": broken})]
    return report_of(config, trials, unit="prompts", end=8, base=BASE)


def grid() -> SearchReport:
    space = {"temperature": {"grid_search": [0.3, 0.6, 0.9]}, "top_p": {"grid_search": [0.5, 1.0]}}
    points = [{"temperature": t, "top_p": p} for t in (0.3, 0.6, 0.9) for p in (0.5, 1.0)]
    return report(space, points)


def confirmed(found: SearchReport) -> SearchReport:
    winner, default = [2.0, 3.0, 2.5, 4.0], [1.0, 3.0, 2.0, 2.0]
    gain = Gain(
        mean=estimate([a - b for a, b in zip(winner, default, strict=True)]),
        comparison=compare(winner, default),
    )
    roles = ("winner", "default", "base")
    confirmation = Confirmation(
        prompts_from="4 other questions",
        num_prompts=4,
        repeats=1,
        settings={role: Setting(name=role) for role in roles},
        metrics={role: dict(BASE, reward=2.0) for role in roles},
        gains={"reward": gain},
        violations={"kl <= 0": 0.1},
    )
    return found.model_copy(update={"confirmation": confirmation})


def test_the_folder_holds_the_report_that_was_saved(tmp_path: Path):
    found = confirmed(grid())
    save_report(found, tmp_path)
    assert load_results(tmp_path) == found
    assert (tmp_path / "winner.json").is_file()
    with pytest.raises(DataError, match="no results of a search"):
        load_results(tmp_path / "nowhere")


def test_the_winner_is_the_best_of_those_that_count():
    found = grid()
    assert found.winner is not None
    assert found.winner.knobs == {"temperature": 0.3, "top_p": 0.5}  # 1.1, 0.8 and 1.3 are out


def test_the_page_is_self_contained_and_holds_every_point_and_the_verdict(tmp_path: Path):
    page = write_report(confirmed(grid()), tmp_path).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert len(re.findall(r"<td>stopped early\s", page)) == 1
    assert "+0.88" in page  # the gain, (1 + 0 + 0.5 + 2) / 4
    assert "breaks bad_share &lt;= 0.2" in page
    assert "On those prompts it breaks" in page
    for trial in grid().trials:
        assert show(trial.knobs) in page


@pytest.mark.parametrize(
    ("found", "pictures"),
    [
        (grid(), ["heatmap.png"]),
        (
            report(
                {"temperature": {"uniform": [0, 2]}}, [{"temperature": t / 4} for t in range(5)]
            ),
            ["curve.png"],
        ),
        (
            report(
                {"temperature": {"uniform": [0, 2]}, "guides.g": {"loguniform": [0.1, 9]}},
                [{"temperature": t / 9, "guides.g": 1 / (t + 1)} for t in range(9)],
                objectives=[{"metric": "reward"}, {"metric": "kl", "mode": "min"}],
            ),
            ["heatmap.png", "pareto.png"],
        ),
        (
            report(
                {
                    "temperature": {"uniform": [0, 2]},
                    "top_k": {"choice": [1, 2]},
                    "top_p": {"choice": [0.5]},
                },
                [{"temperature": t / 4, "top_k": 1 + t % 2, "top_p": 0.5} for t in range(5)],
            ),
            ["heatmap.png", "parallel.png"],
        ),
    ],
    ids=["grid", "one knob", "two objectives", "three knobs"],
)
def test_pictures_follow_from_the_number_of_knobs_and_objectives(
    found: SearchReport, pictures: list[str], tmp_path: Path
):
    write_report(found, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == pictures


def test_knobs_that_are_no_numbers_have_no_axis():
    trials = [
        trial_of(n, {"a": n % 2, "b": float(n), "c": "x", "d": bool(n), "e": 1}) for n in range(3)
    ]
    assert numeric_knobs(trials) == ["b", "a"]


def test_where_nothing_is_feasible_the_nearest_point_says_by_how_much():
    config = config_of({"temperature": {"uniform": [0.0, 1.0]}})
    trials = [
        trial_of(
            n, {"temperature": 0.5 + n}, violations={"tokens_per_second >= 0.5 * base": broken}
        ).model_copy(update={"metrics": {**BASE, "tokens_per_second": 50 * (1 - broken)}})
        for n, broken in enumerate((0.6, 0.2))
    ]
    found = report_of(config, trials, unit="prompts", end=8, base=BASE)
    assert found.winner is None
    says = str(nothing_feasible(found))
    assert "temperature=1.5" in says
    assert "tokens_per_second >= 0.5 * base by 10 (it has 40)" in says
