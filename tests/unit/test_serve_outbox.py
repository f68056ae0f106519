"""`serve.replicas.outbox`: what waits for the event loop, and what does not."""

import random
from collections.abc import Mapping, Sequence

from serve.replicas.outbox import Outbox

Sent = list[Mapping[int, Sequence[str]]]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def outbox(pause: float) -> tuple[Outbox, Sent, Clock]:
    sent: Sent = []
    clock = Clock()
    return Outbox(sent.append, lambda: pause, clock), sent, clock


def test_everything_goes_once_per_pause() -> None:
    box, sent, clock = outbox(pause=1.0)
    for step in range(8):
        box.add(1, f"a{step}")
        box.add(2, f"b{step}")
        box.send()
        clock.now += 0.3
    assert sent == [
        {1: ["a0"], 2: ["b0"]},
        {1: ["a1", "a2", "a3", "a4"], 2: ["b1", "b2", "b3", "b4"]},
    ]


def test_what_is_urgent_goes_at_once_with_what_stands_before_it() -> None:
    box, sent, _ = outbox(pause=1.0)
    box.send()
    box.add(1, "a0")
    box.add(2, "b0")
    box.send()
    box.add(1, "a1")
    box.send([1])
    assert sent == [{1: ["a0", "a1"]}]


def test_what_is_dropped_never_goes() -> None:
    box, sent, clock = outbox(pause=1.0)
    box.send()
    box.add(1, "a0")
    box.add(2, "b0")
    box.drop(1)
    box.drop(3)
    clock.now += 2
    box.send([1])
    assert sent == [{2: ["b0"]}]


def test_no_item_is_lost_repeated_or_overtaken() -> None:
    chance = random.Random(0)
    box, sent, clock = outbox(pause=0.5)
    added: dict[int, list[str]] = {}
    for number in range(2000):
        key = chance.randrange(5)
        box.add(key, str(number))
        added.setdefault(key, []).append(str(number))
        clock.now += chance.random() / 4
        box.send([chance.randrange(5)] if chance.random() < 0.3 else [])
    clock.now += 1
    box.send()
    got: dict[int, list[str]] = {}
    for items in sent:
        for key, own in items.items():
            got.setdefault(key, []).extend(own)
    assert got == added
