"""Multi-round alignment: the jobs that a round consists of, and when rounds stop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import rounds
from jobs.config import JobConfig
from jobs.rounds import Round, best_of
from jobs.rounds_config import (
    AlignerPairs,
    RoundsConfig,
    answer_job,
    correct_job,
    monitor_job,
    resolved,
    reward_job,
    rounds_hash,
    training_job,
)
from jobs.rows_config import AnswerConfig, CorrectConfig
from pilotfish import config as configs
from pilotfish.errors import ConfigError, DataError
from pilotfish.evaluation.metrics import Estimate, has_fallen
from pilotfish.train.export import write_record
from pilotfish.train.reward_learning import PolicyConfig

CONFIG = """
root: {root}
output: ${{root}}/aligned
base: ${{root}}/base
num_rounds: 2
prompts: {{source: kitchen, num: 40, seed: 5}}
pairs: {{kind: aligner, aligners: ["${{root}}/one", "${{root}}/two"]}}
training:
  objective: {{kind: dpo}}
  train: {{steps: 3, learning_rate: 1.0e-3}}
monitor:
  prompts: {{source: kitchen, num: 10, seed: 6}}
  reward: {{kind: kitchen}}
"""
SELF = "pairs={kind: self, num_answers: 4, reward: {kind: model, path: judge}}"

Load = Callable[..., RoundsConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    path = tmp_path / "rounds.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    return lambda *overrides: configs.load(RoundsConfig, path, overrides)


def test_every_round_has_prompts_of_its_own_and_the_model_of_the_round_before(load: Load) -> None:
    first, second = (answer_job(load(), Path("w"), number, f"model{number}") for number in (1, 2))
    assert (first.base, second.base) == ("model1", "model2")
    assert [job.prompts.skip for job in (first, second)] == [0, 40]
    assert {job.prompts.num for job in (first, second)} == {40}


def test_the_monitor_asks_every_model_the_same(load: Load) -> None:
    one, two = (monitor_job(load(), Path("w"), model) for model in ("a", "b"))
    assert one.model_copy(update={"base": "b"}) == two
    assert one.reward == load().monitor.reward


def test_a_round_has_the_aligner_of_its_number_or_the_only_one(load: Load) -> None:
    def names(config: RoundsConfig) -> list[str]:
        assert isinstance(config.pairs, AlignerPairs)
        jobs = [correct_job(config, config.pairs, Path("w"), number) for number in (1, 2)]
        return [Path(job.aligner).name for job in jobs]

    assert names(load()) == ["one", "two"]
    assert names(load("pairs.aligners=[only]")) == ["only", "only"]


def test_training_starts_from_the_round_before_which_is_the_reference_too(load: Load) -> None:
    job = training_job(load(), Path("w/round_2"), "w/round_1/model", parent="run")
    assert job.started.init == job.frozen_base.path == "w/round_1/model"
    assert job.output == "w/round_2/model"
    assert job.data.model_dump()["path"] == "w/round_2/corrections/pairs.jsonl"
    assert job.tracking.parent == "run"


def test_the_control_pairs_several_answers_of_the_model_itself(load: Load) -> None:
    config = load(SELF)
    job = answer_job(config, Path("w"), 1, "model")
    assert (job.num_answers, job.reward.kind) == (4, "model")
    trained = training_job(config, Path("w"), "model", parent=None)
    assert trained.data.model_dump()["path"] == "w/answers/pairs.jsonl"


PPO = (
    "training.objective={kind: ppo}",
    "training.rollout={max_tokens: 9}",
    "reward_training={objective: {kind: reward_model}, train: {steps: 2, learning_rate: 1.0e-3}}",
)


def test_ppo_learns_from_a_reward_model_that_the_pairs_of_the_round_taught(load: Load) -> None:
    config = load(*PPO)
    reward = reward_job(config, Path("w/round_1"), "start", parent=None)
    job = training_job(config, Path("w/round_1"), "start", parent=None)
    assert reward.data == job.data, "pairs to the one, their prompts to the other"
    assert [getattr(term.judge, "path", None) for term in job.rollouts.rewards] == [reward.output]
    assert (reward.started.init, job.started.init) == ("start", "start")
    assert isinstance(job.objective, PolicyConfig)
    assert job.objective.critic == reward.output
    assert job.rollouts.max_tokens == 9


@pytest.mark.parametrize(
    "overrides",
    [PPO[:2], PPO[2:], (*PPO, "training.rollout.rewards=[]"), (*PPO, "reward_training.output=x")],
)
def test_a_reward_model_is_trained_for_ppo_and_for_nothing_else(
    load: Load, overrides: Sequence[str]
) -> None:
    with pytest.raises(ConfigError, match="reward"):
        load(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.model.init=x", "training.model.init is what a round fills in"),
        ("training.data.path=x", "training.data.path is what a round fills in"),
        ("training.output=x", "training.output is what a round fills in"),
        ("training.train.learning_rat=1", "learning_rat"),
        ("training.objective={kind: genarm}", "trains a guide"),
        ("num_rounds=3", "pairs.aligners has 2 folders"),
        ("monitor.reward.kind=none", "nothing says when to stop"),
        ("pairs={kind: self, reward: {kind: none}}", "which answer is the best"),
        ("prompts={path: rows.jsonl}", "prompts.num is missing"),
        ("sampling.guides={g: 1}", "sampling.guides: unknown key"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(
    load: Load, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_the_hash_ignores_how_many_rounds_there_are_and_where_they_run(load: Load) -> None:
    want = rounds_hash(resolved(load("pairs.aligners=[only]")))
    for override in (
        *("num_rounds=9", "output=/elsewhere", "decoding.num_actors=2", "monitor.patience=3"),
        *("training.scaling.num_workers=2", "tracking.enabled=false"),
    ):
        assert rounds_hash(resolved(load("pairs.aligners=[only]", override))) == want


@pytest.mark.parametrize(
    "override",
    [
        *("prompts.num=50", "seed=2", "sampling.temperature=0.7", "decoding.max_tokens=9"),
        *("training.train.steps=4", "monitor.prompts.num=11", SELF, "pairs.aligners=[a, b]"),
    ],
)
def test_the_hash_changes_with_what_decides_the_rounds(load: Load, override: str) -> None:
    assert rounds_hash(resolved(load(override))) != rounds_hash(resolved(load()))


@pytest.mark.parametrize("model", ["base", "two"])
def test_a_base_or_an_aligner_that_was_trained_again_makes_new_rounds(
    load: Load, tmp_path: Path, model: str
) -> None:
    def digest(of_model: str) -> str:
        (tmp_path / model).mkdir(exist_ok=True)
        write_record(tmp_path / model, {"config_hash": of_model})
        return rounds_hash(resolved(load()))

    assert digest("aaa") == digest("aaa") != digest("bbb")


def estimates(*means: float, error: float = 0.1) -> list[Estimate]:
    return [Estimate(mean=mean, error=error) for mean in means]


@pytest.mark.parametrize(
    ("means", "patience", "fallen"),
    [
        ((1.0,), 1, False),
        ((1.0, 2.0), 1, False),
        ((1.0, 0.95), 1, False),  # within its standard error
        ((1.0, 0.85), 1, True),
        ((1.0, 2.0, 1.5), 1, True),  # against the best so far, and not the first
        ((1.0, 0.5), 2, False),
        ((1.0, 0.5, 0.6), 2, True),
        ((1.0, 0.5, 0.95), 2, False),
    ],
)
def test_rewards_have_fallen_when_the_last_are_below_the_best_by_more_than_their_error(
    means: Sequence[float], patience: int, fallen: bool
) -> None:
    assert has_fallen(estimates(*means), patience) is fallen


class Script:
    """Stands in for the jobs of the rounds; the monitor finds the rewards it is told."""

    def __init__(self, rewards: Sequence[float], *, num_pairs: Sequence[int] = ()) -> None:
        self.trained: list[JobConfig] = []
        self._rewards = iter(rewards)
        self._num_pairs = iter([*num_pairs, *[10] * 9])

    def answer(self, job: AnswerConfig) -> dict[str, float]:
        if not job.output.endswith("monitor"):
            return {"answers/num": 40}
        reward = next(self._rewards)
        return {"answers/reward": reward, "answers/reward_error": 0.1, "answers/bad_share": 0.0}

    def correct(self, job: CorrectConfig) -> dict[str, float]:
        gain = {"corrections/gain": -0.5, "corrections/gain_error": 0.1}
        return {"pairs/num": next(self._num_pairs), **gain}

    def train(self, job: JobConfig) -> Path:
        self.trained.append(job)
        folder = Path(job.output)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(job.output)
        return folder


@pytest.fixture
def play(load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Round]]:
    def play(script: Script, *overrides: str) -> list[Round]:
        for name in ("answer", "correct", "train"):
            monkeypatch.setattr(rounds, name, getattr(script, name))
        monkeypatch.setattr(rounds, "metrics_of", dict)
        monkeypatch.setattr(rounds, "_connect", lambda _: None)
        return rounds.align(
            load("tracking.enabled=false", "pairs.aligners=[only]", "num_rounds=4", *overrides)
        )

    return play


Play = Callable[..., list[Round]]


def test_rounds_stop_when_the_gold_reward_falls_and_the_best_model_is_kept(
    play: Play, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script([0.0, 1.0, 0.5, 9.0])
    found = play(script)
    assert [one.reward.mean for one in found] == [0.0, 1.0, 0.5]
    assert [job.started.init for job in script.trained] == [str(tmp_path / "base"), found[1].model]
    assert (tmp_path / "aligned" / "weights").read_text() == found[1].model
    assert "the gold reward has fallen to 0.50" in caplog.text
    assert "the Aligner improves these answers no more" in caplog.text


def test_patience_lets_the_reward_come_back(play: Play, tmp_path: Path) -> None:
    found = play(Script([0.0, 1.0, 0.5, 1.5, 2.0]), "monitor.patience=2")
    assert len(found) == 5
    assert (tmp_path / "aligned" / "weights").read_text() == found[4].model


def test_rounds_end_when_no_answer_is_changed_any_more(play: Play, tmp_path: Path) -> None:
    found = play(Script([0.0, 1.0], num_pairs=[10, 0]))
    assert len(found) == 2
    assert (tmp_path / "aligned" / "weights").read_text() == found[1].model


def test_an_aligner_that_changes_nothing_at_all_is_an_error(play: Play) -> None:
    with pytest.raises(DataError, match="nothing to learn from"):
        play(Script([0.0], num_pairs=[0]))


def test_what_was_made_from_the_same_settings_is_reused(play: Play) -> None:
    first = play(Script([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert play(Script([])) == first
    for other in ("seed=3", "num_rounds=5", "monitor.patience=2"):
        with pytest.raises(ConfigError, match="not made from these settings"):
            play(Script([]), other)


def test_a_model_that_no_round_improved_is_named(caplog: pytest.LogCaptureFixture) -> None:
    made = [
        Round(
            number=number, model="m", metrics={"monitor/reward": reward, "monitor/reward_error": 1}
        )
        for number, reward in enumerate([2.0, 1.0, 1.5])
    ]
    assert best_of(made).number == 2
    assert "no round is better than the model it began with" in caplog.text


@pytest.mark.parametrize(
    ("name", "config_type"),
    [("answer", AnswerConfig), ("correct", CorrectConfig), ("rounds", RoundsConfig)],
)
def test_shipped_configs_are_valid(name: str, config_type: Any) -> None:
    path = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen" / f"{name}.yaml"
    config = configs.load(config_type, path)
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)
