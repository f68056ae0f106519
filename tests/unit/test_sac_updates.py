"""SAC inside a job: its size, its rate, and its checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from jobs.config import JobConfig
from jobs.policies import ProxyLearning
from jobs.rollouts import Rollout
from jobs.sac_updates import SACUpdates
from pilotfish import config as configs
from pilotfish.errors import ConfigError
from pilotfish.train.reward_learning import ProxyConfig
from pilotfish.train.sac import SACConfig
from tests.fakes import tiny_config
from tests.learning import proxy_rollout, proxy_settings, random_policy

RATE = 0.004
QUICK = {"kind": "sac", "batch_size": 32, "updates_per_episode": 1, "learning_starts": 1}


def new_updates(*, vocab_size: int = 10_000, **proxy: Any) -> tuple[SACUpdates, ProxyLearning]:
    """The learner of a proxy for a base with so many words."""
    tree = {
        "output": "/nowhere",
        "base": {"path": "/nowhere/base"},
        "objective": {
            "kind": "proxy",
            "settings": proxy_settings().model_dump(),
            "algorithm": QUICK,
            **proxy,
        },
        "rollout": {"rewards": [{"judge": {"kind": "kitchen"}}]},
        "data": {"source": "kitchen", "num": 12},
        "train": {"steps": 5, "batch_size": 4, "learning_rate": RATE},
    }
    config = configs.parse(JobConfig, tree, source="a test")
    assert isinstance(config.objective, ProxyConfig)
    assert isinstance(config.objective.algorithm, SACConfig)
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_config(vocab_size))
    torch.manual_seed(7)
    learning = ProxyLearning(config.objective, base)
    return SACUpdates(config, learning, config.objective.algorithm), learning


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    settings = proxy_settings()
    episodes = proxy_rollout(random_policy(settings), settings)
    rewards = [float(one.completion_ids.sum()) for one in episodes]
    return Rollout(
        episodes=episodes, rewards=rewards, monitored=None, decode_seconds=0, reward_seconds=0
    )


def test_a_resumed_learner_goes_on_as_if_nothing_had_happened(
    rollout: Rollout, tmp_path: Path
) -> None:
    (whole, learned), (rest, resumed) = new_updates(), new_updates()
    whole.learn(0, rollout)
    whole.engine.save_checkpoint(str(tmp_path), tag="step_1", exclude_frozen_parameters=True)
    path, _ = rest.engine.load_checkpoint(str(tmp_path), load_module_strict=False)
    assert Path(path).is_file()
    for number in (1, 2):
        assert rest.learn(number, rollout) == whole.learn(number, rollout)
    weights = learned.weights()
    assert weights
    for name, weight in resumed.weights().items():
        assert torch.equal(weight, weights[name])


def test_the_rate_is_that_of_the_job(rollout: Rollout) -> None:
    updates, learning = new_updates()
    before = learning.weights()
    one = replace(rollout, episodes=rollout.episodes[:1], rewards=[1.0])
    assert updates.learn(0, one)["critic_loss"].count == 1
    moved = max((learning.weights()[name] - before[name]).abs().max() for name in before)
    assert float(moved) == pytest.approx(RATE, rel=1e-3)  # Adam's first step
    assert updates.engine.get_lr() == [RATE]


def test_the_share_counts_the_critics_of_sac_and_not_that_of_ppo() -> None:
    _, learning = new_updates()
    head = sum(one.numel() for one in learning.module.actor.parameters())
    critics = 2 * (head + proxy_settings().head.hidden[0])  # they also read the action
    assert learning.facts["trainable_parameters"] == head + critics
    assert learning.facts["trainable_share"] <= 0.01
    with pytest.raises(ConfigError, match="wanted at most 1%"):
        new_updates(vocab_size=1000)
