"""Knobs as settings and as lines of guide cards: nothing is decoded here."""

from pathlib import Path
from typing import Any

import pytest

from pilotfish.config import parse
from pilotfish.errors import ConfigError
from pilotfish.evaluation.settings import Setting
from pilotfish.guides.card import read_card
from tests.folders import save_guide, save_proxy
from tune.config import DecodingSearchConfig
from tune.knobs import apply_to_cards, check_applicable, check_space, setting_of

SETTING = Setting(name="default", guides={"proxy": 1.0, "arm": 0.5}, args={"proxy": {"p_t": 0.1}})


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    save_proxy(tmp_path / "proxy", p_t=0.05, top_k=4)
    save_guide(tmp_path / "arm")
    return {name: str(tmp_path / name) for name in ("proxy", "arm")}


def config_of(guides: dict[str, Any], **space: Any) -> DecodingSearchConfig:
    tree = {
        "output": "runs/search",
        "base": "base",
        "guides": guides,
        "setting": SETTING.model_dump(),
        "space": space,
        "objectives": [{"metric": "kl"}],
        "prompts": {"source": "kitchen"},
        "confirm": {"source": "kitchen", "seed": 5},
        "reward": {"kind": "none"},
    }
    return parse(DecodingSearchConfig, tree, source="config")


def test_knobs_change_sampling_weights_and_settings_of_guides_and_nothing_else():
    knobs = {"temperature": 0.5, "guides.arm": 2.0, "args.proxy.p_t": 0.3, "args.proxy.top_k": 5}
    found = setting_of(SETTING, knobs, name="point")
    assert found == Setting(
        name="point",
        temperature=0.5,
        guides={"proxy": 1.0, "arm": 2.0},
        args={"proxy": {"p_t": 0.3, "top_k": 5}},
    )
    assert SETTING.args == {"proxy": {"p_t": 0.1}}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"args.proxy.p_t": {"uniform": [0.1, 1.5]}}, "p_t"),
        ({"args.proxy.head": {"choice": [1]}}, "cannot change"),
        ({"args.arm.anything": {"choice": [1]}}, "cannot change"),
        ({"guides.proxy": {"uniform": [0.0, 0.5]}}, "no strength"),
        ({"temperature": {"uniform": [-1.0, 1.0]}}, "temperature"),
        ({"top_p": {"uniform": [0.0, 1.0]}}, "top_p"),
    ],
)
def test_a_space_with_a_corner_that_a_guide_cannot_honour_is_refused(
    folders: dict[str, str], space: dict[str, Any], says: str
):
    cards = {name: read_card(folder) for name, folder in folders.items()}
    with pytest.raises(ConfigError, match=says):
        check_space(config_of(folders, **space), cards)
    check_space(config_of(folders, **{"args.proxy.p_t": {"uniform": [0.1, 0.9]}}), cards)


def test_applying_writes_what_belongs_to_guides_and_returns_the_rest(folders: dict[str, str]):
    space = {
        "args.proxy.p_t": {"uniform": [0.1, 0.9]},
        "args.proxy.gate": {"uniform": [0.1, 0.9]},
        "guides.arm": {"uniform": [0.1, 3.0]},
        "temperature": {"uniform": [0.1, 3.0]},
    }
    config = config_of(folders, **space)
    check_applicable(config)
    before = read_card(folders["proxy"])
    knobs = {"args.proxy.p_t": 0.25, "args.proxy.gate": 0.5, "guides.arm": 2.0, "temperature": 0.7}
    assert apply_to_cards(config, knobs) == {"temperature": 0.7}
    proxy, arm = read_card(folders["proxy"]), read_card(folders["arm"])
    assert (proxy.settings["p_t"], proxy.gate, proxy.weight) == (0.25, 0.5, before.weight)
    assert proxy.settings["top_k"] == before.settings["top_k"]
    assert (arm.weight, arm.settings) == (2.0, {})
    assert arm.training["tuned"]["knobs"] == proxy.training["tuned"]["knobs"] == knobs
    assert sorted(path.name for path in Path(folders["arm"]).parent.iterdir()) == ["arm", "proxy"]


def test_applying_is_refused_where_no_card_could_hold_a_knob(folders: dict[str, str]):
    with pytest.raises(ConfigError, match="belong to the request"):
        check_applicable(config_of(folders, temperature={"uniform": [0.1, 1.0]}))
    weight = {"guides.arm": {"uniform": [0.1, 1.0]}}
    with pytest.raises(ConfigError, match="versions of a registry never change"):
        check_applicable(config_of({**folders, "arm": "models:/arm@prod"}, **weight))
    with pytest.raises(ConfigError, match="no folder"):
        check_applicable(config_of({**folders, "arm": {"kind": "genarm"}}, **weight))
