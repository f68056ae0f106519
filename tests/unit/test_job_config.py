"""Training configs: what ships is valid, and what decides the weights decides the hash."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, train
from jobs.config import JobConfig
from jobs.resolve import config_hash, resolved
from pilotfish import config as configs
from pilotfish.errors import CheckpointError, ConfigError
from pilotfish.train.export import write_record

REPOSITORY = Path(__file__).resolve().parents[2]
# The other jobs' configs have no optimizer.
SHIPPED = [
    path
    for path in sorted((REPOSITORY / "jobs" / "configs").glob("*/*.yaml"))
    if "train" in yaml.safe_load(path.read_text())
]
KITCHEN_BASE = REPOSITORY / "jobs" / "configs" / "kitchen" / "base.yaml"
GENARM = REPOSITORY / "jobs" / "configs" / "kitchen" / "genarm.yaml"


def load(path: Path = KITCHEN_BASE, *overrides: str) -> JobConfig:
    return configs.load(JobConfig, path, overrides)


def dry_run(*argv: str) -> tuple[int, Any]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = train.main([*argv, "--dry-run"])
    return code, yaml.safe_load(out.getvalue())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_passes_a_dry_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    code, printed = dry_run(str(path))
    assert code == 0
    assert printed["objective"]["kind"]


def test_configs_are_shipped() -> None:
    assert {"base.yaml", "genarm.yaml", "genarm-7b.yaml"} <= {path.name for path in SHIPPED}


def test_a_dry_run_prints_overrides_and_absolute_paths(tmp_path: Path) -> None:
    code, printed = dry_run(str(GENARM), f"root={tmp_path}", "train.learning_rate=5e-4")
    assert code == 0
    assert printed["train"]["learning_rate"] == 5e-4
    assert printed["output"] == str(tmp_path / "kitchen" / "genarm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rat=1"], "did you mean 'learning_rate'"),
        (["objective.kind=dpos"], "sft"),
        (["train.deepspeed=7"], "stage from 0 to 3"),
        (["train.deepspeed=infra/no.json"], "not a file"),
        (["scaling.num_workers=3"], "3 workers"),
        (["scaling.num_workers=[2,4]"], "3 workers"),
        (["scaling.num_workers=[2,1]"], "wanted [min, max]"),
        (["train.epochs=2"], "exactly one"),
        (["data.sed=3"], "did you mean 'seed'"),
        (["model.tokenizer=null"], "tokenizer must say"),
        (["train.deepspeed={elasticity: {}}"], "elasticity"),
    ],
)
def test_a_config_that_cannot_be_honoured_exits_with_2_and_says_why(
    overrides: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert train.main([str(KITCHEN_BASE), *overrides, "--dry-run"]) == 2
    assert message in caplog.text


ACTORS = "rollout.where=actors"
SAC = "objective.algorithm={kind: sac}"
NO_ROLLOUT = "rollout=null"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("proxy", ["rollout.num_actors=2"], "rollout.num_actors is given, but the training work"),
        ("proxy", ["rollout.overlap=true"], "Set where: actors"),
        ("proxy", [NO_ROLLOUT], "rollout: the objective 'proxy' needs this section"),
        ("proxy", ["rollout.rewards=[]"], "rollout.rewards"),
        ("proxy", ["model.init=x"], "model: the objective 'proxy' has no use for this section"),
        ("proxy", ["base=null"], "learns beside a frozen base, and nothing names one"),
        ("proxy", [ACTORS, "base.sharding=zero3"], "each of which holds a whole base"),
        ("proxy", ["train.steps=null", "train.epochs=2"], "set train.steps"),
        ("proxy", ["train.batch_size=5"], "2 workers"),
        ("proxy_mara", ["scaling.num_workers=2"], "SAC has one learner"),
        ("proxy_mara", ["train.betas=[0.9, 0.98]"], "train.betas: SAC has an optimizer of its own"),
        ("proxy_mara", ["train.deepspeed=2"], "train.deepspeed: SAC"),
        ("proxy_mara", ["objective.learner.critic.hidden=[8]"], "learner.critic is PPO's"),
        ("ppo", ["model=null"], "model: the objective 'ppo' needs this section"),
        ("genarm", ["base.path=x"], "base: the objective 'genarm' has no use for this section"),
        ("genarm", ["objective.length_check={}", "model.lora={}"], "cannot decode with adapters"),
    ],
)
def test_learning_from_reward_and_beside_a_base_says_what_it_cannot_do(
    name: str, overrides: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = KITCHEN_BASE.with_name(f"{name}.yaml")
    assert train.main([str(path), *overrides, "--dry-run"]) == 2
    assert message in caplog.text


def test_passes_of_learning_from_reward_are_over_completions() -> None:
    """16 prompts of 2 workers with 8 completions each, and 32 completions at a time."""
    path = KITCHEN_BASE.with_name("proxy.yaml")
    assert load(path, "train.micro_batch_size=32").train.micro_batch_size == 32


def test_actors_need_room_beside_the_workers() -> None:
    path = KITCHEN_BASE.with_name("proxy.yaml")
    assert load(path).num_cpus == 2
    actors = (ACTORS, "rollout.num_actors=3", "rollout.threads=2")
    assert load(path, *actors).num_cpus == 2 + 4 * 2, "each worker has as many"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_resolved_config_is_a_config(path: Path) -> None:
    """What a dry run prints, and what a record holds, can be run again."""
    config = resolved(load(path))
    assert configs.parse(JobConfig, config.model_dump(mode="json"), source="a record") == config


def test_a_relative_root_in_a_submitted_job_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"root=/shared/folder"):
        resolved(load())
    assert resolved(load(KITCHEN_BASE, "root=/shared")).root == "/shared"


def test_variables_of_the_submitted_job_are_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PYTHONPATH" in cluster.worker_env(gpus=False)
    job = '{"runtime_env": {"env_vars": {"PYTHONPATH": "platform"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    env = cluster.worker_env(gpus=False)
    assert "PYTHONPATH" not in env
    assert env["DS_ACCELERATOR"] == "cpu"


def test_the_hash_ignores_where_things_lie_and_how_many_work() -> None:
    want = config_hash(resolved(load()))
    for override in (
        "root=/elsewhere",
        "output=/elsewhere/x",
        "scaling.num_workers=2",
        "scaling.num_workers=[1,2]",
        "tracking.enabled=false",
        "force=true",
    ):
        assert config_hash(resolved(load(KITCHEN_BASE, override))) == want


@pytest.mark.parametrize(
    "override",
    ["seed=7", "train.steps=10", "data.num=99", "model.init.hidden_size=64", "train.deepspeed=2"],
)
def test_the_hash_changes_with_what_decides_the_weights(override: str) -> None:
    assert config_hash(resolved(load(KITCHEN_BASE, override))) != config_hash(resolved(load()))


def test_a_guide_is_trained_anew_when_its_base_was(tmp_path: Path) -> None:
    base = tmp_path / "kitchen" / "base"
    base.mkdir(parents=True)

    def digest(of_base: str) -> str:
        write_record(base, {"config_hash": of_base})
        return config_hash(resolved(load(GENARM, f"root={tmp_path}")))

    assert digest("aaa") != digest("bbb")
    assert digest("aaa") == digest("aaa")


def test_learning_from_reward_depends_on_what_is_in_its_folders_and_not_where_they_lie(
    tmp_path: Path,
) -> None:
    def digest(root: str, *overrides: str, name: str = "ppo", **contents: str) -> str:
        for folder in ("base", "reward_model"):
            path = tmp_path / root / "kitchen" / folder
            path.mkdir(parents=True, exist_ok=True)
            write_record(path, {"config_hash": contents.get(folder, folder)})
        path = KITCHEN_BASE.with_name(f"{name}.yaml")
        return config_hash(resolved(load(path, f"root={tmp_path / root}", *overrides)))

    want = digest("here")
    assert digest("there") == want
    assert digest("here", ACTORS, "rollout.num_actors=2") == want, "whoever decodes"
    assert digest("here", base="other") != want
    assert digest("here", reward_model="other") != want
    assert digest("here", ACTORS, "rollout.overlap=true") != want
    assert digest("here", "rollout.rewards=[{judge: {kind: kitchen}}]") != want
    assert digest("here", "base.dtype=bfloat16") != want


def test_an_output_trained_from_the_same_settings_is_reused(tmp_path: Path) -> None:
    config = load(KITCHEN_BASE, f"root={tmp_path}")
    output = tmp_path / "kitchen" / "base"
    output.mkdir(parents=True)
    write_record(output, {"config_hash": config_hash(resolved(config))})
    assert train.train(config) == output


def test_an_output_of_other_settings_is_an_error(tmp_path: Path) -> None:
    output = tmp_path / "kitchen" / "base"
    output.mkdir(parents=True)
    write_record(output, {"config_hash": "other"})
    with pytest.raises(ConfigError, match=r"force=true"):
        train.train(load(KITCHEN_BASE, f"root={tmp_path}"))


def test_a_folder_that_is_no_model_is_never_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "kitchen" / "base"
    output.mkdir(parents=True)
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not trained by this command"):
        train.train(load(KITCHEN_BASE, f"root={tmp_path}"))
    assert (output / "thesis.txt").exists()


def test_a_base_that_was_not_trained_yet_is_an_error_before_anything_starts(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match="Train that model first"):
        train.train(load(GENARM, f"root={tmp_path}"))
