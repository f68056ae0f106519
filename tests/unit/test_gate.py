"""Gates: shut they are the base, open they are the guide; in between each row is one of both."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import TokenEvent
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Step
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import context, plain_logprobs, request, tiny_llama

BASE, GUIDE, OTHER = tiny_llama(1), tiny_llama(2), tiny_llama(3)
TEXTS = [[i, (5 * i) % 16, 3] for i in range(8)]


def entropy(law: Tensor) -> float:
    return -(law.exp() * law).sum().item()


MIDDLE = sorted(entropy(plain_logprobs(BASE, ids)) for ids in TEXTS)[4]


class Noting:
    """A GenARM guide that writes down which rows it was asked about."""

    needs_hidden = True

    def __init__(self) -> None:
        self.lm = CausalLM(GUIDE)
        self.asked: list[list[int]] = []
        self._guide = GenARMGuide(self.lm)

    def begin(self, contexts) -> Any:
        self.asked.append([one.key for one in contexts])
        return self._guide.begin(contexts)

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: Any) -> Tensor:
        assert step.hidden_RD is not None
        step.notes["key"] = torch.tensor([float(one.key) for one in step.contexts])
        keys = step.hidden_RD[:, 0].tolist()
        assert keys == [one.key for one in step.contexts], "states go with their rows"
        return self._guide.tilt(logprobs_RV, step, evidence)

    def release(self, keys) -> None:
        self._guide.release(keys)


def new_step(base_RV: Tensor) -> Step:
    contexts = [context(key, ids) for key, ids in enumerate(TEXTS)]
    weights_R = torch.linspace(0.5, 2, len(TEXTS), dtype=torch.float64)
    hidden_RD = torch.arange(len(TEXTS), dtype=torch.float64)[:, None]
    return Step(contexts, weights_R, hidden_RD, base_RV)


@torch.inference_mode()
def test_open_rows_are_tilted_and_the_others_pass_bit_for_bit() -> None:
    base_RV = torch.stack([plain_logprobs(BASE, ids) for ids in TEXTS])
    # A guide before this one made the incoming law: the gate reads the base's all the same.
    incoming_RV = torch.stack([plain_logprobs(OTHER, ids) for ids in TEXTS])
    before_RV, inner = incoming_RV.clone(), Noting()
    gate, step = Gated(inner, MIDDLE), new_step(base_RV)
    found_RV = gate.tilt(incoming_RV, step, gate.begin(step.contexts))
    open_rows = [row for row in range(8) if entropy(base_RV[row]) > MIDDLE]
    assert inner.asked == [open_rows]
    for row, ids in enumerate(TEXTS):
        if row not in open_rows:
            assert torch.equal(found_RV[row], incoming_RV[row])
            continue
        tilted = incoming_RV[row] + step.weights_R[row] * plain_logprobs(GUIDE, ids)
        torch.testing.assert_close(found_RV[row], tilted.log_softmax(-1))
    assert torch.equal(incoming_RV, before_RV)
    assert step.notes["gate_open"].tolist() == [float(row in open_rows) for row in range(8)]
    assert step.notes["key"].tolist() == [row if row in open_rows else 0 for row in range(8)]
    assert (gate.num_rows, gate.num_open) == (8, len(open_rows))
    assert 0 < len(open_rows) < 8


def decode(guides: dict[str, Any], weights: dict[str, float]) -> list[TokenEvent]:
    engine = Engine(CausalLM(BASE), guides)
    for key, ids in enumerate(TEXTS):
        params: dict[str, Any] = {"guides": weights if key % 3 else {}, "ignore_eos": True}
        engine.submit(request(key, ids, seed=key, **params))
    events = []
    while engine.busy:
        events += [replace(event, notes={}) for event in engine.step()]
    return events


def test_a_gate_that_is_always_open_is_the_guide() -> None:
    dense = decode({"g": GenARMGuide(CausalLM(GUIDE))}, {"g": 0.8})
    gate = Gated(GenARMGuide(CausalLM(GUIDE)), 0)
    assert decode({"g": gate}, {"g": 0.8}) == dense
    assert gate.num_open == gate.num_rows > 0


def test_a_gate_that_never_opens_is_the_base_and_costs_no_forward() -> None:
    lm = CausalLM(GUIDE)
    gate = Gated(GenARMGuide(lm), float("inf"))
    assert decode({"g": gate}, {"g": 0.8}) == decode({}, {})
    assert lm.num_forwards == gate.num_open == 0 < gate.num_rows


def test_every_token_follows_the_guide_where_the_base_hesitates_and_the_base_elsewhere() -> None:
    """Behind an open guide of its own, with the tokens drawn and the gate's counts compared."""
    lm = CausalLM(GUIDE)
    gate = Gated(GenARMGuide(lm), MIDDLE)
    events = decode({"h": GenARMGuide(CausalLM(OTHER)), "g": gate}, {"h": 0.6, "g": 0.9})
    texts, num_open = {key: list(ids) for key, ids in enumerate(TEXTS)}, 0
    for event in events:
        ids = texts[event.key]
        law = base = plain_logprobs(BASE, ids)
        if event.key % 3:
            law = law + 0.6 * plain_logprobs(OTHER, ids)
            if entropy(base) > MIDDLE:
                law = law + 0.9 * plain_logprobs(GUIDE, ids)
                num_open += 1
        law = law.log_softmax(-1)
        assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
        ids.append(event.token_id)
    assert gate.num_open == num_open == lm.num_forwards
    assert gate.num_rows == sum(event.key % 3 > 0 for event in events)
    assert 0 < num_open < gate.num_rows


@torch.inference_mode()
def test_positions_of_one_sequence_are_gated_each_for_itself() -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    contexts = [context(7, ids[:length]) for length in range(1, len(ids) + 1)]
    base_RV = torch.stack([plain_logprobs(BASE, one.token_ids) for one in contexts])
    threshold = base_RV.exp().mul(-base_RV).sum(-1).median().item()
    gate = Gated(GenARMGuide(CausalLM(GUIDE)), threshold)
    step = Step(contexts, torch.ones(len(contexts), dtype=torch.float64), base_RV=base_RV)
    found_RV = gate.tilt(base_RV, step, gate.begin(contexts))
    for law, base, one in zip(found_RV, base_RV, contexts, strict=True):
        if entropy(base) > threshold:
            base = (base + plain_logprobs(GUIDE, one.token_ids)).log_softmax(-1)
        torch.testing.assert_close(law, base)
    assert 0 < gate.num_open < len(contexts)


@torch.inference_mode()
def test_a_base_that_forbids_tokens_has_an_entropy() -> None:
    base_RV = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0]], dtype=torch.float64).log()
    gate = Gated(GenARMGuide(CausalLM(tiny_llama(1, vocab_size=4))), 0.6)
    contexts = [context(1, [1]), context(2, [2])]
    step = Step(contexts, torch.ones(2, dtype=torch.float64), base_RV=base_RV)
    gate.tilt(base_RV, step, gate.begin(contexts))
    assert step.notes["gate_open"].tolist() == [1, 0]


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_is_a_number_of_nats(threshold: float) -> None:
    with pytest.raises(ConfigError, match="wanted a number of nats >= 0"):
        Gated(GenARMGuide(CausalLM(GUIDE)), threshold)
