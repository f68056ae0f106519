"""A proxy as a policy: what it says of recorded decisions, and that it learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.decode.sequence import SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Step
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.train.experience import decisions
from pilotfish.train.ppo import PPOConfig
from pilotfish.train.proxy_policy import (
    ProxyLearnerConfig,
    ProxyPolicy,
    collate,
    new_policy,
    trainable_share,
)
from pilotfish.train.rollout import collect
from tests.acceptance_cases import by_recursion
from tests.enumerable import World, context_of
from tests.learning import (
    BASE,
    HORIZON,
    MODEL,
    asks,
    proxy_rollout,
    proxy_settings,
    random_policy,
    recording_engine,
    rewards_of,
    served,
    update,
    weights_of,
    world,
)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"features": "pre_token", "fallback": "top1"},
    {"p_t_rule": "cumulative", "p_t": 0.7},
    {"p_t_rule": "literal", "p_t": 0.1},
    {"candidate_order": "sample_no_repeat", "p_t": 0.9, "top_k": 8},
    {"candidate_order": "sample_no_repeat", "p_t_rule": "cumulative", "p_t": 0.5, "top_k": 6},
    {"candidate_order": "iid", "p_t_rule": "min_prob", "p_t": 0.05, "features": "pre_token"},
    {"candidate_order": "iid", "p_t_rule": "cumulative", "p_t": 0.2, "max_tries": 3},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_policy_says_of_each_token_what_the_engine_said(variant: dict[str, Any]) -> None:
    settings = proxy_settings(**variant)
    policy = random_policy(settings)
    for dtype, error in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.float16, 3e-3)):
        episodes = proxy_rollout(policy, settings, dtype=dtype)
        found, taken = policy(**collate(episodes)), decisions(episodes)
        assert taken.mask_ET.sum() > 30
        torch.testing.assert_close(
            found.logprobs_ET, taken.logprobs_ET.double(), rtol=0, atol=error
        )
        assert not found.values_ET[~taken.mask_ET].any()
        assert found.values_ET[taken.mask_ET].all()


def gradients_of(module: torch.nn.Module) -> list[Tensor]:
    return [one.grad.clone() for one in module.parameters() if one.grad is not None]


def reference(policy: ProxyPolicy, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the order `ordered`, decision by decision."""
    logprobs, entropies, start = [], [], 0
    for count, choice in zip(inputs["count_N"].tolist(), inputs["choice_N"].tolist(), strict=True):
        accept = policy.actor(inputs["features_MF"][start : start + count]).sigmoid().unbind()
        law, left = [], torch.ones((), dtype=torch.float64)
        for one in accept[:-1]:
            law.append(left * one)
            left = left * (1 - one)
        law.append(left)
        logprobs.append(law[choice].log())
        entropies.append(-sum(one * one.log() for one in law))
        start += count
    return torch.stack(logprobs), torch.stack(entropies)


def test_gradients_are_those_of_an_independent_law() -> None:
    settings = proxy_settings()
    policy = random_policy(settings)
    episodes = proxy_rollout(policy, settings)
    inputs = collate(episodes)
    mask_ET = inputs["mask_ET"]
    weights_ET = torch.randn(mask_ET.shape, dtype=torch.float64)
    found = policy(**inputs)
    (found.logprobs_ET * weights_ET + 0.1 * found.entropy_ET).sum().backward()
    gradients = gradients_of(policy.actor)
    policy.zero_grad()
    logprobs_N, entropy_N = reference(policy, inputs)
    torch.testing.assert_close(found.logprobs_ET[mask_ET], logprobs_N)
    torch.testing.assert_close(found.entropy_ET[mask_ET], entropy_N)
    (logprobs_N * weights_ET[mask_ET] + 0.1 * entropy_N).sum().backward()
    for gradient, expected in zip(gradients, gradients_of(policy.actor), strict=True):
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


def test_in_order_the_law_of_a_token_is_that_of_the_decisions_behind_it() -> None:
    """Rejects of all candidates before it, then an accept, unless it is the last: then it must."""
    settings = proxy_settings()
    policy = random_policy(settings)
    inputs = collate(proxy_rollout(policy, settings))
    found = policy(**inputs)
    logits, start, joint = policy.actor(inputs["features_MF"]), 0, []
    for count, choice in zip(inputs["count_N"].tolist(), inputs["choice_N"].tolist(), strict=True):
        own = logits[start : start + count]
        decided = torch.nn.functional.logsigmoid(-own[:choice]).sum()
        if choice < count - 1:
            decided = decided + torch.nn.functional.logsigmoid(own[choice])
        joint.append(decided)
        start += count
    torch.testing.assert_close(found.logprobs_ET[inputs["mask_ET"]], torch.stack(joint))


def test_without_replacement_the_law_of_a_token_sums_over_what_nobody_saw() -> None:
    settings = proxy_settings(candidate_order="sample_no_repeat", top_k=4, p_t=1.0)
    policy = random_policy(settings)
    inputs = collate(proxy_rollout(policy, settings))
    found = policy(**inputs)
    accept_M, start = policy.actor(inputs["features_MF"]).sigmoid(), 0
    for at, choice in enumerate(inputs["choice_N"].tolist()):
        law, _ = by_recursion(
            inputs["logprobs_NK"][at].exp().tolist(),
            accept_M[start : start + 4].tolist(),
            fallback="last",
        )
        logprob = found.logprobs_ET[inputs["mask_ET"]][at].item()
        assert logprob == pytest.approx(math.log(law[choice]), abs=1e-9)
        start += 4


@pytest.mark.parametrize("order", ["ordered", "sample_no_repeat", "iid"])
def test_a_law_that_forbids_what_was_drawn_leaves_finite_gradients(order: str) -> None:
    settings = proxy_settings(candidate_order=order)
    policy = random_policy(settings)
    inputs = collate(proxy_rollout(policy, settings))
    last = policy.actor.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    for bias in (300.0, -300.0):
        torch.nn.init.constant_(last.bias, bias)
        found = policy(**inputs)
        (found.logprobs_ET.sum() + found.entropy_ET.sum()).backward()
        assert all(gradient.isfinite().all() for gradient in gradients_of(policy))


@pytest.mark.parametrize("order", ["ordered", "sample_no_repeat", "iid"])
def test_episodes_without_decisions_teach_nothing(order: str) -> None:
    settings = proxy_settings(candidate_order=order, p_t=0.0)
    policy = random_policy(settings)
    found = policy(**collate(proxy_rollout(policy, settings)))
    assert found.logprobs_ET.shape == (12, 0)
    torch.cat(found).sum().backward()
    gradients = gradients_of(policy)
    assert len(gradients) == len(list(policy.parameters()))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("features", ["post_token", "pre_token"])
def test_an_untrained_proxy_accepts_everything_alike(features: Any) -> None:
    settings = proxy_settings(features=features)
    base = CausalLM(BASE)
    policy = new_policy(settings, ProxyLearnerConfig(initial_accept=0.7), base.model)
    contexts = [context_of((1,))]
    found = base.forward(contexts)
    step = Step(contexts, torch.ones(1), found.hidden_RD)
    judgement = ProxyGuide(base, policy.actor, settings).judge(found.logprobs_RV, step)
    torch.testing.assert_close(
        judgement.logits_NK.sigmoid(), torch.full_like(judgement.logits_NK, 0.7)
    )
    assert policy.num_trainable == sum(parameter.numel() for parameter in policy.parameters())


def test_a_proxy_that_is_not_small_is_refused() -> None:
    assert trainable_share(1_000, 100_000) == 0.01
    with pytest.raises(ConfigError, match=r"1,001 parameters, 1.00% of .*Shrink head.hidden"):
        trainable_share(1_001, 100_000)


def trained(order: str, features: str) -> tuple[World, Any, Any]:
    which, base = world(), CausalLM(MODEL, num_slots=48)
    variant: Any = {"candidate_order": order, "features": features}
    settings = proxy_settings(**variant, top_k=4, temperature=1.0)
    torch.manual_seed(0)
    policy = new_policy(settings, ProxyLearnerConfig(), base.model)
    guide = ProxyGuide(base, policy.actor, settings)
    engine = recording_engine(guide, base)

    before = which.law(served(guide, base))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    config = PPOConfig(entropy=0.0)
    for iteration in range(25):
        wanted = asks(48, iteration=iteration)
        episodes = collect(engine, wanted, SamplingParams(max_tokens=HORIZON), proxy="proxy")
        rewards_E = rewards_of(episodes, which)
        update(policy, optimizer, episodes, rewards_E, config, collate, seed=iteration)
    return which, before, which.law(served(guide, base))


@pytest.mark.parametrize(
    ("order", "features"), [("ordered", "post_token"), ("sample_no_repeat", "pre_token")]
)
def test_ppo_comes_close_to_the_best_that_the_restriction_allows(order: str, features: str) -> None:
    hash_before = weights_of(MODEL)
    which, before, after = trained(order, features)
    best = max(which.reward(one) for one, chance in before.items() if chance > 0)
    start, end = which.mean_reward(before), which.mean_reward(after)
    assert best - start > 2, "there is something to learn"
    assert end > start + 0.85 * (best - start)
    assert all(chance == 0 for one, chance in after.items() if before[one] == 0)
    assert weights_of(MODEL) == hash_before
