"""Configs: overrides, references, and errors that name the key and what it could have been."""

from pathlib import Path

import pytest
from pydantic import PositiveInt

from pilotfish.config import Config, dump, load
from pilotfish.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-3
    steps: PositiveInt = 10


class Outer(Config):
    root: str = "runs"
    output: str = ""
    train: Inner = Inner()
    many: tuple[Inner, ...] = ()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("root: runs\noutput: ${root}/model\ntrain: {steps: 20}\n")
    return file


def test_overrides_reach_into_sections_and_keep_their_types(path: Path) -> None:
    config = load(Outer, path, ["train.learning_rate=5e-4", "root=/data", "many=[{steps: 3}]"])
    assert config.train.learning_rate == 5e-4
    assert config.train.steps == 20
    assert config.output == "/data/model"
    assert config.many[0].steps == 3


def test_references_fall_back_to_the_environment_and_to_defaults(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "/here")
    assert load(Outer, path, ["output=${PLACE}/${NOWHERE:-x}"]).output == "/here/x"
    with pytest.raises(ConfigError, match=r"\$\{NOWHERE\} is neither"):
        load(Outer, path, ["output=${NOWHERE}"])


def test_references_in_a_circle_are_an_error(path: Path) -> None:
    with pytest.raises(ConfigError, match="circle"):
        load(Outer, path, ["root=${output}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", r"train.learning_rat: unknown key; did you mean 'learning_rate'"),
        ("zzz=1", "zzz: unknown key; valid keys: many, output, root, train"),
        ("train.steps=0", r"train.steps: Input should be greater than 0 \(got 0\)"),
        ("many=[{stepz: 3}]", "many.0.stepz: unknown key; did you mean 'steps'"),
        ("root.a=1", "root is 'runs', not a section"),
        ("nothing", "not of the form key=value"),
    ],
)
def test_mistakes_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Outer, path, [override])


def test_missing_files_and_broken_yaml_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load(Outer, tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(Outer, tmp_path / "bad.yaml")


def test_a_dumped_config_loads_to_itself(path: Path, tmp_path: Path) -> None:
    config = load(Outer, path)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(Outer, tmp_path / "again.yaml") == config
