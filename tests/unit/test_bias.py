"""Biases, end tokens that come too early, and the likeliest tokens that are reported."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import FinishReason, TokenEvent
from pilotfish.errors import PromptError
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import drain, plain_logprobs, request, tiny_llama

BASE, GUIDE = tiny_llama(1), tiny_llama(2)
ENDS = frozenset({0, 7})


class Only:
    """A guide that allows some tokens and forbids all others."""

    needs_hidden = False

    def __init__(self, *tokens: int) -> None:
        self._tokens = list(tokens)

    def begin(self, contexts: object) -> None: ...

    def tilt(self, logprobs_RV: Tensor, step: object, evidence: None) -> Tensor:
        narrowed_RV = torch.full_like(logprobs_RV, -torch.inf)
        narrowed_RV[:, self._tokens] = logprobs_RV[:, self._tokens]
        return narrowed_RV.log_softmax(-1)

    def release(self, keys: object) -> None: ...


def new_engine() -> Engine:
    guides = {"g": GenARMGuide(CausalLM(GUIDE)), "ends": Only(*ENDS), "few": Only(1, 5, 9)}
    return Engine(CausalLM(BASE), guides, end_ids=ENDS | {99})  # as some generation configs do


def run(**rows: dict[str, Any]) -> dict[str, list[TokenEvent]]:
    """Decode rows together, by name."""
    engine, names = new_engine(), list(rows)
    for key, settings in enumerate(rows.values()):
        engine.submit(request(key, [4, 2], **{"temperature": 0.0, **settings}))
    return {names[key]: path for key, path in drain(engine).items()}


MIXED: dict[str, dict[str, Any]] = {
    "plain": {"guides": {"g": 0.7}},
    "biased": {"guides": {"g": 0.7}, "logit_bias": {3: 6.0, 11: -100.0}, "top_logprobs": 3},
    "long": {"min_tokens": 9, "stop_token_ids": (1, 5), "logit_bias": {0: 100.0}},
    "ignoring": {"min_tokens": 5, "ignore_eos": True, "logit_bias": {7: 50.0}, "max_tokens": 8},
    "top": {"guides": {"g": 0.7}, "top_logprobs": 100},
}


def test_rows_with_different_biases_and_lengths_share_a_batch() -> None:
    """Greedy tokens of formula and definition; log-probs are reported as they were before."""
    paths = run(**MIXED)
    for name, settings in MIXED.items():
        ids, weight = [4, 2], settings.get("guides", {}).get("g", 0.0)
        ends = {*settings.get("stop_token_ids", ()), *(set() if name == "ignoring" else ENDS)}
        for event in paths[name]:
            base = plain_logprobs(BASE, ids)
            law = (base + weight * plain_logprobs(GUIDE, ids)).log_softmax(-1)
            drawn = law.clone()
            for token, bias in settings.get("logit_bias", {}).items():
                drawn[token] += bias
            if event.index < settings.get("min_tokens", 0):
                drawn[list(ends)] = -torch.inf
            assert event.token_id == int(drawn.argmax())
            assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
            best = law.argsort(descending=True).tolist()[: settings.get("top_logprobs", 0)]
            assert [one.token_id for one in event.top] == best
            assert [one.logprob for one in event.top] == pytest.approx(law[best].tolist())
            assert [one.base_logprob for one in event.top] == pytest.approx(base[best].tolist())
            ids.append(event.token_id)
    assert len(paths["long"]) == 10
    assert paths["long"][-1].finish_reason is FinishReason.STOP
    assert [event.token_id for event in paths["ignoring"]] == [7] * 8


def test_a_row_is_what_it_is_alone() -> None:
    together = run(**{name: {**row, "temperature": 0.8} for name, row in MIXED.items()})
    for name, row in MIXED.items():
        engine = new_engine()
        key = list(MIXED).index(name)
        engine.submit(request(key, [4, 2], temperature=0.8, **row))
        tokens = [event.token_id for event in drain(engine)[key]]
        assert [event.token_id for event in together[name]] == tokens


def test_the_largest_biases_are_no_overflow() -> None:
    engine = Engine(CausalLM(tiny_llama(1, dtype=torch.float32)))
    engine.submit(request(1, [4, 2], logit_bias={5: 100.0, 6: 100.0}, seed=3))
    assert {event.token_id for event in drain(engine)[1]} == {5, 6}


def test_where_guides_allow_nothing_but_an_early_end_the_base_decides() -> None:
    paths = run(
        ends={"guides": {"ends": 1.0}, "min_tokens": 3},
        other={"guides": {"g": 0.7}, "min_tokens": 3},
    )
    ids = [4, 2]
    for event in paths["ends"][:3]:
        base = plain_logprobs(BASE, ids)
        base[list(ENDS)] = -torch.inf
        assert event.token_id == int(base.argmax())
        assert event.logprob == -math.inf
        ids.append(event.token_id)
    assert len(paths["ends"]) == 4
    assert paths["ends"][-1].token_id in ENDS


def test_tokens_that_guides_forbid_are_not_among_the_likeliest() -> None:
    [event] = run(few={"guides": {"few": 1.0}, "top_logprobs": 8, "max_tokens": 1})["few"]
    assert {one.token_id for one in event.top} == {1, 5, 9}
    assert sum(math.exp(one.logprob) for one in event.top) == pytest.approx(1)


def test_ids_of_biases_and_ends_leave_something_to_draw() -> None:
    engine = new_engine()
    foreign: list[dict[str, Any]] = [{"logit_bias": {16: 1.0}}, {"stop_token_ids": (16,)}]
    for strange in foreign:
        with pytest.raises(PromptError, match="token id 16 is outside the vocabulary of 16"):
            engine.check(request(1, [1], **strange))
    ends = {"min_tokens": 1, "stop_token_ids": tuple(range(16))}
    with pytest.raises(PromptError, match="all 16 tokens end the completion"):
        engine.check(request(1, [1], **ends))
    engine.check(request(1, [1], **{**ends, "min_tokens": 0}))
