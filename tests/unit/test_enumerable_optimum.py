"""The KL-regularised optimum on worlds small enough to enumerate, and who reaches it."""

import math

import pytest
import torch

from pilotfish.guides.args_search import ARGSGuide
from pilotfish.guides.controlled_decoding import ControlledDecodingGuide
from pilotfish.guides.genarm import GenARMGuide
from tests.enumerable import (
    Policy,
    Prefix,
    TabularLM,
    TabularReward,
    World,
    greedy,
    guided,
    random_policy,
    random_world,
)

WORLDS = [
    random_world(1),
    random_world(2, vocab_size=4, horizon=4),
    random_world(3, vocab_size=4, horizon=3, end_id=0),
]
worlds = pytest.mark.parametrize("world", WORLDS, ids=["small", "large", "ending"])
BETAS = (0.2, 1.0, 5.0)


def soft_value_lm(world: World, beta: float) -> TabularLM:
    """The guide LM `softmax_v V(sv) / beta`: normalised soft values, without the base."""

    def policy(prefix: Prefix) -> torch.Tensor:
        values = [world.soft_value((*prefix, token), beta) for token in range(world.vocab_size)]
        return (torch.tensor(values, dtype=torch.float64) / beta).log_softmax(-1)

    return TabularLM(policy, horizon=world.horizon)


def assert_same_law(found: dict[Prefix, float], expected: dict[Prefix, float]) -> None:
    assert found == pytest.approx(expected, abs=1e-12)


@worlds
def test_trajectories_are_a_partition_that_every_policy_sums_to_one_over(world: World) -> None:
    other = random_policy(9, vocab_size=world.vocab_size, horizon=world.horizon)
    for policy in (world.base, other, greedy(other)):
        assert math.fsum(world.law(policy).values()) == pytest.approx(1, abs=1e-12)
    if world.end_id is None:
        assert len(world.trajectories()) == world.vocab_size**world.horizon
    else:  # 0, three by 0, nine by all of four
        assert len(world.trajectories()) == 1 + 3 + 9 * 4


@worlds
@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_by_tokens_is_the_optimum_by_trajectories(world: World, beta: float) -> None:
    policy = world.optimal_policy(beta)
    for prefix in world.prefixes():
        assert policy(prefix).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert_same_law(world.law(policy), world.optimal_law(beta))


@worlds
def test_the_optimum_maximises_its_objective(world: World) -> None:
    """The objective at (1) is V of the empty prefix, and no policy nearby has more."""
    beta = 0.7
    best = world.optimal_policy(beta)

    def objective(policy: Policy) -> float:
        return world.expected_reward(policy) - beta * world.kl(policy)

    assert objective(best) == pytest.approx(world.soft_value((), beta), abs=1e-12)
    for seed in range(5):
        noise = random_policy(seed, vocab_size=world.vocab_size, horizon=world.horizon)
        for size in (1e-3, 1.0):

            def nearby(prefix: Prefix, noise=noise, size=size) -> torch.Tensor:
                return (best(prefix) + size * noise(prefix)).log_softmax(-1)

            assert objective(nearby) < objective(best)


@worlds
@pytest.mark.parametrize("beta", BETAS)
def test_genarm_with_soft_values_is_the_optimum(world: World, beta: float) -> None:
    guide = GenARMGuide(soft_value_lm(world, beta))
    assert_same_law(world.law(guided(guide, world.base, 1.0)), world.optimal_law(beta))


@worlds
@pytest.mark.parametrize("beta", BETAS)
def test_controlled_decoding_with_the_soft_value_is_the_optimum(world: World, beta: float) -> None:
    value = TabularReward(lambda prefix: world.soft_value(prefix, beta), horizon=world.horizon)
    guide = ControlledDecodingGuide(value, num_candidates=None)
    assert_same_law(world.law(guided(guide, world.base, 1 / beta)), world.optimal_law(beta))
    assert_same_law(world.law(guided(guide, world.base, 0.0)), world.law(world.base))


@worlds
def test_with_the_mean_value_it_is_not(world: World) -> None:
    """Expected and soft values agree as beta grows, and only then: the fake tells them apart."""
    value = TabularReward(
        lambda prefix: world.expected_reward(world.base, prefix), horizon=world.horizon
    )
    guide = ControlledDecodingGuide(value, num_candidates=None)

    def distance(beta: float) -> float:
        found, best = world.law(guided(guide, world.base, 1 / beta)), world.optimal_law(beta)
        return sum(abs(found[one] - best[one]) for one in best) / 2

    assert distance(0.5) > 0.02
    assert distance(1000.0) < 1e-5


def contenders(world: World) -> list[Policy]:
    """Policies of every kind, weak and strong, deterministic ones among them."""
    value = TabularReward(
        lambda prefix: world.expected_reward(world.base, prefix), horizon=world.horizon
    )
    reward = TabularReward(world.reward, horizon=world.horizon)
    noise = random_policy(7, vocab_size=world.vocab_size, horizon=world.horizon)
    found = [noise, greedy(noise), greedy(world.base)]
    for weight in (-1.0, 0.5, 2.0, 8.0):
        found += [
            guided(ControlledDecodingGuide(value, num_candidates=None), world.base, weight),
            guided(ARGSGuide(reward, num_candidates=2), world.base, weight),
            guided(ARGSGuide(reward, num_candidates=world.vocab_size), world.base, weight),
            guided(GenARMGuide(soft_value_lm(world, 0.5)), world.base, weight),
        ]
    return found + [greedy(policy) for policy in found[3:]]


@worlds
def test_nobody_earns_more_than_the_optimum_at_the_same_kl(world: World) -> None:
    shortfalls = [
        world.best_reward_at_kl(world.kl(policy)) - world.expected_reward(policy)
        for policy in contenders(world)
    ]
    assert min(shortfalls) > -1e-9
    assert max(shortfalls) > 0.3  # the bound is above some of them by far: it can tell


@worlds
@pytest.mark.parametrize("beta", BETAS)
def test_the_bound_is_what_the_optimum_earns(world: World, beta: float) -> None:
    best = world.optimal_policy(beta)
    bound = world.best_reward_at_kl(world.kl(best))
    assert world.expected_reward(best) == pytest.approx(bound, abs=1e-9)
