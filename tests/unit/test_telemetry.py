"""What is reported with every token: who moved it, and what guides had to say."""

import pytest
import torch
from torch import Tensor

from pilotfish.decode.engine import Engine
from pilotfish.decode.telemetry import kl
from pilotfish.guides.base import Step
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import drain, request, tiny_llama

BASE = tiny_llama(1)


class Push:
    """Raises one token's logit by the weight, forbids another, and says so."""

    needs_hidden = False

    def __init__(self, token: int, forbidden: int = 9) -> None:
        self.token, self.forbidden = token, forbidden

    def begin(self, contexts: object) -> None: ...

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        assert step.base_RV is not None
        pushed_RV = logprobs_RV.clone()
        pushed_RV[:, self.token] += step.weights_R
        pushed_RV[:, self.forbidden] = -torch.inf
        step.notes["before"] = logprobs_RV[:, self.token]
        step.notes["base"] = step.base_RV[:, self.token]
        return pushed_RV.log_softmax(-1)

    def release(self, keys: object) -> None: ...


def test_each_token_names_the_guide_that_moved_it_most() -> None:
    engine = Engine(CausalLM(BASE), {"weak": Push(3), "strong": Push(5), "down": Push(3)})
    chains = {1: {"weak": 0.5, "strong": 20.0}, 2: {"weak": 20.0}, 3: {}, 4: {"down": -1e-3}}
    for key, guides in chains.items():
        engine.submit(request(key, [1, 2], guides=guides, max_tokens=5))
    events = drain(engine)
    assert {event.moved_by for event in events[1]} == {"strong"}
    assert {event.moved_by for event in events[2]} == {"weak"}
    assert {event.moved_by for event in events[3]} == {None}
    assert {event.moved_by for event in events[4]} == {"down"}


def test_notes_of_guides_arrive_with_the_tokens_of_their_rows() -> None:
    engine = Engine(CausalLM(BASE), {"one": Push(3), "two": Push(5)})
    engine.submit(request(1, [1, 2], guides={"one": 1.0, "two": 2.0}, max_tokens=3))
    engine.submit(request(2, [1, 2], guides={"two": 2.0}, max_tokens=3))
    engine.submit(request(3, [1, 2], max_tokens=3))
    events = drain(engine)
    assert set(events[1][0].notes) == {"one.before", "one.base", "two.before", "two.base"}
    assert set(events[2][0].notes) == {"two.before", "two.base"}
    assert events[3][0].notes == {}
    assert events[2][0].notes["two.before"] == events[2][0].notes["two.base"]
    assert events[1][0].notes["two.base"] == pytest.approx(events[2][0].notes["two.base"])
    assert events[1][0].notes["two.before"] != events[1][0].notes["two.base"]


def test_a_forbidden_token_counts_nothing_in_the_divergence() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    guided = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    assert kl(guided, base).item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert kl(base, base).item() == 0
