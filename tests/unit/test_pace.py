"""The pace of drafting: as many tokens as pay, by a clock that the test owns."""

import pytest

from pilotfish.decode import pace
from pilotfish.decode.pace import Pace
from pilotfish.decode.running import Running
from pilotfish.decode.sequence import Drafting
from tests.fakes import request


def drafting(num_tokens: int = 4, accepted: float = 0.9, max_tokens: int = 1000) -> Running:
    draft = Drafting(guide="g", num_tokens=num_tokens)
    one = request(1, [1], draft=draft, max_tokens=max_tokens)
    running = Running(one, seed=0, end_ids=frozenset(), text=None)
    running.accepted = accepted
    return running


def settle(
    running: list[Running], cost_per_draft: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Pace, list[int]]:
    """Run a while where a round takes 1 plus a cost per draft; return the last choices."""
    clock, chosen = 0.0, [0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock)
    chooser = Pace()
    for _ in range(60):
        chosen = chooser.choose(running)
        chooser.start()
        clock += 1 + cost_per_draft * max(chosen)
        chooser.stop()
    return chooser, chosen


def test_cheap_drafts_that_are_kept_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    running = [drafting()]
    chooser, chosen = settle(running, 0.1, monkeypatch)
    assert chosen == [4]
    expected = (1 + 0.9 + 0.9**2 + 0.9**3 + 0.9**4) / 1.4
    assert chooser.speed_up == pytest.approx(expected)


def test_dear_drafts_are_not_made_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    running = [drafting()]
    chooser, chosen = settle(running, 1.5, monkeypatch)
    assert chosen == [0]
    assert chooser.speed_up == 1


def test_a_sequence_whose_drafts_are_seldom_kept_drafts_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Running(request(2, [1]), seed=0, end_ids=frozenset(), text=None)
    running = [drafting(), drafting(accepted=0.5), drafting(accepted=0.1), plain]
    _, chosen = settle(running, 0.01, monkeypatch)
    assert chosen == [4, 2, 0, 0]


def test_nothing_is_drafted_behind_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _, chosen = settle([drafting(max_tokens=3), drafting(max_tokens=1)], 0.01, monkeypatch)
    assert chosen == [2, 0]


def test_a_pace_that_became_slow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, running, cost = 0.0, [drafting()], 0.1
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock)
    chooser = Pace()
    for round_number in range(400):
        if round_number == 100:
            cost = 3.0
        [k] = chooser.choose(running)
        chooser.start()
        clock += 1 + cost * k
        chooser.stop()
    assert chooser.choose(running) == [0]


def test_without_drafters_nothing_is_measured() -> None:
    plain = Running(request(2, [1]), seed=0, end_ids=frozenset(), text=None)
    chooser = Pace()
    assert chooser.choose([plain]) == [0]
    assert chooser.speed_up is None
