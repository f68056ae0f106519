"""Slots that run out: who waits, who goes back, and that no text shows it."""

import random

import pytest

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting, Request, TokenEvent
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import drain, request, tiny_llama

BASE, GUIDE = tiny_llama(1), tiny_llama(2)


def new_engine(num_slots: int, max_cache_tokens: int | None = None) -> Engine:
    guide = CausalLM(GUIDE, num_slots=num_slots)
    base = CausalLM(BASE, num_slots=num_slots, max_cache_tokens=max_cache_tokens)
    return Engine(base, {"g": GenARMGuide(guide)}, drafters={"g": guide}, prefill_budget=16)


def texts(events: dict[int, list[TokenEvent]]) -> dict[int, list[int]]:
    return {key: [event.token_id for event in path] for key, path in events.items()}


def jobs() -> list[Request]:
    rng = random.Random(0)
    return [
        request(
            key,
            [rng.randrange(16) for _ in range(rng.randrange(1, 40))],
            guides={"g": 1.0} if key % 2 else {},
            draft=Drafting(guide="g", num_tokens=2) if key % 3 == 0 else None,
            max_tokens=rng.randrange(20, 120),
            seed=key,
        )
        for key in range(8)
    ]


def test_rows_that_outgrow_the_memory_go_back_and_their_text_is_the_same() -> None:
    roomy, tight = new_engine(8), new_engine(8, max_cache_tokens=3 * 128)
    for one in jobs():
        roomy.submit(one)
        tight.submit(one)
    events = drain(tight)
    assert tight.num_preempted > 0
    assert roomy.num_preempted == 0
    assert texts(events) == texts(drain(roomy))
    for path in events.values():
        assert [event.index for event in path] == list(range(len(path)))


def test_an_urgent_request_takes_the_slot_of_the_latest_of_lower_priority() -> None:
    engine = new_engine(2)
    for key in (1, 2):
        engine.submit(request(key, [3, key], priority=1, ignore_eos=True))
    engine.step()
    engine.submit(request(3, [5], priority=0, max_tokens=3))
    events: dict[int, list[TokenEvent]] = {}
    for event in engine.step():
        events.setdefault(event.key, []).append(event)
    assert set(events) == {1, 3}
    assert engine.num_preempted == 1
    rest = drain(engine)
    alone = new_engine(2)
    alone.submit(request(2, [3, 2], ignore_eos=True))
    assert texts(rest)[2] == texts(drain(alone))[2][1:]


def test_equals_do_not_push_each_other_out() -> None:
    engine = new_engine(1)
    for key in range(3):
        engine.submit(request(key, [key + 1], max_tokens=4))
    ended = [event.key for _ in range(30) for event in engine.step() if event.finish_reason]
    assert ended == [0, 1, 2]
    assert engine.num_preempted == 0


@pytest.mark.parametrize("preempt_at", [1, 4])
def test_a_cancelled_request_leaves_its_slot_wherever_it_is(preempt_at: int) -> None:
    engine = new_engine(1)
    engine.submit(request(1, [1], priority=1))
    for _ in range(preempt_at):
        engine.step()
    engine.submit(request(2, [2], priority=0))
    engine.step()
    engine.cancel(1)
    assert {event.key for _ in range(30) for event in engine.step()} == {2}
    assert not engine.busy
