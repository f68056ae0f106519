"""PPO's numbers, against loops written from the papers' equations."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.config import parse
from pilotfish.errors import ConfigError
from pilotfish.train.experience import Decisions, pad_rows
from pilotfish.train.metrics import Tally
from pilotfish.train.ppo import (
    Evaluation,
    PPOConfig,
    Targets,
    estimate,
    gae,
    minibatches,
    ppo_loss,
    token_rewards,
    too_far,
    whiten,
)

LENGTHS = (4, 1, 7, 0, 3)


def ragged(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pad_rows([torch.randn(num, generator=generator, dtype=torch.float64) for num in LENGTHS])


MASK = pad_rows([torch.ones(num, dtype=torch.bool) for num in LENGTHS])
TAKEN = Decisions(MASK, -ragged(1).abs(), -ragged(2).abs())
REWARDS = torch.tensor([1.5, -2.0, 0.25, 9.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_advantages_are_the_papers_sum_over_later_errors(gamma: float, gae_lambda: float) -> None:
    rewards_ET, values_ET = ragged(3), ragged(4)
    found_ET = gae(rewards_ET, values_ET, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(LENGTHS):
        for start in range(length):
            expected = 0.0
            for at in range(start, length):
                after = values_ET[row, at + 1].item() if at + 1 < length else 0.0
                error = rewards_ET[row, at].item() + gamma * after - values_ET[row, at].item()
                expected += (gamma * gae_lambda) ** (at - start) * error
            assert found_ET[row, start].item() == pytest.approx(expected, abs=1e-12)


def test_without_discount_advantages_are_returns_less_values() -> None:
    rewards_ET, values_ET = ragged(3), ragged(4)
    returns_ET = rewards_ET.flip(1).cumsum(1).flip(1)
    found_ET = gae(rewards_ET, values_ET, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(found_ET[MASK], (returns_ET - values_ET)[MASK])


def test_the_reward_of_a_completion_counts_once() -> None:
    rewards_ET = token_rewards(REWARDS, TAKEN, beta_kl=0.3, baseline=0.75)
    kl_E = (TAKEN.logprobs_ET - TAKEN.base_logprobs_ET).sum(1)
    expected_E = (REWARDS - 0.75 - 0.3 * kl_E) * torch.tensor([num > 0 for num in LENGTHS])
    torch.testing.assert_close(rewards_ET.sum(1), expected_E)
    plain_ET = token_rewards(REWARDS, TAKEN)
    assert plain_ET.nonzero().tolist() == [[0, 3], [1, 0], [2, 6]]
    assert not rewards_ET[~MASK].any()


def test_whitening_over_two_workers_is_that_of_all_rows() -> None:
    values, parts = ragged(5), (slice(0, 2), slice(2, 5))
    whole = whiten(values, MASK)
    assert whole[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert whole[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    barrier, posted = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2

    def work(rank: int) -> Tensor:
        def total(own: Tensor) -> Tensor:
            posted[rank] = own
            barrier.wait()
            summed = posted[0] + posted[1]
            barrier.wait()
            return summed

        return whiten(values[parts[rank]], MASK[parts[rank]], total=total)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(work, range(2))))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_normalised_advantages_do_not_see_a_constant_in_the_reward() -> None:
    """With values that moved along with it, or with rewards that are whitened first."""
    values_ET = ragged(4)
    raw = PPOConfig(normalize_rewards=False, beta_kl=0.2)
    before, _ = estimate(TAKEN, REWARDS, values_ET, raw)
    after, _ = estimate(TAKEN, REWARDS + 7, values_ET + 7, raw)
    torch.testing.assert_close(after.advantages_ET, before.advantages_ET, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.returns_ET[MASK], before.returns_ET[MASK] + 7)
    whitened = PPOConfig()
    before, _ = estimate(TAKEN, REWARDS, values_ET, whitened)
    after, _ = estimate(TAKEN, 3 * REWARDS + 7, values_ET, whitened)
    torch.testing.assert_close(after.advantages_ET, before.advantages_ET, rtol=0, atol=1e-6)


def test_what_is_reported_of_a_rollout() -> None:
    config = PPOConfig(gae_lambda=1.0, normalize_rewards=False, normalize_advantages=False)
    returns_ET = token_rewards(REWARDS, TAKEN).flip(1).cumsum(1).flip(1)
    _, perfect = estimate(TAKEN, REWARDS, returns_ET, config)
    assert perfect["explained_variance"].mean == pytest.approx(1)
    targets, none = estimate(TAKEN, REWARDS, torch.ones_like(returns_ET), config)
    assert none["explained_variance"].mean == pytest.approx(0, abs=1e-12)
    kl = (TAKEN.logprobs_ET - TAKEN.base_logprobs_ET).sum().item() / len(LENGTHS)
    assert none["kl"].mean == pytest.approx(kl)
    torch.testing.assert_close(targets.returns_ET, returns_ET * MASK)
    torch.testing.assert_close(targets.advantages_ET, (returns_ET - 1) * MASK)


def random_targets() -> Targets:
    return Targets(
        mask_ET=MASK,
        logprobs_ET=TAKEN.logprobs_ET,
        values_ET=ragged(6) * MASK,
        advantages_ET=ragged(7),
        returns_ET=ragged(8),
    )


def random_evaluation() -> Evaluation:
    """Not masked on purpose: what stands on padding must not count."""
    noise = torch.Generator().manual_seed(9)
    shape = (3, *MASK.shape)
    noise_ET, entropy_ET, values_ET = torch.randn(shape, generator=noise, dtype=torch.float64)
    return Evaluation(
        (TAKEN.logprobs_ET + 0.3 * noise_ET).requires_grad_(),
        entropy_ET.abs().requires_grad_(),
        values_ET.requires_grad_(),
    )


def reference_loss(found: Evaluation, targets: Targets, config: PPOConfig) -> dict[str, float]:
    """Decision by decision, by hand."""
    names = "loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    for row, at in MASK.nonzero().tolist():
        log_ratio = (found.logprobs_ET - targets.logprobs_ET)[row, at].item()
        ratio, advantage = math.exp(log_ratio), targets.advantages_ET[row, at].item()
        clipped = min(max(ratio, 1 - config.clip), 1 + config.clip)
        policy = -min(ratio * advantage, clipped * advantage)
        value, old, wanted = (
            one[row, at].item() for one in (found.values_ET, targets.values_ET, targets.returns_ET)
        )
        error = (value - wanted) ** 2
        if config.value_clip is not None:
            near = min(max(value, old - config.value_clip), old + config.value_clip)
            error = max(error, (near - wanted) ** 2)
        entropy = found.entropy_ET[row, at].item()
        sums["policy_loss"] += policy
        sums["value_loss"] += error
        sums["entropy"] += entropy
        sums["loss"] += policy + config.value * error - config.entropy * entropy
        sums["approx_kl"] += ratio - 1 - log_ratio
        sums["clip_fraction"] += abs(ratio - 1) > config.clip
    return {name: one / sum(LENGTHS) for name, one in sums.items()}


@pytest.mark.parametrize(
    "settings", [{}, {"value_clip": 0.3}, {"clip": 0.05, "entropy": 0.2, "value": 1.5}]
)
def test_the_loss_is_the_papers_mean_over_decisions(settings: dict[str, Any]) -> None:
    config, found, targets = PPOConfig(**settings), random_evaluation(), random_targets()
    output = ppo_loss(found, targets, config)
    expected = reference_loss(found, targets, config)
    assert {name: one.mean for name, one in output.metrics.items()} == pytest.approx(expected)
    assert output.loss.item() == pytest.approx(expected["loss"])
    assert {one.count for one in output.metrics.values()} == {targets.num_units}
    output.loss.backward()
    for tensor in found:
        assert tensor.grad is not None
        assert not tensor.grad[~MASK].any()
        assert tensor.grad[MASK].any()


def test_a_value_far_from_the_rollouts_learns_nothing_more() -> None:
    """Unless it moved away from what is wanted."""
    targets = random_targets()
    far_ET = targets.values_ET + 5 * (targets.returns_ET - targets.values_ET).sign()
    wanted_ET = targets.values_ET + 9 * (targets.returns_ET - targets.values_ET).sign()
    targets = Targets(**{**_fields(targets), "returns_ET": wanted_ET})
    for clip, moves in ((None, True), (0.5, False)):
        values_ET = far_ET.clone().requires_grad_()
        found = Evaluation(targets.logprobs_ET, torch.zeros_like(values_ET), values_ET)
        ppo_loss(found, targets, PPOConfig(value_clip=clip)).loss.backward()
        assert values_ET.grad is not None
        assert bool(values_ET.grad.any()) == moves


def _fields(targets: Targets) -> dict[str, Tensor]:
    return {name: getattr(targets, name) for name in targets.__dataclass_fields__}


def test_parts_weighted_by_units_make_the_loss_of_the_whole() -> None:
    config, found, targets = PPOConfig(), random_evaluation(), random_targets()
    whole = ppo_loss(found, targets, config).loss
    total = torch.tensor(0.0, dtype=torch.float64)
    for rows in ([0, 3], [2, 1, 4], [3]):
        some = targets.select(rows)
        width = some.mask_ET.shape[1]
        part = Evaluation(*(tensor[rows, :width] for tensor in found))
        if rows != [3]:
            total = total + ppo_loss(part, some, config).loss * some.num_units
        else:
            assert ppo_loss(part, some, config).loss.item() == 0, "an episode without decisions"
    torch.testing.assert_close(total / targets.num_units, whole)


def test_learning_stops_where_the_policy_has_left_its_rollout() -> None:
    assert too_far(Tally(0.5, 10), PPOConfig(target_kl=0.04))
    assert not too_far(Tally(0.5, 10), PPOConfig(target_kl=0.06))
    assert not too_far(Tally(50, 1), PPOConfig(target_kl=None))


def test_every_epoch_takes_each_episode_once_in_an_order_of_its_own() -> None:
    config = PPOConfig(epochs=3, num_minibatches=4)
    drawn = list(minibatches(10, config, seed=[1, 2]))
    assert len(drawn) == 12
    epochs = [[*itertools.chain(*drawn[at : at + 4])] for at in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn == list(minibatches(10, config, seed=[1, 2]))
    assert drawn != list(minibatches(10, config, seed=[1, 3]))
    with pytest.raises(ConfigError, match="Collect more episodes"):
        next(minibatches(3, config, seed=[0]))


def test_a_penalty_has_the_units_of_the_reward() -> None:
    with pytest.raises(ConfigError, match="Set normalize_rewards: false"):
        parse(PPOConfig, {"beta_kl": 0.1}, source="here")
    parse(PPOConfig, {"beta_kl": 0.1, "normalize_rewards": False}, source="here")
