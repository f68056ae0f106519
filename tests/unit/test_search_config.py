"""What a search is told: spaces, objectives and constraints, and which of them are refused."""

from pathlib import Path
from typing import Any

import pytest
import ray.tune

from jobs.prompts import prompts_of
from pilotfish import config as configs
from pilotfish import world
from pilotfish.config import parse
from pilotfish.errors import ConfigError
from tune.config import Constraint, DecodingSearchConfig
from tune.space import Distribution

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    path
    for path in sorted((ROOT / "tune/configs/kitchen").glob("*.yaml"))
    if "\njob:" not in path.read_text()
]
TREE: dict[str, Any] = {
    "output": "runs/search",
    "base": "base",
    "guides": {"g": "guide"},
    "setting": {"name": "default", "guides": {"g": 1.0}},
    "space": {"temperature": {"uniform": [0.1, 1.0]}},
    "objectives": [{"metric": "reward"}],
    "prompts": {"source": "kitchen"},
    "confirm": {"source": "kitchen", "seed": 5},
    "reward": {"kind": "kitchen"},
}


def parsed(**changes: Any) -> DecodingSearchConfig:
    return parse(DecodingSearchConfig, {**TREE, **changes}, source="config")


@pytest.mark.parametrize(
    ("given", "inside", "outside"),
    [
        ({"uniform": [0, 1]}, [0, 0.3, 1], [-0.1, 1.1, "a", True]),
        ({"loguniform": [0.1, 10]}, [0.1, 5], [0.05]),
        ({"quniform": [0.2, 0.8, 0.2]}, [0.2, 0.4, 0.6000000001, 0.8], [0.3, 1.0]),
        ({"randint": [1, 5]}, [1, 4, 4.0], [5, 2.5]),
        ({"choice": ["a", None, 3]}, ["a", None, 3], ["b", 4]),
        ({"grid_search": [1, 2]}, [1, 2], [3]),
    ],
)
def test_a_distribution_knows_its_values_and_reads_back_as_it_was_written(
    given: dict[str, Any], inside: list[Any], outside: list[Any]
):
    values = Distribution.model_validate(given)
    assert all(value in values for value in inside)
    assert not any(value in values for value in outside)
    assert Distribution.model_validate(values.model_dump(mode="json")) == values


def test_a_distribution_is_the_function_of_ray_tune_of_its_name():
    drawn = Distribution(randint=(1, 5)).to_tune()
    assert type(drawn) is type(ray.tune.randint(1, 5))
    assert {drawn.sample() for _ in range(200)} == {1, 2, 3, 4}
    assert set(Distribution(randint=(1, 5)).corners) == {1, 4}
    assert Distribution(grid_search=(1, 2)).to_tune() == ray.tune.grid_search([1, 2])


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"temperature": {"unifrom": [0, 1]}}, "did you mean 'uniform'"),
        ({"temperature": {"uniform": [1, 0]}}, "lower bound first"),
        ({"temperature": {"loguniform": [0, 1]}}, "positive"),
        ({"temperature": {"quniform": [0.1, 1, 0.4]}}, "multiples of 0.4"),
        ({"temperature": {"choice": []}}, "no values"),
        ({"temperature": {"choice": [1], "uniform": [0, 1]}}, "exactly one"),
        ({"temprature": {"uniform": [0, 1]}}, "did you mean 'temperature'"),
        ({"guides.gg": {"uniform": [0, 1]}}, "did you mean 'guides.g'"),
        ({"args.h.p_t": {"uniform": [0, 1]}}, "'guides.h'"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        parsed(space=space)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objectives": [{"metric": "rewrad"}]}, "did you mean 'reward'"),
        ({"constraints": ["kll <= 3"]}, "did you mean 'kl'"),
        ({"constraints": ["kl < 3"]}, "METRIC <= NUMBER"),
        ({"constraints": ["kl <= three"]}, "METRIC <= NUMBER"),
        ({"constraints": ["kl <= 2 * other"]}, "METRIC <= NUMBER"),
        ({"reward": {"kind": "none"}}, "no metric is called 'reward'"),
        ({"search": {"algorithm": "optuna_nsga2"}}, "several objectives"),
        ({"search": {"scheduler": {"kind": "pbt", "perturbation_interval": 1}}}, "none"),
        ({"search": {"points": [{"temperature": 2.0}]}}, "not in uniform"),
        ({"search": {"points": [{"top_p": 0.5}]}}, "a value for each of temperature"),
        ({"rungs": [64, 32]}, "growing"),
        (
            {
                "objectives": [{"metric": "helpful"}, {"metric": "harmless"}],
                "search": {"scheduler": {"kind": "asha"}},
            },
            "one objective",
        ),
        (
            {
                "space": {"temperature": {"grid_search": [0.5, 1.0]}},
                "search": {"algorithm": "optuna"},
            },
            "write choice",
        ),
    ],
)
def test_a_search_that_cannot_be_honoured_is_refused(changes: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        parsed(**changes)


@pytest.mark.parametrize(
    ("written", "bound", "of_base", "at_most"),
    [
        ("kl <= 6", 6.0, False, True),
        ("bad_share<=0.05", 0.05, False, True),
        ("reward >= -1.5", -1.5, False, False),
        ("tokens_per_second >= 0.5 * base", 0.5, True, False),
        ("length <= base", 1.0, True, True),
    ],
)
def test_constraints_are_read_from_text_and_written_as_text(
    written: str, bound: float, of_base: bool, at_most: bool
):
    constraint = Constraint.model_validate(written)
    assert (constraint.bound, constraint.of_base, constraint.at_most) == (bound, of_base, at_most)
    assert Constraint.model_validate(constraint.model_dump()) == constraint


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_is_shipped_is_valid_and_confirms_on_prompts_of_its_own(path: Path):
    config = configs.load(DecodingSearchConfig, path)
    assert parse(DecodingSearchConfig, config.model_dump(mode="json"), source="again") == config
    tokenizer = world.build_tokenizer()
    searched, held_out = (prompts_of(one, tokenizer)[0] for one in (config.prompts, config.confirm))
    assert not {str(prompt) for prompt in searched} & {str(prompt) for prompt in held_out}
