"""`serve.config` and the checks that come before anything starts."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from pilotfish.errors import CheckpointError, ConfigError, VocabMismatchError
from pilotfish.guides.base import Stage
from serve.app import build
from serve.artifacts import folder_version, pin
from serve.catalog import make_catalog
from serve.choosing import GuideAsk, choose
from serve.config import ServeConfig, parse_args
from serve.errors import APIError
from serve.wire import GuideUse
from tests.folders import (
    byte_tokenizer,
    save_aligner,
    save_base,
    save_guide,
    save_proxy,
)

CONFIGS = Path(__file__).resolve().parents[2] / "serve" / "configs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_guide(tmp_path_factory.mktemp("guide"), weight=0.5)


def test_dotted_arguments_are_the_same_as_a_tree() -> None:
    tree = {
        "base": {"path": "runs/base", "num_slots": 4},
        "guides": [{"name": "helpful", "path": "runs/guide"}],
    }
    flat = {
        "base.path": "runs/base",
        "base.num_slots": "4",
        "guides": "[{name: helpful, path: runs/guide}]",
    }
    assert parse_args(flat) == parse_args(tree)


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match=r"guides\.0\.wieght: unknown key; did you mean 'weight'"):
        parse_args({"base": {"path": "b"}, "guides": [{"name": "a", "path": "g", "wieght": 1}]})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"base": {"path": "b", "model_id": "my:base"}}, "a ':' separates base and guide"),
        ({"base": {"path": "b"}, "guides": [{"name": "a:b", "path": "g"}]}, "a ':' separates"),
        ({"base": {"path": "b"}, "guides": [{"name": "a", "path": "g"}] * 2}, "names must differ"),
        (
            {"base": {"path": "b"}, "guides": [{"name": "a", "path": "g", "num_replicas": 2}]},
            "num_replicas would have no effect on a colocated guide",
        ),
        (
            {
                "base": {"path": "b", "num_slots": 8},
                "guides": [{"name": "a", "path": "g", "placement": "remote", "num_slots": 4}],
            },
            "fewer than the base's 8 rows",
        ),
        (
            {
                "base": {"path": "b"},
                "ingress": {"api_keys_file": "keys", "api_keys_env": "KEYS"},
            },
            "api_keys_file and api_keys_env are both set",
        ),
    ],
)
def test_contradictions_are_refused(args: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(args)


def test_a_remote_guide_has_slots_for_all_base_replicas() -> None:
    config = parse_args(
        {
            "base": {"path": "b", "num_slots": 8, "num_replicas": 3},
            "guides": [{"name": "a", "path": "g", "placement": "remote"}],
        }
    )
    assert config.guide_slots(config.guides[0]) == 24


def _config(base: Path, guide: Path, **guide_settings: object) -> ServeConfig:
    settings = {"name": "helpful", "path": str(guide), **guide_settings}
    return parse_args({"base": {"path": str(base)}, "guides": [settings]})


def test_a_guide_has_the_weight_of_its_card_unless_the_config_says_otherwise(
    base: Path, guide: Path
) -> None:
    assert make_catalog(_config(base, guide), created=0).guides[0].current.weight == 0.5
    assert make_catalog(_config(base, guide, weight=2.0), created=0).guides[0].current.weight == 2.0


def test_a_missing_folder_is_an_error_before_anything_starts(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no guide\.json"):
        make_catalog(_config(base, tmp_path / "nowhere"), created=0)


def test_a_guide_of_another_vocabulary_is_an_error_before_anything_starts(
    base: Path, tmp_path: Path
) -> None:
    other = save_guide(tmp_path / "other", tokenizer=byte_tokenizer(262))
    with pytest.raises(VocabMismatchError, match="train it against this base"):
        make_catalog(_config(base, other), created=0)


def test_a_guide_that_rewrites_answers_has_replicas_of_its_own(base: Path, tmp_path: Path) -> None:
    aligner = save_aligner(tmp_path / "aligner")
    with pytest.raises(CheckpointError, match=r"'aligner', which rewrites whole .* remote"):
        make_catalog(_config(base, aligner), created=0)
    (entry,) = make_catalog(_config(base, aligner, placement="remote"), created=0).guides
    assert entry.current.stage is Stage.REVISION


def test_the_version_of_a_folder_follows_its_weights(tmp_path: Path) -> None:
    one, same = save_guide(tmp_path / "one", seed=1), save_guide(tmp_path / "same", seed=1)
    other = save_guide(tmp_path / "other", seed=2)
    assert folder_version(one) == folder_version(same) != folder_version(other)


def test_an_alias_is_pinned_to_the_version_it_names(guide: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_registered_model("helpful")
    version = client.create_model_version("helpful", source=str(guide)).version
    client.set_registered_model_alias("helpful", "prod", version)

    artifact = pin("models:/helpful@prod", uri)

    assert artifact.uri == f"models:/helpful/{version}"
    folder = artifact.fetch()
    assert (Path(folder) / "guide.json").read_bytes() == (guide / "guide.json").read_bytes()
    assert artifact.version(folder) == str(version)


def test_an_unknown_alias_is_an_error_that_names_the_server(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(CheckpointError, match=r"sqlite.*cannot resolve 'models:/no@prod'"):
        pin("models:/no@prod", uri)


def test_the_body_goes_before_the_suffix_of_the_model(base: Path, guide: Path) -> None:
    catalog = make_catalog(_config(base, guide), created=0)
    (helpful,) = catalog.guides

    def chosen(model: str, asked: list[GuideAsk] | None) -> list[GuideUse]:
        return list(choose(catalog, model, asked, request_id="r").uses)

    strong = [GuideAsk(name="helpful", weight=2.0)]
    assert chosen("base", None) == []
    assert chosen("base:helpful", None) == [GuideUse(helpful.current, 0.5)]
    assert chosen("base:helpful", strong) == [GuideUse(helpful.current, 2.0)]
    assert chosen("base:helpful", []) == []


def test_a_guide_that_is_on_or_off_has_no_other_weight(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = ServeConfig.model_validate(
        {
            "base": {"path": str(base)},
            "guides": [{"name": "proxy", "path": str(save_proxy(tmp_path / "proxy"))}],
        }
    )
    catalog = make_catalog(config, created=1)
    assert choose(catalog, "base:proxy", None, request_id="r").tilts[0].weight == 1.0
    half = [GuideAsk(name="proxy", weight=0.5)]
    with pytest.raises(APIError, match=r"on or off and has no strength: .* 0\.5") as caught:
        choose(catalog, "base", half, request_id="r")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("model", "asked", "param"),
    [
        ("other", None, "model"),
        ("base:other", None, "model"),
        ("base", [GuideAsk(name="other")], "guides"),
    ],
)
def test_what_is_not_served_is_not_found(
    base: Path, guide: Path, model: str, asked: list | None, param: str
) -> None:
    with pytest.raises(APIError, match="served: ") as caught:
        choose(make_catalog(_config(base, guide), created=0), model, asked, request_id="r")
    assert (caught.value.status, caught.value.param) == (404, param)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_a_serve_config_with_valid_args(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for application in schema.applications:
        assert application.import_path == "serve.app:build"
        parse_args(application.args)


def test_build_makes_a_deployment_per_remote_guide(base: Path, guide: Path) -> None:
    settings = {"path": str(guide), "placement": "remote"}
    guides = [{"name": "far", **settings}, {"name": "near", "path": str(guide)}]
    application = build({"base": {"path": str(base)}, "guides": guides})
    names = {node.name for node in _deployments(application)}
    assert names == {"BaseModel", "Guide:far", "Guides", "Pipeline"}


def _deployments(application: Any) -> list[Any]:
    deployment = application._bound_deployment
    arguments = [*deployment.init_args, *deployment.init_kwargs.values()]
    nested = [v for a in arguments if isinstance(a, dict) for v in a.values()]
    children = [a for a in [*arguments, *nested] if isinstance(a, Application)]
    return [deployment, *(node for child in children for node in _deployments(child))]


def test_a_guide_without_one_lm_of_its_own_cannot_be_remote(tmp_path: Path) -> None:
    guide = {"name": "proxy", "path": str(save_proxy(tmp_path / "proxy")), "placement": "remote"}
    base = {"path": str(save_base(tmp_path / "base"))}
    config = ServeConfig.model_validate({"base": base, "guides": [guide]})
    with pytest.raises(ConfigError, match="no single LM that could run elsewhere, as genarm has"):
        make_catalog(config, created=1)
