"""Accepts and rejects as SAC learns from them: what is replayed, the losses, and that it learns."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pilotfish.decode.sequence import SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.train.experience import Episode
from pilotfish.train.proxy_policy import ProxyLearnerConfig, ProxyPolicy, collate, new_policy
from pilotfish.train.replay import Judged, Replay, judged
from pilotfish.train.rollout import collect
from pilotfish.train.sac import SACConfig, SACLearner
from tests.fakes import random_head
from tests.learning import (
    HORIZON,
    MODEL,
    asks,
    proxy_rollout,
    proxy_settings,
    random_policy,
    recording_engine,
    rewards_of,
    served,
    weights_of,
    world,
)

QUICK: dict[str, Any] = {
    "batch_size": 64,
    "updates_per_episode": 1,
    "learning_starts": 100,
    "gamma": 1.0,
    "tau": 0.02,
    "initial_alpha": 0.1,
    "target_entropy": 0.05,
}


def rollout() -> tuple[ProxyPolicy, list[Episode]]:
    settings = proxy_settings()
    policy = random_policy(settings)
    return policy, proxy_rollout(policy, settings, dtype=torch.float32)


def test_what_was_judged_has_the_law_of_the_tokens() -> None:
    policy, episodes = rollout()
    logprobs_ET = policy(**collate(episodes)).logprobs_ET
    for episode, expected in zip(episodes, logprobs_ET.sum(1).tolist(), strict=True):
        one = judged(episode, 1.0)
        logits = policy.actor(torch.from_numpy(one.features_JF))
        signs = torch.from_numpy(np.where(one.accepted_J, 1.0, -1.0))
        joint = torch.nn.functional.logsigmoid(signs * logits).sum().item()
        assert joint == pytest.approx(expected, abs=1e-9)


def test_the_reward_of_a_completion_counts_once_and_penalties_where_tokens_are_emitted() -> None:
    _, episodes = rollout()
    for episode in episodes:
        offers = episode.offers
        assert offers is not None
        accepted, emitted = [], []
        both = zip(offers.choices_N.tolist(), offers.counts_N.tolist(), strict=True)
        for choice, count in both:
            # Nobody is asked about the last candidate.
            accepted += [False] * choice + [True] * (choice < count - 1)
            emitted.append(len(accepted) - 1)
        one = judged(episode, 3.5, beta_kl=0.2)
        assert one.accepted_J.tolist() == accepted
        rewards = np.zeros(len(accepted))
        rewards[emitted] = -0.2 * (episode.logprobs_N - episode.base_logprobs_N)
        rewards[-1] += 3.5
        np.testing.assert_allclose(one.rewards_J, rewards, atol=1e-6)
        assert judged(episode, 3.5).rewards_J.sum() == 3.5


def numbered(first: int, num: int) -> Judged:
    features = np.arange(first, first + num, dtype=np.float16)[:, None]
    return Judged(features, np.ones(num, dtype=bool), np.full(num, 0.5, dtype=np.float32))


def test_in_the_ring_a_decision_is_followed_by_what_followed_it() -> None:
    replay, generator = Replay(1, max_decisions=37, max_bytes=10**6), np.random.default_rng(0)
    serial, ends, own = 0, set(), torch.empty(0)
    for _ in range(60):
        num = int(generator.integers(1, 12))
        replay.add(numbered(serial, num))
        serial += num
        ends.add(serial - 1)
        batch = replay.sample(300, seed=[serial])
        own, after = batch.features_BF[:, 0].long(), batch.next_BF[:, 0].long()
        assert own.min() >= max(0, serial - 37)
        assert set(own[batch.ended_B].tolist()) <= ends
        assert not set(own[~batch.ended_B].tolist()) & ends
        assert torch.equal(after[~batch.ended_B], own[~batch.ended_B] + 1)
    assert set(own.tolist()) == set(range(serial - 37, serial)), "all that fits is held"
    assert len(replay) == 37


def test_a_replay_is_half_precision_and_bounded_by_bytes() -> None:
    replay = Replay(1000, max_decisions=10**9, max_bytes=100_000)
    assert 0.95 * 100_000 < replay.num_bytes <= 100_000
    assert replay.capacity == 49
    assert replay.sample(0, seed=[0]).features_BF.dtype == torch.float16


def test_batches_are_counted() -> None:
    replay = Replay(1, max_decisions=500, max_bytes=10**6)
    replay.add(numbered(0, 400))
    first, same, other = (replay.sample(64, seed=[3, n]).features_BF for n in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def new_learner(**settings: Any) -> SACLearner:
    proxy = proxy_settings()
    torch.manual_seed(1)
    actor = random_head(3, proxy).float()
    return SACLearner(actor, proxy, SACConfig(**{**QUICK, **settings}), learning_rate=3e-3, seed=5)


def value(critic: torch.nn.Module, features: Tensor, action: int) -> float:
    return critic(torch.cat([features.float(), torch.tensor([float(action)])])).item()


@torch.no_grad()
def reference(learner: SACLearner, targets: torch.nn.Module, alpha: float) -> dict[str, float]:
    """The losses decision by decision."""
    config = learner.config
    batch = learner.replay.sample(config.batch_size, seed=[5, 0])
    sums = dict.fromkeys(("critic_loss", "actor_loss", "alpha_loss", "entropy"), 0.0)
    for at in range(config.batch_size):
        features, after = batch.features_BF[at], batch.next_BF[at]
        chance = learner.actor(features).sigmoid().item()
        wanted = batch.rewards_B[at].item()
        if not batch.ended_B[at]:
            later = learner.actor(after).sigmoid().item()
            for action, p in ((0, 1 - later), (1, later)):
                least = min(value(one, after, action) for one in targets)  # pyright: ignore
                wanted += config.gamma * p * (least - alpha * math.log(p))
        taken = int(batch.accepted_B[at])
        for critic in learner.critics:
            sums["critic_loss"] += 0.5 * (value(critic, features, taken) - wanted) ** 2
        entropy = 0.0
        for action, p in ((0, 1 - chance), (1, chance)):
            least = min(value(one, features, action) for one in learner.critics)
            sums["actor_loss"] += p * (alpha * math.log(p) - least)
            entropy -= p * math.log(p)
        sums["entropy"] += entropy
        sums["alpha_loss"] += alpha * (entropy - config.target_entropy * math.log(2))
    return {name: one / config.batch_size for name, one in sums.items()}


def test_an_update_has_the_papers_losses_and_moves_the_targets_a_little() -> None:
    learner = new_learner(gamma=0.9, beta_kl=0.1)
    learner.replay.add(random_judged(learner.actor.num_features))
    targets = copy.deepcopy(learner.critics)
    expected = reference(learner, targets, 0.1)
    found = learner.update()
    assert {name: found[name].mean for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["alpha"].mean == pytest.approx(0.1, rel=0.01)
    state = learner.state_dict()
    for name, before in targets.state_dict().items():
        moved = before + 0.02 * (learner.critics.state_dict()[name] - before)
        torch.testing.assert_close(state["targets"][name], moved)
        assert not torch.equal(moved, before)


def random_judged(num_features: int, num: int = 150) -> Judged:
    generator = np.random.default_rng(2)
    return Judged(
        generator.normal(size=(num, num_features)).astype(np.float16),
        generator.random(num) < 0.6,
        generator.normal(size=num).astype(np.float32),
    )


def test_a_learner_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    _, episodes = rollout()
    rewards = [float(len(one.completion_ids)) for one in episodes]
    learner, other = new_learner(), new_learner(initial_alpha=0.7)
    learner.learn(episodes, rewards)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for _ in range(2):
        assert learner.learn(episodes, rewards) == other.learn(episodes, rewards)
    assert weights_of(learner.actor) == weights_of(other.actor)
    assert len(learner.replay) == len(other.replay)


def test_learning_waits_until_enough_is_held() -> None:
    _, episodes = rollout()
    learner = new_learner(learning_starts=10_000)
    before = weights_of(learner.actor)
    assert learner.learn(episodes, [1.0] * len(episodes)) == {}
    assert weights_of(learner.actor) == before
    eager = new_learner(updates_per_episode=2)
    metrics = eager.learn(episodes, [1.0] * len(episodes))
    assert metrics["critic_loss"].count == 2 * len(episodes)
    assert weights_of(eager.actor) != before


@pytest.mark.parametrize(
    "variant",
    [
        {"candidate_order": "iid"},
        {"candidate_order": "sample_no_repeat"},
        {"fallback": "top1"},
        {"p_t_rule": "cumulative"},
        {"p_t_rule": "literal"},
    ],
)
def test_laws_that_hide_the_decisions_are_refused(variant: dict[str, Any]) -> None:
    settings = proxy_settings(**variant)
    with pytest.raises(ConfigError, match="Learn by PPO, or change them"):
        SACLearner(random_head(3, settings), settings, SACConfig(), learning_rate=1e-3, seed=0)


def test_a_replay_that_never_fills_is_refused() -> None:
    settings, too_small = proxy_settings(), SACConfig(replay_bytes=2**20)
    with pytest.raises(ConfigError, match=r"never holds the 65,536"):
        SACLearner(random_head(3, settings), settings, too_small, learning_rate=1e-3, seed=0)


def test_sac_comes_close_to_the_best_that_the_restriction_allows() -> None:
    which, base, hash_before = world(), CausalLM(MODEL, num_slots=48), weights_of(MODEL)
    settings = proxy_settings(features="pre_token", top_k=4, temperature=1.0)
    torch.manual_seed(0)
    actor = new_policy(settings, ProxyLearnerConfig(), base.model).actor
    guide = ProxyGuide(base, actor, settings)
    engine = recording_engine(guide, base)
    learner = SACLearner(actor, settings, SACConfig(**QUICK), learning_rate=3e-3, seed=0)

    before = which.law(served(guide, base))
    for iteration in range(22):
        wanted = asks(32, iteration=iteration)
        episodes = collect(engine, wanted, SamplingParams(max_tokens=HORIZON), proxy="proxy")
        learner.learn(episodes, rewards_of(episodes, which).tolist())
    best = max(which.reward(one) for one, chance in before.items() if chance > 0)
    start = which.mean_reward(before)
    after = which.law(served(guide, base))
    assert which.mean_reward(after) > start + 0.85 * (best - start)
    assert weights_of(MODEL) == hash_before
