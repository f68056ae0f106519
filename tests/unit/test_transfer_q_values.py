"""Values of tokens from the rewards of rollouts: what is an expectation, and what is not."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.guides.transfer_q import (
    TransferQGuide,
    direct_values,
    indirect_values,
    published_indirect_values,
)
from pilotfish.models.causal_lm import CausalLM
from tests.enumerable import (
    TabularLM,
    TabularReward,
    World,
    context_of,
    greedy,
    guided,
    random_policy,
    random_reward,
    random_world,
)
from tests.fakes import (
    plain_reward,
)
from tests.transfer_q import (
    BASELINE,
    END,
    REWARD,
    RHO,
    V,
    indirect,
    law_over,
    new_guide,
    rows,
    settings,
    tilt,
)


def integer_world(beta: float) -> tuple[World, dict[tuple[int, ...], int], Any]:
    """A world in which the baseline's law is a count of each trajectory over their sum.

    The base is uniform and `r_BL = beta log count`, so equation (1) gives counts.
    """
    rng, reward = random.Random(1), random_reward(8, vocab_size=3, horizon=3)

    def uniform(prefix: tuple[int, ...]) -> Tensor:
        return torch.full((3,), -math.log(3), dtype=torch.float64)

    world = World(3, 3, uniform, reward)
    counts = {one: rng.randrange(1, 6) for one in world.trajectories()}
    return world, counts, lambda one: beta * math.log(counts[one])


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_self_normalised_weights_give_the_target_expectation_and_others_do_not(beta) -> None:
    """Every trajectory as often as the baseline writes it: the estimate is its expectation."""
    world, counts, baseline = integer_world(beta)
    written = [one for one, count in counts.items() for _ in range(count)]
    law = replace(world, reward=baseline).optimal_law(beta)
    assert law == pytest.approx({one: n / len(written) for one, n in counts.items()}, abs=1e-12)
    rewards = torch.tensor([world.reward(one) for one in written], dtype=torch.float64)
    baselines = torch.tensor([baseline(one) for one in written], dtype=torch.float64)
    target = world.mean_reward(world.optimal_law(beta))
    found, ess = indirect_values(rewards, baselines, beta)
    assert found.item() == pytest.approx(target, abs=1e-12)
    assert 1 <= ess.item() < len(written)
    assert abs(direct_values(rewards).item() - target) > 0.02
    unnormalised = (((rewards - baselines) / beta).exp() * rewards).mean().item()
    assert abs(unnormalised - target) > 0.1
    assert abs(published_indirect_values(rewards, baselines).item() - target) > 0.1


def test_equal_rewards_have_equal_weights_and_unequal_ones_few_samples() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(3, 8, dtype=torch.float64)
    found, ess = indirect_values(rewards, rewards + 5.0, 0.1)
    torch.testing.assert_close(found, direct_values(rewards))
    torch.testing.assert_close(ess, torch.full((3,), 8.0, dtype=torch.float64))
    far = rewards.index_add(1, torch.tensor([2]), torch.full((3, 1), 900.0, dtype=torch.float64))
    found, ess = indirect_values(far, rewards, 1.0)
    torch.testing.assert_close(found, far[:, 2])
    torch.testing.assert_close(ess, torch.ones(3, dtype=torch.float64))


def test_with_the_same_reward_twice_indirect_is_direct() -> None:
    contexts, laws = rows(7)
    same = new_guide(indirect(num_candidates=4, num_rollouts=5, rollout_tokens=3), baseline=REWARD)
    plain = new_guide(settings(num_candidates=4, num_rollouts=5, rollout_tokens=3))
    torch.testing.assert_close(tilt(same, contexts, laws, 2.0), tilt(plain, contexts, laws, 2.0))
    other = new_guide(indirect(num_candidates=4, num_rollouts=5, rollout_tokens=3))
    assert not tilt(other, contexts, laws, 2.0).allclose(tilt(plain, contexts, laws, 2.0))


def test_deterministic_rollouts_have_the_same_mean_however_many() -> None:
    world = random_world(5, vocab_size=3, horizon=4)
    rho = TabularLM(greedy(random_policy(6, vocab_size=3, horizon=4)), horizon=4)
    reward = TabularReward(world.reward, horizon=4)
    single = TransferQGuide(rho, reward, settings=settings())
    several = TransferQGuide(rho, reward, settings=settings(num_rollouts=5))
    for prefix in world.prefixes():
        torch.testing.assert_close(
            guided(several, world.base, 1.3)(prefix), guided(single, world.base, 1.3)(prefix)
        )


def sampled_texts(one: Context, token: int, *, count: int, length: int) -> list[list[int]]:
    """What the guide rolls out for one candidate, one at a time: the draws are counted."""
    found: list[list[int]] = []

    class Spy:
        max_length = 256

        def rewards(self, contexts: Sequence[Context]) -> Tensor:
            found.extend(list(text.token_ids) for text in contexts)
            return torch.zeros(len(contexts))

        def release(self, keys: Sequence[int]) -> None: ...

    config = settings(num_candidates=1, num_rollouts=count, rollout_tokens=length)
    guide = TransferQGuide(CausalLM(RHO), Spy(), settings=config, end_ids=END)
    tilt(guide, [one], law_over(token))
    return found[1:]  # the first is the context itself


def test_indirect_values_in_the_guide_are_those_of_its_rollouts() -> None:
    contexts, laws = rows(8)
    config = indirect(num_candidates=4, num_rollouts=6, rollout_tokens=3)
    notes: dict[str, Tensor] = {}
    found = tilt(new_guide(config), contexts, laws, 1.5, notes=notes)
    for row, one in enumerate(contexts):
        expected, sizes = torch.full((V,), -torch.inf, dtype=torch.float64), []
        for token in laws[row].topk(4).indices.tolist():
            drawn = sampled_texts(one, token, count=6, length=3)
            drawn = drawn if token not in END else [[*one.token_ids, token]] * 6
            r = [plain_reward(REWARD, ids) for ids in drawn]
            masses = [
                math.exp((a - plain_reward(BASELINE, ids)) / 0.7)
                for a, ids in zip(r, drawn, strict=True)
            ]
            value = sum(m * a for m, a in zip(masses, r, strict=True)) / sum(masses)
            expected[token] = laws[row, token] + 1.5 * value
            sizes.append(sum(masses) ** 2 / sum(m * m for m in masses))
        torch.testing.assert_close(found[row], expected.log_softmax(-1))
        assert notes["ess"][row].item() == pytest.approx(sum(sizes) / 4, abs=1e-9)
    assert notes["ess"].shape == (4,)


def test_each_candidate_and_each_rollout_has_draws_of_its_own_from_the_seed_and_the_text() -> None:
    contexts, laws = rows(11, 3)
    config = settings(num_candidates=4, num_rollouts=3, rollout_tokens=4)
    found = tilt(new_guide(config), contexts, laws)
    renamed = [Context(50 + at, one.prompt, one.token_ids) for at, one in enumerate(contexts)]
    torch.testing.assert_close(tilt(new_guide(config), renamed[::-1], laws.flip(0)).flip(0), found)
    seeded = config.model_copy(update={"seed": 1})
    assert not tilt(new_guide(seeded), contexts, laws).allclose(found)
    drawn = sampled_texts(contexts[0], 5, count=20, length=4)
    assert len(set(map(tuple, drawn))) > 10


def test_neither_candidates_nor_texts_share_their_draws() -> None:
    """With a law that does not look back, equal draws would give equal continuations."""
    law = torch.zeros(V, dtype=torch.float64).log_softmax(-1)
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}

    def reward(prefix: tuple[int, ...]) -> float:
        if len(prefix) > 1:
            seen[prefix[:2]] = prefix[2:]
        return 0.0

    guide = TransferQGuide(
        TabularLM(lambda prefix: law, horizon=9),
        TabularReward(reward, horizon=9),
        settings=settings(num_candidates=V, rollout_temperature=1.0),
    )
    tilt(guide, [context_of((1,), key=0), context_of((2,), key=1)], law.expand(2, -1))
    assert len(seen) == len(set(seen.values())) == 2 * V
