"""What tests of Transfer Q* share: tiny models, their contexts, and the rule without any cache."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from pilotfish.config import parse
from pilotfish.context import Context
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, TokenEvent
from pilotfish.guides.base import Step, TokenGuide
from pilotfish.guides.transfer_q import TransferQGuide
from pilotfish.guides.transfer_q_settings import TransferQSettings
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.reward import RewardModel
from tests.fakes import context, plain_logprobs, plain_reward, tiny_llama, tiny_reward_model

BASE, RHO = tiny_llama(1), tiny_llama(2)
REWARD, BASELINE = tiny_reward_model(3), tiny_reward_model(4)
END, V = frozenset({0}), 16


def settings(**changes: Any) -> TransferQSettings:
    return parse(TransferQSettings, {"rollout": "", "reward": "", **changes}, source="test")


def indirect(**changes: Any) -> TransferQSettings:
    return settings(mode="indirect", baseline_reward="", beta=0.7, **changes)


def new_guide(
    config: TransferQSettings,
    *,
    num_slots: int = 64,
    baseline: LlamaForSequenceClassification = BASELINE,
    end: frozenset[int] = END,
) -> TransferQGuide:
    second = RewardModel(baseline, num_slots=num_slots) if config.mode == "indirect" else None
    return TransferQGuide(
        CausalLM(RHO, num_slots=num_slots),
        RewardModel(REWARD, num_slots=num_slots),
        second,
        settings=config,
        end_ids=end,
    )


def tilt(
    guide: TokenGuide,
    contexts: Sequence[Context],
    laws: Tensor,
    weight: float = 1.0,
    notes: dict[str, Tensor] | None = None,
) -> Tensor:
    weights = torch.full((len(contexts),), weight, dtype=torch.float64)
    step = Step(contexts, weights, notes={} if notes is None else notes)
    return guide.tilt(laws, step, guide.begin(contexts))


def texts(seed: int, count: int = 4) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, V) for _ in range(rng.randrange(2, 15))] for _ in range(count)]


def rows(seed: int, count: int = 4) -> tuple[list[Context], Tensor]:
    contexts = [context(key, ids) for key, ids in enumerate(texts(seed, count))]
    return contexts, torch.stack([plain_logprobs(BASE, one.token_ids) for one in contexts])


def plain_rollout(
    token_ids: list[int],
    length: int,
    *,
    model: LlamaForCausalLM = RHO,
    end: frozenset[int] = END,
) -> list[int]:
    """The greedy continuation of a text that has not ended, token by token."""
    ids = list(token_ids)
    while ids[-1] not in end and len(ids) < len(token_ids) + length:
        ids.append(int(plain_logprobs(model, ids).argmax()))
    return ids


def direct_law(
    base: Tensor, ids: list[int], *, k: int, w: float, length: int, end: frozenset[int] = END
) -> Tensor:
    """The paper's rule: one greedy rollout per candidate, each read from its beginning."""
    law = torch.full_like(base, -torch.inf)
    for token in base.topk(k).indices.tolist():
        text = plain_rollout([*ids, token], length, end=end)
        law[token] = base[token] + w * plain_reward(REWARD, text)
    return law.log_softmax(-1)


def law_over(*tokens: int) -> Tensor:
    """All of these tokens alike, and nothing else [1, V]."""
    law = torch.full((1, V), -torch.inf, dtype=torch.float64)
    law[0, list(tokens)] = -math.log(len(tokens))
    return law


def run(
    guides: Mapping[str, TokenGuide], requests: list[Request], base: CausalLM | None = None
) -> dict[int, list[TokenEvent]]:
    """Decode the requests together."""
    engine = Engine(base or CausalLM(BASE, num_slots=8), guides, end_ids=END)
    for one in requests:
        engine.submit(one)
    events: dict[int, list[TokenEvent]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.key, []).append(event)
    return events


def num_forwards(guide: TransferQGuide) -> tuple[int, int]:
    """Forwards so far: of the rollout model, and of the (first) reward model."""
    lm, reward = guide._rollout, guide._readers[0]
    assert isinstance(lm, CausalLM)
    assert isinstance(reward, RewardModel)
    return lm.num_forwards, reward.num_forwards
