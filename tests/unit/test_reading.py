"""Readings of prompts: the guided law at every token that is there already, in any chunks."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.chat import Message
from pilotfish.context import Context, Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import (
    FinishReason,
    PromptEvent,
    Reading,
    Request,
    SamplingParams,
    TokenEvent,
)
from pilotfish.errors import PromptError
from pilotfish.guides.args_search import ARGSGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.own_template import OwnTemplate
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models import body
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.reward import RewardModel, RewardReading
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import (
    plain_logprobs,
    plain_reward,
    random_head,
    request,
    tiny_llama,
    tiny_reward_model,
)

BASE, ARM, REWARD = tiny_llama(1).requires_grad_(False), tiny_llama(2), tiny_reward_model(3)
PROXY = ProxySettings.model_validate(
    {"p_t": 0.9, "top_k": 6, "head": {"hidden": [24], "activation": "tanh"}}
)
HEAD = random_head(3, PROXY)
TEXT = [3, 14, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]
TOP = 4

CHAINS: dict[str, dict[str, float]] = {
    "base": {},
    "genarm": {"arm": 0.8},
    "args": {"args": 1.5},
    "proxy": {"proxy": 1.0},
    "mix": {"arm": 0.5, "args": -0.7, "proxy": 1.0},
    "narrowed twice": {"args": 0.7, "proxy": 1.0},
}


def new_engine(**settings: Any) -> Engine:
    base = CausalLM(BASE, num_slots=4)
    guides = {
        "arm": GenARMGuide(CausalLM(ARM, num_slots=4)),
        "args": ARGSGuide(RewardModel(REWARD, num_slots=4), num_candidates=5),
        "proxy": ProxyGuide(base, HEAD, PROXY),
    }
    return Engine(base, guides, end_ids=frozenset({0}), **settings)


def chain_law(ids: list[int], weights: Mapping[str, float]) -> Tensor:
    """The guided law behind some ids, from formulas and plain forwards without any cache."""
    rules = {"arm": genarm_law, "args": args_law, "proxy": proxy_law}
    law = plain_logprobs(BASE, ids)
    for name, weight in weights.items():
        law = rules[name](law, ids, weight).log_softmax(-1)
    return law


def genarm_law(law: Tensor, ids: list[int], weight: float) -> Tensor:
    """GenARM, equation (5)."""
    return law + weight * plain_logprobs(ARM, ids)


def args_law(law: Tensor, ids: list[int], weight: float) -> Tensor:
    """ARGS, its score over the top k."""
    tilted = torch.full_like(law, -torch.inf)
    for token in law.topk(5).indices.tolist():
        tilted[token] = law[token] + weight * plain_reward(REWARD, [*ids, token])
    return tilted


@torch.no_grad()
def proxy_law(law: Tensor, ids: list[int], weight: float) -> Tensor:
    """Candidates in order of probability, each accepted or rejected; the last one is the rest's."""
    ranked = [t for t in law.argsort(descending=True)[: PROXY.top_k].tolist() if law[t] > -math.inf]
    mass = law[ranked].softmax(0).tolist()
    kept = next((n for n in range(1, len(mass)) if sum(mass[:n]) >= PROXY.p_t), len(mass))
    offered = (law[ranked[:kept]] / PROXY.temperature).log_softmax(0).tolist()
    chances, left = torch.zeros_like(law), 1.0
    for place, token in enumerate(ranked[:kept]):
        hidden = BASE.model(input_ids=torch.tensor([[*ids, token]])).last_hidden_state[0, -1]
        features = torch.cat([hidden, torch.tensor([offered[place]], dtype=torch.float64)])
        accept = 1.0 if place == kept - 1 else HEAD(features).sigmoid().item()
        chances[token] = left * accept
        left *= 1 - accept
    return chances.log()


def check(readings: Sequence[Reading], first: int, ids: list[int], chain: str) -> None:
    for at, reading in enumerate(readings, first):
        law, base = chain_law(ids[:at], CHAINS[chain]), plain_logprobs(BASE, ids[:at])
        assert reading.token_id == ids[at]
        assert reading.logprob == pytest.approx(law[ids[at]].item(), abs=1e-9)
        assert reading.base_logprob == pytest.approx(base[ids[at]].item(), abs=1e-9)
        terms = law.exp() * (law - base)
        assert reading.kl == pytest.approx(terms[law > -torch.inf].sum().item(), abs=1e-9)
        best = [t for t in law.argsort(descending=True)[:TOP].tolist() if law[t] > -torch.inf]
        assert [one.token_id for one in reading.top] == best
        assert [one.logprob for one in reading.top] == pytest.approx(law[best].tolist(), abs=1e-9)
        assert [one.base_logprob for one in reading.top] == pytest.approx(base[best].tolist())


def drain(engine: Engine) -> tuple[dict[int, list[PromptEvent]], dict[int, list[TokenEvent]]]:
    """Step until nothing is left; readings come in order, and before tokens."""
    read: dict[int, list[PromptEvent]] = {}
    drawn: dict[int, list[TokenEvent]] = {}
    while engine.busy:
        tokens = engine.step()
        for event in engine.take_readings():
            assert event.key not in drawn
            read.setdefault(event.key, []).append(event)
        for token in tokens:
            drawn.setdefault(token.key, []).append(token)
    for events in read.values():
        for event, following in itertools.pairwise(events):
            assert following.first == event.first + len(event.readings)
    return read, drawn


def readings_of(events: Sequence[PromptEvent]) -> list[Reading]:
    return [reading for event in events for reading in event.readings]


@pytest.mark.parametrize(
    ("settings", "siblings"),
    [({}, 512), ({"read_budget": 1}, 512), ({"read_budget": 7, "prefill_budget": 4}, 12)],
)
def test_every_reading_is_the_chains_law_behind_the_tokens_before_it(
    settings: dict[str, int], siblings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunks, all chains together, beside requests that decode and read nothing."""
    monkeypatch.setattr(body, "_SIBLINGS", siblings)
    engine = new_engine(**settings)
    params: dict[str, Any] = {"top_logprobs": TOP, "ignore_eos": True}
    for key, weights in enumerate(CHAINS.values()):
        ids = [*TEXT[key:], *TEXT[:key]]
        asked = request(key, ids, guides=weights, max_tokens=key % 3, **params)
        engine.submit(replace(asked, read_from=0 if key % 2 else 9))
        engine.submit(request(100 + key, ids, guides=weights, max_tokens=5, **params))
    read, drawn = drain(engine)
    alone = new_engine()
    for key, chain in enumerate(CHAINS):
        ids = [*TEXT[key:], *TEXT[:key]]
        assert read[key][0].first == (1 if key % 2 else 9)
        readings = readings_of(read[key])
        assert len(readings) == len(ids) - read[key][0].first
        check(readings, read[key][0].first, ids, chain)
        reasons = [event.finish_reason for event in read[key]]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] is (FinishReason.LENGTH if key % 3 == 0 else None)
        alone.submit(request(key, ids, guides=CHAINS[chain], max_tokens=5, **params))
    tokens = {key: [event.token_id for event in path] for key, path in drain(alone)[1].items()}
    for key in range(len(CHAINS)):
        assert [e.token_id for e in drawn.get(key, [])] == tokens[key][: key % 3]
        assert [e.token_id for e in drawn[100 + key]] == tokens[key]


def scored(key: int, ids: list[int], read_from: int, **settings: Any) -> Request:
    """A request that reads, and draws no token unless asked to."""
    return replace(request(key, ids, **{"max_tokens": 0, **settings}), read_from=read_from)


def test_guides_see_a_prompt_that_ends_before_the_token_that_is_read() -> None:
    engine, seen = new_engine(read_budget=5), []
    guide = engine.guides["arm"]
    begin = guide.begin

    def note(contexts: Sequence[Context]) -> Any:
        seen.extend((list(one.prompt.token_ids), list(one.token_ids)) for one in contexts)
        return begin(contexts)

    guide.begin = note
    engine.submit(scored(1, TEXT, 0, guides={"arm": 1.0}))
    drain(engine)
    assert seen == [(TEXT[:at], TEXT[:at]) for at in range(1, len(TEXT))]


def test_pooled_rewards_read_a_prefix_as_the_prompt_that_it_then_is() -> None:
    pooled = RewardReading(pooling="pooled", pool_length=7)

    def engine() -> Engine:
        rewards = RewardModel(REWARD, pooled, num_slots=4)
        return Engine(CausalLM(BASE, num_slots=4), {"args": ARGSGuide(rewards, num_candidates=5)})

    reader = engine()
    reader.submit(scored(1, TEXT, 4, guides={"args": 1.0}))
    for at, reading in enumerate(readings_of(drain(reader)[0][1]), 4):
        fresh = engine()
        fresh.submit(request(1, TEXT[:at], guides={"args": 1.0}, top_logprobs=16, max_tokens=1))
        [token] = drain(fresh)[1][1]
        law = {one.token_id: one.logprob for one in token.top}
        assert reading.logprob == pytest.approx(law.get(TEXT[at], -math.inf), abs=1e-9)
        assert reading.kl == pytest.approx(token.kl, abs=1e-9)


@pytest.mark.parametrize("read_from", [len(TEXT), 1000])
def test_a_range_with_nothing_in_it_ends_too(read_from: int) -> None:
    engine = new_engine()
    engine.submit(scored(1, TEXT, read_from))
    engine.submit(scored(2, [5], 0, max_tokens=2))
    engine.submit(scored(3, [5], 0))
    read, drawn = drain(engine)
    assert read == {
        1: [PromptEvent(1, len(TEXT), (), FinishReason.LENGTH)],
        3: [PromptEvent(3, 1, (), FinishReason.LENGTH)],
    }
    assert {key: len(path) for key, path in drawn.items()} == {2: 2}
    assert engine.num_running == 0


def test_a_request_that_broke_off_reads_the_rest_and_goes_on_behind_its_tokens() -> None:
    params: dict[str, Any] = {"guides": CHAINS["mix"], "max_tokens": 8, "ignore_eos": True}
    whole = new_engine()
    whole.submit(scored(1, TEXT, 0, top_logprobs=TOP, **params))
    read, drawn = drain(whole)
    tokens = [event.token_id for event in drawn[1]]
    again = new_engine(read_budget=5, prefill_budget=8)
    rest = scored(1, TEXT, 14, top_logprobs=TOP, completed=tuple(tokens[:3]), **params)
    again.submit(rest)
    read_again, drawn_again = drain(again)
    check(readings_of(read_again[1]), 14, TEXT, "mix")
    assert len(readings_of(read[1])) == len(TEXT) - 1
    assert [event.index for event in drawn_again[1]] == [3, 4, 5, 6, 7]
    assert [event.token_id for event in drawn_again[1]] == tokens[3:]


def test_nothing_is_computed_twice() -> None:
    engine = new_engine(read_budget=5)
    engine.submit(scored(1, TEXT, 1, guides={"arm": 1.0}, max_tokens=4, ignore_eos=True))
    drain(engine)
    arm = engine.guides["arm"]
    assert isinstance(arm, GenARMGuide)
    assert isinstance(arm.source, CausalLM)
    for lm in (engine.base, arm.source):
        assert lm.num_forwards == len(TEXT) - 1 + 4


def test_rows_that_decode_get_their_token_in_every_step() -> None:
    engine = new_engine(read_budget=4, prefill_budget=16)
    engine.submit(request(1, [3], max_tokens=40, ignore_eos=True))
    engine.step()
    engine.submit(scored(2, TEXT * 4, 50))
    sizes = []
    for _ in range(16):
        assert [event.key for event in engine.step()] == [1]
        sizes.append([len(event.readings) for event in engine.take_readings()])
    # 50 tokens come before the first that is read, fed 16 at a time.
    assert sizes == [*[[]] * 3, *[[4]] * 10, [2], [], []]


def test_a_reader_that_is_cancelled_leaves_its_slot() -> None:
    engine = new_engine(read_budget=2)
    engine.submit(scored(1, TEXT, 0))
    engine.step()
    engine.cancel(1)
    engine.step()
    assert not engine.busy
    assert [event.first for event in engine.take_readings()] == [1]


def test_a_guide_that_is_given_up_while_a_prompt_is_read_is_gone_from_there() -> None:
    engine = new_engine(read_budget=6)
    engine.submit(scored(1, TEXT, 1, guides={"arm": 2.0}, top_logprobs=TOP))
    engine.step()
    engine.give_up(1, "arm")
    engine.step()
    first, second = engine.take_readings()
    assert all(reading.kl > 0 for reading in first.readings)
    check(second.readings, 7, TEXT, "base")


def test_scoring_needs_a_law_at_every_position() -> None:
    words = word_tokenizer()
    own = OwnTemplate(GenARMGuide(CausalLM(tiny_llama(2, vocab_size=len(words)))), words)
    base = CausalLM(tiny_llama(1, vocab_size=len(words)))
    messages: tuple[Message, ...] = ({"role": "user", "content": "boil"},)
    for guide in (own, Gated(own, 0.5)):
        engine = Engine(base, {"g": guide})
        asked = Request(
            key=1,
            prompt=Prompt([5, 6], messages),
            params=SamplingParams(max_tokens=1),
            guides={"g": 1.0},
        )
        engine.check(asked)
        with pytest.raises(PromptError, match="guide 'g' has no law there"):
            engine.check(replace(asked, read_from=0))


def test_a_request_reads_or_draws_something() -> None:
    engine = new_engine()
    with pytest.raises(PromptError, match="max_tokens is 0, wanted an integer >= 1"):
        engine.submit(request(1, TEXT, max_tokens=0))
    with pytest.raises(PromptError, match="read_from is -1"):
        engine.submit(scored(1, TEXT, -1))
