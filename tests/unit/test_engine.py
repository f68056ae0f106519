"""The decode loop: the exact guided law, and the same tokens however the batch is made up."""

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pilotfish.context import Context
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting, FinishReason, Request, TokenEvent
from pilotfish.errors import PromptError
from pilotfish.guides.base import Step, TokenGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import context, drain, plain_logprobs, request, tiny_llama

BASE, GUIDE, OTHER = tiny_llama(1), tiny_llama(2), tiny_llama(3)


def new_engine(num_slots: int = 8, **settings: Any) -> Engine:
    guides = {
        "a": GenARMGuide(CausalLM(GUIDE, num_slots=num_slots)),
        "b": GenARMGuide(CausalLM(OTHER, num_slots=num_slots)),
    }
    base = CausalLM(BASE, num_slots=num_slots)
    return Engine(base, guides, end_ids=frozenset({0}), **settings)


def run(requests: list[Request], **settings: Any) -> dict[int, list[TokenEvent]]:
    engine = new_engine(**settings)
    for one in requests:
        engine.submit(one)
    return drain(engine)


def guided_law(token_ids: list[int], weights: dict[str, float]) -> torch.Tensor:
    """GenARM equations (5) and (6), without cache or batch."""
    law = plain_logprobs(BASE, token_ids)
    for name, weight in weights.items():
        model = {"a": GUIDE, "b": OTHER}[name]
        law = law + weight * plain_logprobs(model, token_ids)
    return law.log_softmax(-1)


MIXED = [
    {},
    {"a": 1.0},
    {"b": 0.5},
    {"a": 0.3, "b": 2.0},
    {"b": 2.0, "a": 0.3},
    {"a": -0.5},
    {"a": 0.0},
]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_every_event_reports_the_guided_law_of_the_formula(temperature: float) -> None:
    prompts = [[(3 * i) % 16, 5, i + 1] for i in range(len(MIXED))]
    requests = [
        request(i, prompts[i], guides=weights, temperature=temperature, ignore_eos=True)
        for i, weights in enumerate(MIXED)
    ]
    events = run(requests)
    for i, weights in enumerate(MIXED):
        ids = list(prompts[i])
        for event in events[i]:
            law, base = guided_law(ids, weights), plain_logprobs(BASE, ids)
            assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
            assert event.base_logprob == pytest.approx(base[event.token_id].item(), abs=1e-9)
            assert event.kl == pytest.approx((law.exp() * (law - base)).sum().item(), abs=1e-9)
            if temperature == 0:
                assert event.token_id == int(law.argmax())
            ids.append(event.token_id)


def test_sampled_sequences_follow_the_enumerated_law() -> None:
    """All 27 continuations of length 3 over three tokens, 4,000 seeds, chi-square."""
    base, guide = tiny_llama(4, vocab_size=3), tiny_llama(5, vocab_size=3)
    engine = Engine(
        CausalLM(base, num_slots=500), {"g": GenARMGuide(CausalLM(guide, num_slots=500))}
    )
    params: dict[str, Any] = {
        "guides": {"g": 0.8},
        "max_tokens": 3,
        "temperature": 1.3,
        "top_p": 0.95,
    }
    for seed in range(4000):
        engine.submit(request(seed, [1, 2], seed=seed, **params))
    events = drain(engine)
    counts: dict[tuple[int, ...], int] = {}
    for path in events.values():
        ids = tuple(event.token_id for event in path)
        counts[ids] = counts.get(ids, 0) + 1

    def law(ids: list[int]) -> list[float]:
        mixed = plain_logprobs(base, ids) + 0.8 * plain_logprobs(guide, ids)
        probs = (mixed / 1.3).softmax(-1)
        ranked = sorted(range(3), key=lambda token: -probs[token])
        kept = [t for place, t in enumerate(ranked) if sum(probs[ranked[:place]]) < 0.95]
        total = sum(probs[kept].tolist())
        return [probs[t].item() / total if t in kept else 0.0 for t in range(3)]

    chi_square, cells = 0.0, 0
    for path in itertools.product(range(3), repeat=3):
        chance = math.prod(law([1, 2, *path[:at]])[path[at]] for at in range(3))
        if chance == 0:
            assert path not in counts
            continue
        chi_square += (counts.get(path, 0) - 4000 * chance) ** 2 / (4000 * chance)
        cells += 1
    assert chi_square < (cells - 1) + 4 * math.sqrt(2 * (cells - 1))


def test_text_is_the_same_alone_in_a_batch_and_in_any_order_of_arrival() -> None:
    requests = [
        request(i, [i % 5 + 1] * (i % 4 + 1), guides=MIXED[i % 7], seed=i, max_tokens=5 + i % 9)
        for i in range(24)
    ]
    together = run(requests, num_slots=24)
    alone = {one.key: run([one])[one.key] for one in requests}
    shuffled = requests.copy()
    random.Random(1).shuffle(shuffled)
    engine = new_engine(num_slots=5)
    staggered: dict[int, list[TokenEvent]] = {}
    while shuffled or engine.busy:
        if shuffled:
            engine.submit(shuffled.pop())
        for event in engine.step():
            staggered.setdefault(event.key, []).append(event)

    def tokens(events: dict[int, list[TokenEvent]]) -> dict[int, list[int]]:
        return {key: [event.token_id for event in path] for key, path in events.items()}

    assert tokens(together) == tokens(alone) == tokens(staggered)


def test_weight_zero_is_the_base_bit_for_bit() -> None:
    plain = run([request(1, [4, 2])])[1]
    assert run([request(1, [4, 2], guides={"a": 0.0})])[1] == plain
    assert all(event.kl == 0 and event.logprob == event.base_logprob for event in plain)


def test_a_resumed_request_continues_the_same_path() -> None:
    whole = run([request(1, [4, 2], guides={"a": 1.0}, max_tokens=10, ignore_eos=True)])[1]
    for cut in range(1, 10):
        done = tuple(event.token_id for event in whole[:cut])
        resumed = run(
            [request(1, [4, 2], guides={"a": 1.0}, max_tokens=10, ignore_eos=True, completed=done)]
        )[1]
        assert [e.token_id for e in resumed] == [e.token_id for e in whole[cut:]]
        assert resumed[0].index == cut


def test_long_prompts_are_prefilled_beside_running_rows() -> None:
    """A prompt of 90 tokens at 16 tokens a step must not stall the row that is decoding."""
    engine = new_engine(prefill_budget=16)
    engine.submit(request(1, [3], max_tokens=30, ignore_eos=True))
    engine.step()
    engine.submit(request(2, [5] * 90, guides={"a": 1.0}, max_tokens=4, ignore_eos=True))
    steps = [{event.key for event in engine.step()} for _ in range(12)]
    assert all(1 in keys for keys in steps)
    assert [2 in keys for keys in steps].index(True) == 5
    long = [5] * 90
    expected = run([request(2, long, guides={"a": 1.0}, max_tokens=4, ignore_eos=True)])[2]
    again = new_engine(prefill_budget=16)
    again.submit(request(2, long, guides={"a": 1.0}, max_tokens=4, ignore_eos=True))
    assert [e.token_id for e in drain(again)[2]] == [e.token_id for e in expected]


def test_end_tokens_stop_and_are_reported_once() -> None:
    paths = run([request(i, [i % 16], seed=i, max_tokens=40) for i in range(30)])
    stopped = [path for path in paths.values() if path[-1].finish_reason is FinishReason.STOP]
    assert stopped
    for path in paths.values():
        assert all(event.finish_reason is None for event in path[:-1])
        assert 0 not in [event.token_id for event in path[:-1]]
        ended = path[-1].token_id == 0
        assert path[-1].finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(path) == 40


def test_cancelled_requests_free_their_slots() -> None:
    engine = new_engine(num_slots=2)
    for key in range(4):
        engine.submit(request(key, [1], max_tokens=50, ignore_eos=True))
    engine.step()
    engine.cancel(0)
    engine.cancel(3)
    events = drain(engine)
    assert sorted(events) == [1, 2]
    assert engine.num_running == engine.num_waiting == 0


class Breaking:
    """A slow guide that stops answering after some steps."""

    needs_hidden = False

    def __init__(self, guide: TokenGuide, *, num_steps: int, seconds: float = 0.0) -> None:
        self._guide, self.left, self.seconds = guide, num_steps, seconds
        self.released: list[int] = []

    def begin(self, contexts: Sequence[Context]) -> Any:
        time.sleep(self.seconds)
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("gone")
        return self._guide.begin(contexts)

    def tilt(self, logprobs_RV: torch.Tensor, step: Step, evidence: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return self._guide.tilt(logprobs_RV, step, evidence)

    def release(self, keys: Sequence[int]) -> None:
        self.released += keys


@pytest.mark.parametrize("draft", [None, Drafting(guide="a", num_tokens=2)])
def test_a_request_goes_on_without_a_guide_that_was_given_up(draft: Drafting | None) -> None:
    engine = new_engine(num_slots=2, drafters={"a": CausalLM(GUIDE)})
    broken = engine.guides["broken"] = Breaking(engine.guides["b"], num_steps=2)
    weights = {1: {"a": 0.5, "broken": 1.5}, 2: {"b": 1.0}, 3: {"broken": 1.5, "a": 0.5}}
    params: dict[str, Any] = {"draft": draft, "max_tokens": 16, "ignore_eos": True}
    asked = {key: request(key, [4, 2], guides=weights[key], **params) for key in weights}
    drawn: dict[int, list[int]] = {key: [] for key in asked}
    for one in asked.values():  # the third one waits for a slot
        engine.submit(one)
    cut = dict.fromkeys(asked, 0)
    for _ in range(50):
        try:
            events = engine.step()
        except ConnectionError:
            cut = {key: len(ids) for key, ids in drawn.items()}
            for key, guide in ((1, "a"), (1, "broken"), (3, "broken"), (9, "a"), (2, "nobody")):
                engine.give_up(key, guide)
        else:
            for event in events:
                drawn[event.key].append(event.token_id)
    assert not engine.busy
    assert broken.released == [1, 3]
    assert cut[1] >= 2
    assert cut[3] == 0
    left = {1: {}, 2: {"b": 1.0}, 3: {"a": 0.5}}
    for key, one in asked.items():
        before = tuple(drawn[key][: cut[key]])
        rest = tokens_of(replace(one, guides=left[key], completed=before))
        healthy = {name.replace("broken", "b"): w for name, w in weights[key].items()}
        whole = tokens_of(replace(one, guides=healthy))
        assert drawn[key] == [*before, *rest]
        assert tuple(whole[: cut[key]]) == before
        assert (whole == drawn[key]) is (key == 2)


def tokens_of(one: Request) -> list[int]:
    engine = new_engine(drafters={"a": CausalLM(GUIDE)})
    engine.submit(one)
    return [event.token_id for event in drain(engine)[one.key]]


def test_laws_can_be_asked_for_beside_what_is_decoded() -> None:
    engine = new_engine(num_slots=1)
    engine.submit(request(1, [4, 2], guides={"a": 1.0}, ignore_eos=True))
    tokens = [event.token_id for event in engine.step()]
    weights = {"a": 0.5, "b": 0.0}
    [law] = engine.law([context(-1, [3, 1, 4])], weights)
    torch.testing.assert_close(law, guided_law([3, 1, 4], weights))
    tokens += [event.token_id for event in drain(engine)[1]]
    assert tokens == tokens_of(request(1, [4, 2], guides={"a": 1.0}, ignore_eos=True))


def test_a_guide_can_be_removed_right_after_its_requests_were_cancelled() -> None:
    engine = new_engine(drafters={"a": CausalLM(GUIDE)})
    engine.submit(request(1, [4], guides={"a": 1.0}, draft=Drafting(guide="a")))
    engine.submit(request(2, [4], guides={"b": 1.0}))
    engine.step()
    engine.cancel(1)
    engine.remove_guide("a")
    assert set(drain(engine)) == {2}
    with pytest.raises(PromptError, match="no guide named 'a' is loaded; loaded: b"):
        engine.check(request(3, [4], guides={"a": 1.0}))
    with pytest.raises(PromptError, match="nothing named 'a' can draft here"):
        engine.check(request(3, [4], draft=Drafting(guide="a")))


def test_stats_count_steps_seconds_in_guides_and_columns_in_use() -> None:
    engine = new_engine(num_slots=4)
    engine.guides["slow"] = slow = Breaking(engine.guides["a"], num_steps=99, seconds=0.01)
    for key in (1, 2):
        engine.submit(request(key, [3] * 10, guides={"slow": 1.0, "b": 1.0}, ignore_eos=True))
    engine.step()
    assert engine.cache_share == pytest.approx(2 * 11 / (4 * 256))
    drain(engine)
    stats = engine.stats
    assert stats.num_steps == 12
    assert stats.guide_seconds["slow"] >= 12 * 2 * slow.seconds
    assert stats.guide_seconds["b"] > 0
    assert stats.seconds > sum(stats.guide_seconds.values())
    assert engine.cache_share == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(1, [1], guides={"c": 1.0}), "no guide named 'c' is loaded; loaded: a, b"),
        (request(1, [1] * 250), "more than the 256 positions"),
        (request(1, []), "has no tokens"),
        (request(1, [16]), "token id 16 is outside the vocabulary of 16"),
    ],
)
def test_requests_that_cannot_run_are_refused_before_any_work(bad: Request, message: str) -> None:
    engine = new_engine()
    with pytest.raises(PromptError, match=message):
        engine.submit(bad)
    assert not engine.busy


@pytest.mark.parametrize("gated", [False, True])
def test_a_guide_that_reads_less_than_the_base_is_heeded_before_any_work(gated: bool) -> None:
    short = CausalLM(tiny_llama(2, max_position_embeddings=16))
    guide: TokenGuide = GenARMGuide(short)
    engine = Engine(CausalLM(BASE), {"g": Gated(guide, 1.0) if gated else guide})
    engine.check(request(1, [1] * 10, max_tokens=7))
    engine.check(request(1, [1] * 10, max_tokens=6, guides={"g": 1.0}))
    engine.check(request(1, [1] * 10, max_tokens=7, guides={"g": 0.0}))
    with pytest.raises(PromptError, match="more than the 16 positions of guide 'g'"):
        engine.submit(request(1, [1] * 10, max_tokens=7, guides={"g": 1.0}))
