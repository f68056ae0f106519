"""Worlds, rollouts and a plain update loop that tests of learning from reward share."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import SamplingParams
from pilotfish.guides.base import Step
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.heads import AcceptHead, HeadSettings
from pilotfish.train.experience import Episode, decisions
from pilotfish.train.metrics import Tally, add
from pilotfish.train.ppo import PPOConfig, estimate, minibatches, ppo_loss, too_far
from pilotfish.train.proxy_policy import ProxyPolicy
from pilotfish.train.recording import RecordingProxy
from pilotfish.train.rollout import Ask, collect, rollout_seed
from tests.enumerable import PROMPT, Policy, Prefix, World, context_of, random_reward
from tests.fakes import plain_logprobs, random_head, tiny_llama

BASE = tiny_llama(1).requires_grad_(False)

HORIZON = 3
MODEL = tiny_llama(21, vocab_size=4).requires_grad_(False)
"""A base whose completions of `HORIZON` tokens can be enumerated."""

Collate = Callable[[Sequence[Episode]], Mapping[str, Tensor]]


@cache
def _law(model: LlamaForCausalLM, prefix: Prefix) -> Tensor:
    return plain_logprobs(model, [*PROMPT.token_ids, *prefix])


def world(seed: int = 5) -> World:
    """The completions of `MODEL`, and a random reward of each."""
    return World(4, HORIZON, lambda prefix: _law(MODEL, prefix), random_reward(seed, vocab_size=4))


def proxy_settings(**variant: Any) -> ProxySettings:
    return ProxySettings(**{"head": HeadSettings(hidden=(24,), activation="tanh"), **variant})


def random_policy(settings: ProxySettings) -> ProxyPolicy:
    """A policy for tiny models whose laws and values are spread out."""
    torch.manual_seed(4)
    critic = AcceptHead(HeadSettings(hidden=(4,)), block_sizes=[32]).double()
    return ProxyPolicy(random_head(3, settings), critic, settings)


def served(guide: ProxyGuide, base: CausalLM) -> Policy:
    """The law that a proxy serves, prefix by prefix."""

    def law(prefix: Prefix) -> Tensor:
        contexts = [context_of(prefix, key=10**6)]
        found = base.forward(contexts)
        step = Step(contexts, torch.ones(1, dtype=torch.float64), found.hidden_RD)
        return guide.tilt(found.logprobs_RV, step, None)[0]

    return law


def recording_engine(
    guide: ProxyGuide, base: CausalLM, *, dtype: torch.dtype = torch.float16, **settings: Any
) -> Engine:
    return Engine(base, {"proxy": RecordingProxy(guide, dtype=dtype)}, **settings)


def asks(
    num: int, *, seed: int = 0, iteration: int = 0, prompts: Sequence[Prompt] = (PROMPT,)
) -> list[Ask]:
    """So many completions of every prompt."""
    return [
        Ask(prompt, rollout_seed(seed, iteration=iteration, prompt=place, sample=sample))
        for place, prompt in enumerate(prompts)
        for sample in range(num)
    ]


def proxy_rollout(
    policy: ProxyPolicy, settings: ProxySettings, *, dtype: torch.dtype = torch.float16
) -> list[Episode]:
    """A dozen short completions of several prompts."""
    base = CausalLM(BASE, num_slots=8)
    engine = recording_engine(ProxyGuide(base, policy.actor, settings), base, dtype=dtype)
    prompts = [Prompt([(5 * i) % 16, 2, i + 1]) for i in range(4)]
    return collect(engine, asks(3, prompts=prompts), SamplingParams(max_tokens=6), proxy="proxy")


def rewards_of(episodes: Sequence[Episode], which: World) -> Tensor:
    return torch.tensor([which.reward(tuple(one.completion_ids.tolist())) for one in episodes])


def weights_of(model: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    rewards_E: Tensor,
    config: PPOConfig,
    collate: Collate,
    *,
    seed: int = 0,
) -> dict[str, Tally]:
    """One worker's update on one rollout."""
    with torch.no_grad():
        values_ET = policy(**collate(episodes)).values_ET
    targets, metrics = estimate(decisions(episodes), rewards_E, values_ET, config)
    for rows in minibatches(len(episodes), config, seed=[seed]):
        some = targets.select(rows)
        found = policy(**collate([episodes[row] for row in rows]))
        output = ppo_loss(found, some, config)
        if too_far(output.metrics["approx_kl"], config):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        metrics = add(metrics, output.metrics)
    return metrics
