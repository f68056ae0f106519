"""A whole LM as a policy: it says what the engine says, and the engine follows its updates."""

from typing import Any

import pytest
import torch

from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import SamplingParams
from pilotfish.models.causal_lm import CausalLM
from pilotfish.train.experience import Episode, decisions
from pilotfish.train.lm_policy import LMPolicy, actor_engine, collate, with_reference
from pilotfish.train.ppo import PPOConfig
from pilotfish.train.rollout import collect
from tests.enumerable import PROMPT, Policy, Prefix, World
from tests.fakes import plain_logprobs, plain_reward, tiny_llama, tiny_reward_model
from tests.learning import HORIZON, MODEL, asks, rewards_of, update, weights_of, world

PROMPTS = [Prompt([(5 * i) % 16, *range(i), 2]) for i in range(4)]
END = frozenset([3])


def new_policy(**settings: Any) -> LMPolicy:
    actor = tiny_llama(1, **settings)
    return LMPolicy(actor, tiny_reward_model(2, **settings).requires_grad_(True))


def rollout(policy: LMPolicy, *, num_tokens: int = 7) -> list[Episode]:
    engine = actor_engine(policy.actor, num_slots=5, end_ids=END)
    return collect(engine, asks(2, prompts=PROMPTS), SamplingParams(max_tokens=num_tokens))


def texts(episode: Episode) -> list[list[int]]:
    """What was read before each token of the completion."""
    ids = [*episode.prompt_ids.tolist(), *episode.completion_ids.tolist()]
    return [ids[:at] for at in range(len(episode.prompt_ids), len(ids))]


def test_the_policy_says_of_each_token_what_engine_and_plain_forwards_say() -> None:
    policy = new_policy()
    episodes = rollout(policy)
    assert len({len(one.completion_ids) for one in episodes}) > 1
    found, taken = policy(**collate(episodes)), decisions(episodes)
    torch.testing.assert_close(
        found.logprobs_ET, taken.logprobs_ET.double(), rtol=0, atol=1e-6, check_dtype=False
    )
    for row, episode in enumerate(episodes):
        for at, seen in enumerate(texts(episode)):
            law = plain_logprobs(tiny_llama(1), seen)
            token = episode.completion_ids[at]
            assert found.logprobs_ET[row, at].item() == pytest.approx(law[token].item(), abs=1e-9)
            entropy = torch.special.entr(law.exp()).sum().item()
            assert found.entropy_ET[row, at].item() == pytest.approx(entropy, abs=1e-9)
            value = plain_reward(tiny_reward_model(2), seen)
            assert found.values_ET[row, at].item() == pytest.approx(value, abs=1e-9)
    behind = ~taken.mask_ET
    assert not any(tensor[behind].any() for tensor in found)


def test_gradients_are_those_of_a_plain_forward() -> None:
    policy = new_policy()
    [episode] = rollout(policy)[:1]
    policy(**collate([episode])).logprobs_ET.sum().backward()
    found = [parameter.grad for parameter in policy.actor.parameters()]
    other = tiny_llama(1)
    ids = torch.tensor([[*episode.prompt_ids, *episode.completion_ids]])
    logprobs = other(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    picked = logprobs.gather(1, ids[0, 1:, None])[len(episode.prompt_ids) - 1 :]
    picked.sum().backward()
    for gradient, parameter in zip(found, other.parameters(), strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad)


def test_episodes_are_measured_against_a_reference() -> None:
    reference = tiny_llama(3)
    episodes = rollout(new_policy())
    for batch_size in (3, 100):
        for episode in with_reference(episodes, reference, batch_size=batch_size):
            for at, seen in enumerate(texts(episode)):
                expected = plain_logprobs(reference, seen)[episode.completion_ids[at]].item()
                assert episode.base_logprobs_N[at] == pytest.approx(expected, abs=1e-5)
    assert (decisions(episodes).logprobs_ET == decisions(episodes).base_logprobs_ET).all()


def test_a_padded_vocabulary_is_cut_as_in_the_engine() -> None:
    policy = LMPolicy(tiny_llama(1), tiny_reward_model(2), vocab_size=11)
    engine = actor_engine(policy.actor, num_slots=5, end_ids=END, vocab_size=11)
    prompts = [Prompt([1, 2]), Prompt([7])]
    episodes = collect(engine, asks(2, prompts=prompts), SamplingParams(max_tokens=5))
    found, taken = policy(**collate(episodes)), decisions(episodes)
    torch.testing.assert_close(
        found.logprobs_ET, taken.logprobs_ET, rtol=0, atol=1e-6, check_dtype=False
    )
    [cut, *_] = with_reference(episodes, policy.actor, batch_size=9, vocab_size=11)
    assert cut.base_logprobs_N == pytest.approx(cut.logprobs_N, abs=1e-5)


def test_rollouts_after_an_update_are_drawn_from_the_new_weights() -> None:
    """Also from layers large enough to be packed, and training sees these very weights."""
    large: Any = {"vocab_size": 4096, "dtype": torch.float32}
    policy = new_policy(**large)
    weight = policy.actor.lm_head.weight
    frozen = CausalLM(tiny_llama(1, **large).requires_grad_(False), num_slots=5)
    for _ in range(2):
        episodes = rollout(policy)
        found = policy(**collate(episodes)).logprobs_ET
        torch.testing.assert_close(found, decisions(episodes).logprobs_ET, rtol=0, atol=1e-4)
        found.sum().backward()
        assert weight.grad is not None
        assert weight.grad.any()
        with torch.no_grad():
            for module in (policy.actor, frozen.model):
                for parameter in module.parameters():
                    parameter.mul_(1.1)
    # What would happen with weights that were packed: the law of no model at all.
    stale = collect(Engine(frozen), asks(2, prompts=PROMPTS), SamplingParams(max_tokens=7))
    error = policy(**collate(stale)).logprobs_ET - decisions(stale).logprobs_ET
    assert error.abs().max() > 0.1


def learned(which: World, config: PPOConfig) -> Policy:
    """What comes of the base by PPO."""
    actor = tiny_llama(21, vocab_size=4)
    policy = LMPolicy(actor, tiny_reward_model(2, vocab_size=4).requires_grad_(True))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for iteration in range(25):
        engine = actor_engine(actor, num_slots=48, end_ids=frozenset())
        wanted = asks(48, iteration=iteration)
        episodes = collect(engine, wanted, SamplingParams(max_tokens=HORIZON))
        episodes = with_reference(episodes, MODEL, batch_size=48)
        policy.train()
        rewards_E = rewards_of(episodes, which)
        update(policy, optimizer, episodes, rewards_E, config, collate, seed=iteration)
    return lambda prefix: plain_logprobs(actor, [*PROMPT.token_ids, *prefix])


@pytest.mark.parametrize("beta_kl", [0.0, 0.5])
def test_ppo_comes_close_to_the_optimum_of_reward_less_penalty(beta_kl: float) -> None:
    which, hash_before = world(), weights_of(MODEL)
    config = PPOConfig(entropy=0.0, normalize_rewards=False, beta_kl=beta_kl)
    policy = learned(which, config)

    def objective(law: dict[Prefix, float]) -> float:
        return which.mean_reward(law) - beta_kl * which.kl_of(law)

    start = objective(which.law(which.base))
    best = objective(which.optimal_law(beta_kl or 1e-3))
    # One that ignored the penalty would get less than a third of what there is.
    assert objective(which.law(policy)) > start + 0.7 * (best - start)
    assert best > start + 0.5
    assert weights_of(MODEL) == hash_before
