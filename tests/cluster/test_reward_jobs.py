"""Learning from reward on a real local cluster: few runs, each checked from several sides."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from jobs.dataset import prepare
from jobs.train import train
from pilotfish import Pilot, SamplingParams
from pilotfish.data.collate import PromptExample
from pilotfish.evaluation.rewards import ModelRewardConfig, build_reward
from pilotfish.guides.card import read_card
from pilotfish.train.export import read_record
from pilotfish.train.rollout import rollout_seed
from tests.cluster.killing import CUT_STEP, KILLED, KILLED_ACTOR, STARTS, loop_killed_twice
from tests.distributed.learning_jobs import save_models, tiny_job

pytestmark = pytest.mark.cluster

STEPS = CUT_STEP + 1
CHANGES: dict[str, Any] = {
    "train__steps": STEPS,
    "train__log_every": 1,
    "train__checkpoint_every": 3,
    "train__eval_every": 4,
    "scaling__max_failures": 1,
}
ACTORS: dict[str, Any] = {"rollout__where": "actors", "rollout__num_actors": 2}
OVERLAP: dict[str, Any] = {**ACTORS, "rollout__overlap": True}
SHORT: dict[str, Any] = {"train__steps": 3}
TRACKED: dict[str, Any] = {"tracking": {"system_metrics_every": 0}}
CURVES = ("step", "train/reward", "train/loss", "train/kl", "train/approx_kl", "eval/reward")


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        record = read_record(self.folder)
        assert record is not None
        return record

    @property
    def metrics(self) -> dict[str, float]:
        return self.record["metrics"]

    def curves(self) -> dict[str, list[float]]:
        history = self.record["history"]
        return {name: [one[name] for one in history if name in one] for name in CURVES}


@pytest.fixture(scope="module")
def root(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_models(folder)
    return folder


def run_job(
    root: Path, name: str, changes: Mapping[str, Any], *, kind: str = "proxy", **how
) -> Run:
    own = root / name
    own.mkdir()
    for model in ("base", "judge"):
        (own / model).symlink_to(root / model)
    return Run(train(tiny_job(own, kind, **{**CHANGES, **changes}), **how))


def assert_same_curves(found: Run, wanted: Run) -> None:
    """Caches of a new process are laid out in another way, and round in another way."""
    for name, curve in wanted.curves().items():
        assert found.curves()[name] == pytest.approx(curve, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def overlapping(root: Path) -> Run:
    return run_job(root, "overlapping", {**OVERLAP, **TRACKED})


@pytest.fixture(scope="module")
def in_turn(root: Path) -> Run:
    """The workers decode, and then learn."""
    return run_job(root, "in_turn", {"scaling__num_workers": 2, **SHORT})


@pytest.fixture(scope="module")
def killed(root: Path) -> Run:
    return run_job(root, "killed", OVERLAP, loop=loop_killed_twice)


def test_neither_a_killed_rollout_actor_nor_a_killed_learner_changes_the_curves(
    killed: Run, overlapping: Run
) -> None:
    """Not even by the rollouts that were under way at the kill and at the checkpoint."""
    folder = killed.folder.parent
    assert not psutil.pid_exists(int((folder / KILLED_ACTOR).read_text()))
    assert (folder / KILLED).exists()
    assert (folder / STARTS).read_text() == "1 workers, new\n1 workers, resumed\n"
    assert_same_curves(killed, overlapping)


def test_a_resumed_run_keeps_its_controls(killed: Run, overlapping: Run) -> None:
    names = [name for name in overlapping.metrics if name.startswith(("base/", "untrained/"))]
    assert names
    for name in names:
        assert killed.metrics[name] == overlapping.metrics[name]


def test_two_workers_that_decode_learn_what_one_with_actors_learns(
    root: Path, in_turn: Run, overlapping: Run
) -> None:
    one = run_job(root, "one", {**ACTORS, **SHORT})
    assert_same_curves(one, in_turn)
    late, in_time = (run.curves()["train/reward"] for run in (overlapping, one))
    assert late[0] == pytest.approx(in_time[0])
    assert late[1] != pytest.approx(in_time[1]), "drawn before the first update"


def test_the_guide_decodes_what_the_last_evaluation_did(root: Path, overlapping: Run) -> None:
    """The law that was trained is the law that is served."""
    config = tiny_job(root, "proxy")
    prepared, _ = prepare(config)
    card = read_card(overlapping.folder)
    assert (card.kind, card.settings["top_k"]) == ("proxy", 4)
    pilot = Pilot(str(root / "base"), guides={"proxy": str(overlapping.folder)}, device="cpu")
    heldout = prepared.heldout[: config.rollouts.num_heldout]
    prompts = [one.prompt for one in heldout if isinstance(one, PromptExample)]
    params = [
        SamplingParams(
            max_tokens=config.rollouts.max_tokens,
            seed=rollout_seed(config.seed, iteration=2**40, prompt=place, sample=0),
        )
        for place in range(len(prompts))
    ]
    served = pilot.generate(prompts, params, guides={"proxy": 1.0})
    judge = build_reward(ModelRewardConfig(path=str(root / "judge")), device="cpu")
    judged = judge.judge(prompts, [one.text for one in served])
    rewards = [one.reward or 0.0 for one in judged]
    assert sum(rewards) / len(rewards) == pytest.approx(
        overlapping.metrics["eval/reward"], abs=1e-4
    )
    lengths = [len(one.token_ids) for one in served]
    assert sum(lengths) / len(lengths) == overlapping.metrics["eval/length"]


def test_a_run_is_tracked_beside_its_controls(root: Path, overlapping: Run) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'overlapping'}/mlflow.db")
    run = client.get_run(overlapping.record["run_id"])
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    for prefix in ("eval", "base", "untrained"):
        for name in ("reward", "reward_error", "true_reward", "bad_share", "length", "kl"):
            assert metrics[f"{prefix}/{name}"] == pytest.approx(
                overlapping.metrics[f"{prefix}/{name}"]
            )
    assert metrics["base/kl"] == 0
    assert metrics["untrained/reward"] != metrics["base/reward"]
    assert 0 < metrics["trainable_share"] <= 0.01
    for name in ("rollout_seconds", "reward_seconds", "update_seconds"):
        assert len(client.get_metric_history(run.info.run_id, f"train/{name}")) == STEPS


def test_a_whole_model_learns_from_reward_and_loads(root: Path) -> None:
    run = run_job(root, "policy", SHORT, kind="ppo")
    assert [one["step"] for one in run.record["history"]] == [1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    moved = [
        not torch.equal(weight, base.state_dict()[name])
        for name, weight in model.state_dict().items()
    ]
    assert all(moved)
    [answer] = Pilot(str(run.folder), device="cpu").generate(["<user> hello"])
    assert answer.token_ids
